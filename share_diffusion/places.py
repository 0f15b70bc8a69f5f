"""Where files are to lie: what is there of the way to a place, and why a file could not be written at it."""

from __future__ import annotations

import os
from pathlib import Path

LONGEST_NAME = 230  # bytes of a file's name: most file systems take 255, and a file in the making has a longer one


def nearest(place: str | os.PathLike[str]) -> Path:
    """Return the place, or the nearest of what it lies in, that is there; a link that leads nowhere is there."""
    target = Path(place).absolute()
    return next(path for path in (target, *target.parents) if os.path.lexists(path))


def file_problem(path: str | os.PathLike[str]) -> str | None:
    """Return why a file cannot be written here, as far as can be told before there is anything to write, or None."""
    target = Path(path).absolute()
    if target.is_dir():
        return f"{path} is a folder; give a file's name in it"
    above = nearest(target.parent)
    if not above.is_dir():
        return f"{path} cannot be written: {above} is no folder; choose another place"
    if not os.access(above, os.W_OK):
        return f"{path} cannot be written: {above} is not yours to write in; choose another place"
    if (length := len(os.fsencode(target.name))) > LONGEST_NAME:
        return f"{path} cannot be written: its name has {length} bytes, at most {LONGEST_NAME}"
    return None
