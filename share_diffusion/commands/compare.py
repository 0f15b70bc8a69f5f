"""Two LoRAs, concepts or subspace files side by side.

A and B are LoRA files of any dialect, subspace files, or one concept of a subspace file written FILE::NAME.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HELP = "two LoRAs, concepts (FILE::NAME) or subspace files side by side"


def flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("a", metavar="A", help="a LoRA file, a subspace file, or FILE::NAME for one concept")
    parser.add_argument("b", metavar="B", help="what it is compared with, given in the same way")
    parser.add_argument("--json", action="store_true", help="print JSON with stable keys")


def run(arguments: argparse.Namespace) -> None:
    """Print how two things are related."""
    from share_diffusion.comparison import compare, page

    facts = compare(*(opened(place) for place in (arguments.a, arguments.b)))
    print(json.dumps(facts, indent=1) if arguments.json else page(facts, arguments.a, arguments.b))


def opened(place: str) -> Any:
    """Return the subspace in a file, one concept of it as a LoRA, or the LoRA in a file."""
    from share_diffusion.file import load
    from share_diffusion.lora import LoRA
    from share_diffusion.storage import StorageError

    file, sign, name = place.partition("::")
    if sign:
        return load(Path(file)).lora(name)
    path = Path(file)
    if path.suffix != ".safetensors" or not path.is_file():
        return LoRA.read(path)
    try:
        return load(path, look=True)
    except StorageError as error:
        try:
            return LoRA.read(path)
        except ValueError as other:
            raise ValueError(f"{path} is neither a subspace file ({error}) nor a LoRA ({other})") from None
