"""Versions, device, what is missing and how to get it."""

from __future__ import annotations

import argparse

HELP = "versions, device, what is missing and how to get it"


def flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""


def run(arguments: argparse.Namespace) -> None:
    """Print versions, the device, and what is missing."""
    from share_diffusion.doctor import examine

    print(examine())
