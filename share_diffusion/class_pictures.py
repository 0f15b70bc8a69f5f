"""Pictures of a concept's class, drawn by the untouched base, so that learning one cat does not make every cat that one.

    data/class/a-photo-of-a-cat-1f0c93ab/class-00000.png ...

Picture i is drawn at seed i, so that a folder completed in two sittings is the folder completed in one. The digest is of
the prompt, the base and the size: pictures that another base drew, or of another size, are another class.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from share_diffusion.data import PICTURES
from share_diffusion.drawing import BATCH, Sampling, generate, save_png

NAME = re.compile(r"class-(\d+)\.png")  # of a picture that was drawn here


def class_folder(prompt: str, base: str, side: int, root: Path = Path("data/class")) -> Path:
    """Return where the pictures of a class that a base draws at a size lie unless another folder is named."""
    words = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFC", prompt).lower()).strip("-")[:60].strip("-")
    digest = hashlib.sha256(json.dumps([prompt, base, side]).encode()).hexdigest()[:8]
    return root / f"{words or 'class'}-{digest}"


def drawn_pictures(folder: Path) -> list[Path]:
    """Return the pictures in a folder that were drawn here; their names say nothing of what they show."""
    return [path for path in folder.glob("class-*.png") if NAME.fullmatch(path.name)]


def missing_pictures(folder: Path, count: int) -> list[int]:
    """Return the numbers of the pictures still to be drawn, so that the folder holds `count`; other pictures count too."""
    there = [path for path in folder.iterdir() if path.suffix.lower() in PICTURES] if folder.is_dir() else []
    numbers = {int(match[1]) for path in there if (match := NAME.fullmatch(path.name))}
    free = (number for number in range(len(there) + count) if number not in numbers)
    return [next(free) for _ in range(count - len(there))]


def draw_class(
    pipeline: Any,
    folder: Path,
    prompt: str,
    count: int,
    side: int | None = None,
    progress: Callable[[int], None] | None = None,
    batch: int = BATCH,
) -> int:
    """Draw what is missing of `count` pictures of a prompt, `batch` at a time, and return how many were drawn."""
    numbers = missing_pictures(folder, count)
    for start in range(0, len(numbers), batch):
        some = numbers[start : start + batch]
        pictures = generate(pipeline, [prompt] * len(some), some, Sampling(width=side, height=side))
        for number, picture in zip(some, pictures, strict=True):
            save_png(picture, folder / f"class-{number:05d}.png")
        if progress is not None:
            progress(start + len(some))
    return len(numbers)
