"""What a subspace file holds and what it costs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HELP = "what a subspace file holds and what it costs"


def flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("file", type=Path, help="the subspace file")
    parser.add_argument("--json", action="store_true", help="print JSON with stable keys")


def run(arguments: argparse.Namespace) -> None:
    """Print what a file holds."""
    from share_diffusion.describe import describe, table
    from share_diffusion.file import load

    facts = describe(load(arguments.file, look=True), arguments.file)
    print(json.dumps(facts, indent=1) if arguments.json else table(facts))
