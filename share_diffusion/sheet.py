"""Contact sheets: rows of pictures with a label each, prompts above, at a size that a person can look at."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

GAP = 8
LABEL = 190
PAPER, INK, FAINT = (250, 250, 248), (28, 28, 32), (110, 110, 116)


@dataclass(frozen=True)
class Row:
    """One row of a sheet: a label, a fainter second line, pictures, and what was asked for under each (optional)."""

    label: str
    note: str
    pictures: Sequence[Image.Image]
    prompts: Sequence[str] = ()


def contact_sheet(title: str, rows: Sequence[Row], picture_side: int = 160) -> Image.Image:
    """Return one picture of all rows; small pictures are enlarged without smoothing, large ones reduced."""
    columns = max((len(row.pictures) for row in rows), default=1)
    heights = [picture_side + GAP + (prompt_height(row, picture_side)) for row in rows]
    width = LABEL + columns * (picture_side + GAP) + GAP
    sheet = Image.new("RGB", (width, 44 + sum(heights) + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP + 4, 12), title, fill=INK, font=ImageFont.load_default(18))
    top = 44
    for row, height in zip(rows, heights, strict=True):
        draw_row(sheet, draw, row, top, picture_side)
        top += height
    return sheet


def prompt_lines(prompt: str, side: int) -> list[str]:
    """Return a prompt in lines that fit under a picture."""
    return textwrap.wrap(prompt, max(12, side // 6))[:3]


def prompt_height(row: Row, side: int) -> int:
    """Return the room that a row's prompts need."""
    return max((len(prompt_lines(prompt, side)) for prompt in row.prompts), default=0) * 14 + (4 if row.prompts else 0)


def draw_row(sheet: Image.Image, draw: ImageDraw.ImageDraw, row: Row, top: int, side: int) -> None:
    """Draw one row's label, pictures and prompts."""
    draw.text((GAP + 4, top + 6), "\n".join(textwrap.wrap(row.label, 20)), fill=INK, font=ImageFont.load_default(15))
    lines = len(textwrap.wrap(row.label, 20))
    draw.text(
        (GAP + 4, top + 12 + 19 * lines),
        "\n".join(textwrap.wrap(row.note, 27)),
        fill=FAINT,
        font=ImageFont.load_default(12),
    )
    for column, picture in enumerate(row.pictures):
        left = LABEL + column * (side + GAP)
        method = Image.Resampling.NEAREST if picture.width < side else Image.Resampling.LANCZOS
        sheet.paste(picture.convert("RGB").resize((side, side), method), (left, top))
        if column < len(row.prompts):
            text = "\n".join(prompt_lines(row.prompts[column], side))
            draw.text((left + 1, top + side + 2), text, fill=FAINT, font=ImageFont.load_default(11))
