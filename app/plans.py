"""Drawings of many pictures as lists of wishes: with and without a concept, sweeps and strips.

Every cell is an ordinary wish, so that it is drawn in one batch with the others, kept in the history with its own
settings, and restored like any other picture.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from app.wish import MOST_WEIGHT, Wish, number
from app.words import WORDS
from share_diffusion.blend import Blend
from share_diffusion.drawing import Sampling
from share_diffusion.grid import SEED, Axis, Cell, Grid, spread

MOST_CELLS = 64


@dataclass(frozen=True)
class Plan:
    """Wishes row by row, with the labels of columns and rows."""

    wishes: Sequence[Wish]
    columns: Sequence[str]
    rows: Sequence[str]


def with_and_without(wish: Wish, concept: str | None) -> Plan:
    """Return the plan of two pictures that differ by one concept alone."""
    blend = Blend.parse(wish.blend)
    if not concept:
        raise ValueError(WORDS.pair_choose)
    if concept not in blend.names:
        raise ValueError(f"{concept!r} is not in the blend; add it to the blend first")
    without = wish.changed(blend=str(blend.without(concept)), count=1)
    return Plan([wish.changed(count=1), without], [f"with {concept}", f"without {concept}"], [""])


def axis_of(wish: Wish, what: str, low: Any, high: Any, count: Any) -> Axis:
    """Return an axis of weights from `low` to `high`, or of seeds from the wish's own."""
    cells = int(number("cells of an axis", count, 1, MOST_CELLS))
    if what == SEED:
        return Axis(SEED, tuple(float(wish.seed + index) for index in range(cells)))
    ends = [number(f"weight of {what!r}", value, -MOST_WEIGHT, MOST_WEIGHT) for value in (low, high)]
    return Axis(what, tuple(spread(ends[0], ends[1], cells)))


def sweep_plan(wish: Wish, x: Axis, y: Axis) -> Plan:
    """Return the plan of a sweep: `x` changes from column to column, `y` from row to row."""
    if x.what == y.what:
        raise ValueError(f"both axes are {x.what!r}; let them change different things")
    if len(x.values) * len(y.values) > MOST_CELLS:
        raise ValueError(f"{len(x.values)} x {len(y.values)} cells are too many; at most {MOST_CELLS}")
    wishes = []
    for down in y.values:
        blend, seed = y.apply(Blend.parse(wish.blend), wish.seed, down)
        for across in x.values:
            cell, cell_seed = x.apply(blend, seed, across)
            wishes.append(wish.changed(blend=str(cell), seed=cell_seed, count=1))
    return Plan(wishes, [x.label(value) for value in x.values], [y.label(value) for value in y.values])


def strip_plan(wish: Wish, start: str, end: str, count: Any) -> Plan:
    """Return the plan of a strip: from one blend to another in equal steps of their weights, at one seed."""
    places = spread(0.0, 1.0, int(number("pictures of a strip", count, 2, MOST_CELLS)))
    ends = Blend.parse(start), Blend.parse(end)
    wishes = [wish.changed(blend=str(Blend.between(*ends, place)), count=1) for place in places]
    return Plan(wishes, [f"{100 * place:.0f} %" for place in places], [""])


def grid_of(plan: Plan, pictures: Sequence[Image.Image], facts: dict[str, Any]) -> Grid:
    """Return the finished pictures of a plan as a grid."""
    first = plan.wishes[0]
    sampling = Sampling(first.steps, first.guidance_scale, first.negative_prompt, first.width, first.height)
    cells = [Cell(picture, Blend.parse(wish.blend), wish.seed) for wish, picture in zip(plan.wishes, pictures, strict=True)]
    return Grid(cells, plan.columns, plan.rows, first.prompt, sampling, facts)


def write_grid(grid: Grid, folder: Path, *, film: bool = False) -> tuple[Path, Path | None]:
    """Write the labelled sheet, and the film of a strip, under a name of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    sheet = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}.png"
    grid.save(sheet)
    if not film:
        return sheet, None
    grid.save_gif(sheet.with_suffix(".gif"))
    return sheet, sheet.with_suffix(".gif")
