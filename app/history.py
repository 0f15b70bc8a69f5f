"""Pictures drawn before, on disk. A picture carries its own settings, so the folder is the record and needs no index."""

from __future__ import annotations

import base64
import io
import re
import secrets
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from share_diffusion.drawing import png_info, read_settings, save_png

NAME = re.compile(r"\d{8}-\d{6}-\d{6}-[0-9a-f]{4}")
THUMBNAIL = 128


class History:
    """A folder of PNG files that only this page writes; a picture's id is its file name without the ending."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, picture: Image.Image, prompt: str, seed: int, sampling: Any, blend: str, facts: dict[str, Any]) -> str:
        """Write a picture with its settings inside and return its id."""
        now = time.time()
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
        name = f"{stamp}-{int(now % 1 * 1e6):06d}-{secrets.token_hex(2)}"
        save_png(picture, self.folder / f"{name}.png", png_info(prompt, seed, sampling, blend, facts))
        return name

    def ids(self) -> list[str]:
        """Return the ids of all pictures, newest first."""
        found = (path.stem for path in self.folder.glob("*.png"))
        return sorted((name for name in found if NAME.fullmatch(name)), reverse=True)

    def path(self, name: str) -> Path:
        """Return a picture's file; an id that is not one of ours is a ValueError."""
        if not self.holds(name):
            raise ValueError("this picture is not in the history any more; reload the page")
        return self.folder / f"{name}.png"

    def holds(self, name: str) -> bool:
        """Whether an id is that of a picture that is still there."""
        return isinstance(name, str) and NAME.fullmatch(name) is not None and (self.folder / f"{name}.png").is_file()

    def settings(self, name: str) -> dict[str, Any]:
        """Return the settings inside a picture; a damaged one has none."""
        path = self.path(name)
        try:
            return read_settings(path)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            return {}

    def remove(self, name: str) -> None:
        """Delete a picture for good, the copies that the page served of it as well."""
        self.path(name).unlink()
        for copy in (self.folder.parent / "uploads").glob(f"*/{name}.*"):
            copy.unlink(missing_ok=True)

    def page(self, number: int, size: int) -> tuple[list[dict[str, Any]], int]:
        """Return the tiles of a page of pictures, newest first, and how many pages there are."""
        names = self.ids()
        pages = max(1, -(-len(names) // size))
        number = min(max(0, number), pages - 1)
        return [self.tile(name) for name in names[number * size : (number + 1) * size]], pages

    def tile(self, name: str) -> dict[str, Any]:
        """Return what a tile shows of a picture."""
        picture, prompt, note = read_tile(str(self.path(name)))
        return {"id": name, "title": prompt, "note": note, "picture": picture}


@lru_cache(maxsize=2048)
def read_tile(path: str) -> tuple[str, str, str]:
    """Return a picture's thumbnail as a data address, its prompt and its blend."""
    try:
        settings = read_settings(path)
        with Image.open(path) as image:
            picture = thumbnail(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return "", "a damaged picture", ""
    return picture, str(settings.get("prompt", "")).strip()[:200] or "no prompt", str(settings.get("blend", ""))[:120]


def thumbnail(image: Image.Image, side: int = THUMBNAIL) -> str:
    """Return a small JPEG of a picture as a data address."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
