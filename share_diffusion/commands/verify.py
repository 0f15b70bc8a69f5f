"""Check every byte of a subspace file."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "check every byte of a subspace file"


def flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("file", type=Path, help="the subspace file")


def run(arguments: argparse.Namespace) -> None:
    """Check a file against its checksum and its own description."""
    from share_diffusion.file import load

    subspace = load(arguments.file, look=True)
    print(f"{arguments.file} is sound: {len(subspace.concepts)} concepts, generation {subspace.generation}")
