"""Pictures of a concept's class, drawn by the untouched base, so that learning one cat does not make every cat that one.

    data/class/a-photo-of-a-cat/class-00000.png ...

Picture i is drawn at seed i, so that a folder completed in two sittings is the folder completed in one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from share_diffusion.data import PICTURES
from share_diffusion.drawing import BATCH, Sampling, generate, save_png


def class_folder(prompt: str, root: Path = Path("data/class")) -> Path:
    """Return where a class's pictures lie unless another folder is named."""
    return root / (re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "class")


def missing_pictures(folder: Path, count: int) -> list[int]:
    """Return the numbers of the pictures still to be drawn, so that the folder holds `count`; other pictures count too."""
    there = [path for path in folder.iterdir() if path.suffix.lower() in PICTURES] if folder.is_dir() else []
    numbers = {int(match[1]) for path in there if (match := re.fullmatch(r"class-(\d+)\.png", path.name))}
    free = (number for number in range(len(there) + count) if number not in numbers)
    return [next(free) for _ in range(count - len(there))]


def draw_class(
    pipeline: Any, folder: Path, prompt: str, count: int, side: int | None = None, progress: Callable[[int], None] | None = None
) -> int:
    """Draw what is missing of `count` pictures of a prompt and return how many were drawn."""
    numbers = missing_pictures(folder, count)
    for start in range(0, len(numbers), BATCH):
        some = numbers[start : start + BATCH]
        pictures = generate(pipeline, [prompt] * len(some), some, Sampling(width=side, height=side))
        for number, picture in zip(some, pictures, strict=True):
            save_png(picture, folder / f"class-{number:05d}.png")
        if progress is not None:
            progress(start + len(some))
    return len(numbers)
