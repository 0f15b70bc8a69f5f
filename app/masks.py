"""Painted regions as small pictures in text, so that a picture can carry the regions it was drawn with."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping

from PIL import Image

SIDE = 64
MOST_TEXT = 8_192


def write_mask(mask: Image.Image) -> str:
    """Return a mask (white acts, black does not) as text: a PNG of at most 64 pixels a side, in base64."""
    small = mask.convert("L")
    small.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    file = io.BytesIO()
    small.quantize(8).convert("L").save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def read_mask(text: str) -> Image.Image:
    """Return the mask that a text holds, or raise ValueError."""
    if len(text) > MOST_TEXT:
        raise ValueError(f"a painted region has {len(text):,} characters; at most {MOST_TEXT:,} are read")
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=("PNG",)) as image:
            if max(image.size) <= SIDE:
                return image.convert("L")
    except Image.DecompressionBombError:
        pass
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError("a painted region cannot be read; paint it again") from error
    raise ValueError(f"a painted region has more than {SIDE} x {SIDE} pixels, the most that are read; paint it again")


def read_masks(masks: Mapping[str, str]) -> dict[str, Image.Image]:
    """Return masks by name."""
    return {name: read_mask(text) for name, text in masks.items()}
