"""Take a concept out of a subspace file."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "take a concept out of a subspace file"


def flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("file", type=Path, help="the subspace file")
    parser.add_argument("name", help="the concept")


def run(arguments: argparse.Namespace) -> None:
    """Take a concept out of a file, under the file's lock."""
    from share_diffusion import storage
    from share_diffusion.file import drop_concept

    with storage.locked(arguments.file, needed=arguments.file.exists()):  # what is not there is told, and no lock is left
        left = drop_concept(arguments.file, arguments.name)
    print(f"dropped {arguments.name}; {arguments.file} holds: {', '.join(left) or 'nothing'} (the file as it was: .bak)")
