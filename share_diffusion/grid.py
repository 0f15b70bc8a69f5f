"""Sweeps and strips: many blends of one prompt in few forwards, on a labelled sheet, and each cell with its settings.

    sweep   x is the weight of one concept, y that of another one or the seed
    strip   from one blend to the next, in equal steps of their weights

Every cell has a blend of its own, so a batch draws as many cells as it has samples.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from share_diffusion.attached import AttachedSubspace
from share_diffusion.blend import Blend, written
from share_diffusion.drawing import BATCH, Sampling, generate, png_info, save_png, save_whole
from share_diffusion.sheet import FAINT, GAP, INK, PAPER

SEED = "seed"
MOST = 1024
SEEDS = 2**53  # up to which an axis, whose values are floats, tells whole numbers apart
AXIS = re.compile(r"\s*(?P<what>[^=]+?)\s*=\s*(?P<values>.+?)\s*")
RANGE = re.compile(r"(?P<low>[^./,]*(?:\.\d+)?)\.\.(?P<high>[^/,]+?)/(?P<count>\d+)")


@dataclass(frozen=True)
class Axis:
    """What changes along one side of a sweep: the weight of a concept, or the `seed`."""

    what: str
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.values) <= MOST:
            raise ValueError(f"axis {self.what!r} has {len(self.values)} values; it has 1 to {MOST}")
        if not all(map(math.isfinite, self.values)):
            raise ValueError(f"axis {self.what!r} has values that are no numbers: {', '.join(map(str, self.values[:8]))}")
        if self.what == SEED and any(value != int(value) or not 0 <= value < SEEDS for value in self.values):
            raise ValueError(f"seeds are whole numbers from 0 to 2**53, got {', '.join(map(written, self.values[:8]))}")

    @classmethod
    def parse(cls, text: str) -> Axis:
        """Read `robot=0,0.5,1`, `robot=-1..1/5` (five values) or `seed=0..3/4`."""
        match = AXIS.fullmatch(text)
        if match is None:
            raise ValueError(f"axis {text!r} is not understood; write robot=0,0.5,1 or robot=-1..1/5 or seed=0,1,2")
        try:
            if span := RANGE.fullmatch(match["values"]):
                low, high, count = float(span["low"]), float(span["high"]), int(span["count"])
                if not 1 <= count <= MOST:
                    raise ValueError(f"axis {text!r} has {count} values; it has 1 to {MOST}")
                return cls(match["what"].strip('"'), tuple(spread(low, high, count)))
            return cls(match["what"].strip('"'), tuple(float(value) for value in match["values"].split(",")))
        except ValueError as error:
            if "axis" in str(error) or "seeds" in str(error):
                raise
            raise ValueError(f"axis {text!r}: {error}; write robot=0,0.5,1 or robot=-1..1/5") from None

    def apply(self, blend: Blend, seed: int, value: float) -> tuple[Blend, int]:
        """Return blend and seed at a value of the axis."""
        return (blend, int(value)) if self.what == SEED else (blend.with_weight(self.what, value), seed)

    def label(self, value: float) -> str:
        """Return what stands beside a row or above a column."""
        return f"{self.what} {int(value) if self.what == SEED else written(round(value, 4))}"


@dataclass(frozen=True)
class Cell:
    """One picture of a grid, its blend and its seed."""

    picture: Image.Image
    blend: Blend
    seed: int


def fitted(text: str, width: int, draw: ImageDraw.ImageDraw, font: Any) -> str:
    """Return a text in one line that is not wider than so many pixels, shortened in its middle: names end in what tells."""
    text = " ".join(text.split())
    for kept in range(len(text), 0, -1):
        shown = text if kept == len(text) else f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
        if draw.textlength(shown, font=font) <= width:
            return shown
    return ""


@dataclass(frozen=True)
class Grid:
    """Cells row by row, the labels of columns and rows, and what all cells have in common."""

    cells: Sequence[Cell]
    columns: Sequence[str]
    rows: Sequence[str]
    prompt: str
    sampling: Sampling
    facts: Mapping[str, Any] = field(default_factory=dict)

    def settings(self, cell: Cell) -> dict[str, Any]:
        """Return everything that draws one cell again."""
        return {
            "prompt": self.prompt,
            "blend": str(cell.blend),
            "seed": cell.seed,
            **asdict(self.sampling),
            **self.facts,
        }

    def sheet(self, side: int = 160) -> Image.Image:
        """Return one labelled picture of all cells."""
        first = self.cells[0].picture
        size = max(side, first.width), max(side, first.width) * first.height // first.width
        top, left = 26 * (1 + bool(any(self.columns))), 150 if any(self.rows) else GAP
        sheet = Image.new("RGB", (left + len(self.columns) * (size[0] + GAP), top + len(self.rows) * (size[1] + GAP)), PAPER)
        draw = ImageDraw.Draw(sheet)
        large, small = ImageFont.load_default(14), ImageFont.load_default(12)
        draw.text((GAP, 6), fitted(self.prompt, sheet.width - 2 * GAP, draw, large), fill=INK, font=large)
        for column, label in enumerate(self.columns):
            text = fitted(label, size[0], draw, small)
            draw.text((left + column * (size[0] + GAP), 30), text, fill=FAINT, font=small)
        for row, label in enumerate(self.rows):
            text = fitted(label, left - 2 * GAP, draw, small)
            draw.text((GAP, top + row * (size[1] + GAP) + 4), text, fill=FAINT, font=small)
        method = Image.Resampling.NEAREST if first.width < side else Image.Resampling.LANCZOS
        for number, cell in enumerate(self.cells):
            row, column = divmod(number, len(self.columns))
            place = left + column * (size[0] + GAP), top + row * (size[1] + GAP)
            sheet.paste(cell.picture.convert("RGB").resize(size, method), place)
        return sheet

    def info(self) -> PngInfo:
        """Return the common settings and every cell's own as PNG text."""
        shared = {"prompt": self.prompt, **asdict(self.sampling), **self.facts}
        cells = [{"blend": str(cell.blend), "seed": cell.seed} for cell in self.cells]
        info, sides = PngInfo(), {"columns": list(self.columns), "rows": list(self.rows)}
        info.add_itxt("share", json.dumps({**shared, **sides, "cells": cells}, ensure_ascii=False, sort_keys=True))
        return info

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the labelled sheet as a PNG with all settings inside."""
        save_png(self.sheet(), path, self.info())

    def save_frames(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write every cell as frame-000.png, frame-001.png, ..., each with its own settings, ready to become a film."""
        paths = [Path(folder) / f"frame-{number:03d}.png" for number in range(len(self.cells))]
        for path, cell in zip(paths, self.cells, strict=True):
            save_png(cell.picture, path, png_info(self.prompt, cell.seed, self.sampling, str(cell.blend), dict(self.facts)))
        return paths

    def save_gif(self, path: str | os.PathLike[str], milliseconds: int = 120, side: int = 256) -> None:
        """Write the cells as a film that runs there and back."""
        frames = [cell.picture.convert("RGB") for cell in self.cells]
        grown = [frame.resize((side, side * frame.height // frame.width), Image.Resampling.LANCZOS) for frame in frames]
        film = [*grown, *grown[-2:0:-1]]
        more: dict[str, Any] = {"append_images": film[1:], "duration": milliseconds, "loop": 0}
        save_whole(path, lambda part: film[0].save(part, format="GIF", save_all=True, **more))


def sweep(
    pipeline: Any,
    handle: AttachedSubspace,
    prompt: str,
    blend: Blend | str,
    x: Axis,
    y: Axis | None = None,
    *,
    seed: int = 0,
    sampling: Sampling | None = None,
    masks: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Grid:
    """Draw a blend with what the axes say changed in every cell; `progress` hears how many cells are done."""
    if y is not None and y.what == x.what:
        raise ValueError(f"both axes are {x.what!r}; let them change different things")
    if len(x.values) * len(y.values if y else (0,)) > MOST:
        raise ValueError(f"{len(x.values)} x {len(y.values) if y else 1} cells are too many; at most {MOST}")
    start, plans = Blend.of(blend), []
    for down in y.values if y else (0.0,):
        row = y.apply(start, seed, down) if y else (start, seed)
        plans += [x.apply(*row, across) for across in x.values]
    sampling = (sampling or Sampling()).resolved(pipeline)
    cells = draw_cells(pipeline, handle, prompt, plans, sampling, masks, progress)
    rows = [y.label(value) for value in y.values] if y else [""]
    return Grid(cells, [x.label(value) for value in x.values], rows, prompt, sampling, dict(facts or {}))


def strip(
    pipeline: Any,
    handle: AttachedSubspace,
    prompt: str,
    blends: Sequence[Blend | str],
    count: int = 8,
    *,
    seed: int = 0,
    sampling: Sampling | None = None,
    masks: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Grid:
    """Draw `count` pictures on the way from the first blend through all others to the last, ends included."""
    stations = [Blend.of(blend) for blend in blends]
    if len(stations) < 2 or not len(stations) <= count <= MOST:
        raise ValueError(f"a strip has two blends or more and {len(stations)} to {MOST} pictures; got {count} pictures")
    plans, labels = [], []
    for place in spread(0, len(stations) - 1, count):
        station = min(int(place), len(stations) - 2)
        plans.append((Blend.between(stations[station], stations[station + 1], place - station), seed))
        labels.append(f"{100 * place / (len(stations) - 1):.0f} %")
    sampling = (sampling or Sampling()).resolved(pipeline)
    cells = draw_cells(pipeline, handle, prompt, plans, sampling, masks, progress)
    return Grid(cells, labels, [""], prompt, sampling, dict(facts or {}))


def draw_cells(
    pipeline: Any,
    handle: AttachedSubspace,
    prompt: str,
    plans: Sequence[tuple[Blend, int]],
    sampling: Sampling,
    masks: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Cell]:
    """Draw one picture per (blend, seed), a batch at a time; the handle's blends are afterwards what they were."""
    before, before_masks = list(handle.blends), handle.active.masks
    cells: list[Cell] = []
    try:
        for start in range(0, len(plans), BATCH):
            some = plans[start : start + BATCH]
            handle.set_blends([blend for blend, _ in some], masks=masks)
            pictures = generate(pipeline, [prompt] * len(some), [seed for _, seed in some], sampling)
            cells += [Cell(picture, blend, seed) for picture, (blend, seed) in zip(pictures, some, strict=True)]
            if progress is not None:
                progress(len(cells))
    finally:
        handle.set_blends(before, masks=before_masks)
    return cells


def spread(low: float, high: float, count: int) -> list[float]:
    """Return `count` values in equal steps, ends included."""
    return [low + (high - low) * step / max(1, count - 1) for step in range(count)]
