"""Tell what ComfyUI, A1111 / Forge, InvokeAI, sd-scripts and diffusers will match of an exported file or folder."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "what each program will match of an exported file"


def flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("path", type=Path, help="a LoRA or checkpoint file, or a pipeline, PEFT or ComfyUI folder")


def run(arguments: argparse.Namespace) -> None:
    """Print the verdicts."""
    from share_diffusion.export.verify import lines, verify

    print("\n".join(lines(verify(arguments.path))))
