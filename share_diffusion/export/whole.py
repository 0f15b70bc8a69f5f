"""Several files or a folder, written whole or not at all: prepared in a folder beside their place, then moved into it.

Nothing of an export is seen under its own name before all of it lies on the same disk in full. What was there before
comes back when the moving itself fails. A killed process leaves a folder `.<name>.<hex>.export` beside, which the next
export removes.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex

from share_diffusion.places import nearest

STALE_SECONDS = 24 * 3600


@contextmanager
def staged(folder: Path, *, replace: bool = False, entire: bool = False) -> Iterator[Path]:
    """Yield an empty folder; when the block ends without an error, what lies in it is in `folder`.

    `entire` means that `folder` itself is the export and takes the place of what was there; otherwise files join those
    that are there. Raises ValueError, with everything as it was, where a file is in the way and `replace` is not set.
    """
    target = Path(os.path.realpath(folder))
    home = target.parent if entire or not target.exists() else target
    stage = home / f".{target.name}.{token_hex(4)}.export"
    try:
        home.mkdir(parents=True, exist_ok=True)
        remove_stale(home, target.name)
        stage.mkdir()
        yield stage
        sync(stage)
        install(stage, target, replace, entire)
    except OSError as error:
        raise ValueError(f"cannot write {folder}: {error.strerror or error}; nothing was changed there") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def in_the_way(paths: list[Path], remedy: str = "choose another place") -> None:
    """Raise ValueError with the files that an export would overwrite, if there are any, and what else to do."""
    if taken := [path for path in paths if os.path.lexists(path) and not is_empty_folder(path)]:
        more = f" and {len(taken) - 3} more" if len(taken) > 3 else ""
        raise ValueError(f"{', '.join(map(str, taken[:3]))}{more} is already there; {remedy} or pass --replace")


def is_empty_folder(path: Path) -> bool:
    """Return whether a path is a folder without anything in it."""
    return path.is_dir() and not any(path.iterdir())


def install(stage: Path, target: Path, replace: bool, entire: bool) -> None:
    """Move the staged files to their place; the old ones come back if a move fails."""
    moves = [(stage, target)] if entire else list(pairs(stage, target))
    if not replace:
        in_the_way([place for _, place in moves])
    old = target.parent / f".{target.name}.{token_hex(4)}.export"
    done: list[tuple[Path, Path | None]] = []
    try:
        for number, (source, place) in enumerate(moves):
            place.parent.mkdir(parents=True, exist_ok=True)
            saved = old / str(number) if os.path.lexists(place) else None
            if saved is not None:
                saved.parent.mkdir(exist_ok=True)
                os.replace(place, saved)
            done.append((place, saved))
            os.replace(source, place)
    except BaseException:
        for place, saved in reversed(done):
            restore(place, saved)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def pairs(stage: Path, target: Path) -> Iterator[tuple[Path, Path]]:
    """Yield every staged file with its place."""
    for path in sorted(stage.rglob("*")):
        if path.is_file():
            yield path, target / path.relative_to(stage)


def restore(place: Path, saved: Path | None) -> None:
    """Put back what was in a place, or clear it."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
    if saved is not None:
        os.replace(saved, place)


def remove_stale(home: Path, name: str) -> None:
    """Remove the stages of exports that were killed a day or more ago."""
    for path in home.glob(f".{name}.*.export"):
        if path.is_dir() and time.time() - path.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def sync(stage: Path) -> None:
    """Have every staged file on the disk before it gets its name."""
    for path in stage.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDWR)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def require_room(folder: Path, needed: int) -> None:
    """Raise ValueError before anything is written when the disk cannot hold this many bytes."""
    free = shutil.disk_usage(nearest(folder)).free
    if 0 < free < needed:
        raise ValueError(f"the export takes some {needed:,} bytes and only {free:,} are free; make room or choose another disk")
