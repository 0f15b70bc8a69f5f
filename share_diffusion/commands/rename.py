"""Give a concept another name."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "give a concept another name"


def flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("file", type=Path, help="the subspace file")
    parser.add_argument("old", help="the concept's present name")
    parser.add_argument("new", help="its new name")


def run(arguments: argparse.Namespace) -> None:
    """Rename a concept of a file, under the file's lock; the trigger stays."""
    from share_diffusion import storage
    from share_diffusion.file import rename_concept

    with storage.locked(arguments.file, needed=arguments.file.exists()):  # what is not there is told, and no lock is left
        rename_concept(arguments.file, arguments.old, arguments.new)
    print(f"{arguments.old} is now {arguments.new} in {arguments.file} (the file as it was: .bak)")
