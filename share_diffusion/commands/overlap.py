"""How much the concepts of a file overlap, told before they are blended."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

HELP = "how much concepts overlap, and whether to expect bleed"


def flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("file", type=Path)
    parser.add_argument("names", nargs="*", help="the concepts (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON with stable keys")


def run(arguments: argparse.Namespace) -> None:
    """Print every pair of concepts, the strongest overlap first."""
    from share_diffusion.file import load
    from share_diffusion.loudness import loudest
    from share_diffusion.overlap import overlaps, report

    subspace = load(arguments.file, look=True)
    pairs = overlaps(subspace, arguments.names or None)
    if arguments.json:
        print(json.dumps([{**asdict(pair), "advice": pair.advice} for pair in pairs], indent=1))
        return
    print(report(pairs))
    if uneven := loudest(subspace[name] for name in arguments.names or subspace.concepts):
        loud, quiet, times = uneven
        print(f"{loud} is {times:.1f} times as loud as {quiet}: '| loss-equalised' after a blend evens them out")
