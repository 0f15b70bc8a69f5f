"""Blends in force: which cores every layer gets at a moment of the denoising, for one sample or for each its own.

Where and when a concept acts, a layer of the picture knows; a layer of words does not (text encoders, which run once
before the first step, and the keys and values of cross-attention, which stand at no place). There a concept acts with its
mean over what is not seen: over the steps in a text encoder, over the picture in both. The rule keeps blends linear, and
halves that make a whole are the whole; words at full weight leaked no less and no more in `tests/benchmarks/blending.py`.

    S  samples, 1 where all share a blend    C  columns: the whole picture, then regions    U  rows: concepts in block groups
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from share_diffusion.blend import Blend, Method, Region, Steps, Term
from share_diffusion.concept import unknown_concept
from share_diffusion.cores import CoreTable, known_groups
from share_diffusion.loudness import evened
from share_diffusion.methods import drop_out, elect, equalise, linear, trim, tsv
from share_diffusion.regions import Masks, area

NARROW = (16, 64, 256)  # columns that tokens go through: the first that is no less than the ranks of all that acts

Columns = tuple[tuple[Region | str | None, ...], ...]
Blocks = tuple[tuple[str, float], ...] | None


@dataclass(frozen=True)
class Moment:
    """What acts at one moment: weights (S, C, U) as nested tuples, and each sample's regions."""

    columns: Columns
    weights: tuple[tuple[tuple[float, ...], ...], ...]

    @property
    def regional(self) -> bool:
        """Whether any concept acts in a region only."""
        return len(self.columns[0]) > 1


class Active:
    """Blends, one for all samples or one for each, against a table of cores."""

    def __init__(self, blends: Sequence[Blend], table: CoreTable, masks: Mapping[str, Tensor]) -> None:
        self.blends, self.table, self.masks = list(blends), table, Masks(masks)
        refuse_unknown(self.blends, table, self.masks)
        self.terms = [[term for term in blend.terms if term.weight] for blend in self.blends]
        keys = [[row_key(term, blend) for term in terms] for blend, terms in zip(self.blends, self.terms, strict=True)]
        self.keys = {key: index for index, key in enumerate(dict.fromkeys(key for some in keys for key in some))}
        self.places = [[self.keys[key] for key in some] for some in keys]
        self.touched = [table.touched(Term(name, 1.0, blocks)) for name, blocks, _ in self.keys]
        self.rows = torch.stack([self.row(*key) for key in self.keys]) if self.keys else torch.zeros(0, table.width)
        regions = {term.region for terms in self.terms for term in terms if term.region}
        self.areas: dict[Region | str | None, float] = {region: area(region, self.masks) for region in regions}
        self.areas |= {None: 1.0, "": 0.0}

    @property
    def changing(self) -> bool:
        """Whether the cores change during the denoising."""
        every = [term for terms in self.terms for term in terms]
        return any(term.steps or (term.region and (term.region.start, term.region.end) != (0, 1)) for term in every)

    @property
    def regional(self) -> bool:
        """Whether some concept acts in a region only."""
        return any(term.region for terms in self.terms for term in terms)

    def row(self, name: str, blocks: Blocks, preparation: tuple) -> Tensor:
        """Return a row (N) as its blend's method prepares it, times its block groups' factors."""
        row = self.table.row(name)
        match preparation:
            case ("norm-equalised", *names):
                row = equalise(torch.stack([self.table.row(other) for other in names]))[names.index(name)]
            case ("loss-equalised", strength, *names):
                row = row * evened([self.table.subspace[other] for other in names], strength)[name]
            case ("ties", density):  # of what the concept holds: rows for what others hold are zeros, and no part of it
                row = trim(row[None], density * self.table.held(name) / max(self.table.width, 1))[0]
            case ("dare", drop, seed):
                row = drop_out(row[None], drop, self.table.drawn(name, f"{seed:g}/{name}")[None])[0]
        factors = self.table.factors(Term(name, 1.0, blocks))
        return row if factors is None else row * factors

    def moment(self, progress: float | None) -> Moment:
        """Return what acts at a point of the denoising, or (None) in a text encoder before it."""
        columns, weights = [], []
        for terms, places in zip(self.terms, self.places, strict=True):
            regions: dict[Region | None, list[float]] = {None: [0.0] * len(self.keys)}
            for term, place in zip(terms, places, strict=True):
                region, weight = self.seen(term, progress)
                regions.setdefault(region, [0.0] * len(self.keys))[place] += weight
            columns.append(list(regions))
            weights.append(list(regions.values()))
        most = max(map(len, columns))
        empty = [0.0] * len(self.keys)
        return Moment(
            tuple((*some, *[""] * (most - len(some))) for some in columns),
            tuple(tuple(map(tuple, [*some, *[empty] * (most - len(some))])) for some in weights),
        )

    def seen(self, term: Term, progress: float | None) -> tuple[Region | None, float]:
        """Return where a term acts at a point of the denoising, and its weight there."""
        region, weight = term.region, term.weight
        if progress is None:
            steps = term.steps or Steps()
            inside = 0.0 if region is None else steps.integral(region.start, region.end) * (1 - self.areas[region])
            return None, weight * (steps.mean - inside)
        if region is not None and not region.start <= progress < region.end:
            region = None
        return region, weight * (term.steps.at(progress) if term.steps else 1.0)

    def layers(self, moment: Moment) -> set[str]:
        """Return the layers that anything acts on at a moment."""
        rows = {u for columns in moment.weights for column in columns for u, weight in enumerate(column) if weight}
        return set().union(*(self.touched[u] for u in rows))

    @property
    def rank(self) -> int | None:
        """Return a bound on the rank of all of a layer's cores together, None where nothing is known of it.

        It counts every concept of the blends, whenever it acts, and is one of a few steps and not exact, so that shapes, and
        what was compiled for them, stay through a drawing and when a slider moves between values other than 0.
        """
        if any(blend.method is not None and blend.method.name in ("ties", "dare", "tsv") for blend in self.blends):
            return None  # they merge entry by entry
        ranks = sum(self.table.subspace[name].pseudo_rank for name in {name for name, _, _ in self.keys})
        return next((step for step in NARROW if ranks <= step), None)

    def shares(self, moment: Moment) -> Tensor:
        """Return the share of the picture of every column, (S, C)."""
        return torch.tensor([[self.areas[region] for region in some] for some in moment.columns])

    def flat(self, moment: Moment, start: int, stop: int) -> Tensor:
        """Return the merged cores at a moment, (S, C, stop - start), of one part of the row."""
        weights, rows = torch.tensor(moment.weights), self.rows[:, start:stop]
        if all(blend.method is None or blend.method.name not in ("ties", "tsv") for blend in self.blends):
            return (weights.flatten(0, 1) @ rows).unflatten(0, weights.shape[:2])
        return torch.stack(
            [
                torch.stack([self.merged(blend.method, rows, column, start) for column in columns])
                for blend, columns in zip(self.blends, weights, strict=True)
            ]
        )

    def merged(self, method: Method | None, rows: Tensor, weights: Tensor, start: int) -> Tensor:
        """Return rows merged by a method with weights (U); a row of weight 0 is absent."""
        present = weights != 0
        rows, weights = rows[present], weights[present]
        if method is None or method.name not in ("ties", "tsv") or len(rows) == 0:
            return linear(rows, weights)
        if method.name == "ties":
            return elect(rows, weights)
        parts = [rows.new_zeros(0)]
        for stack in self.table.stacks:
            if stack.stop > stack.start and start <= stack.start < start + rows.shape[1]:
                cores = rows[:, stack.start - start : stack.stop - start].unflatten(1, (len(stack.layers), *stack.shape))
                parts.append(tsv(cores, weights).flatten())
        return torch.cat(parts)


def row_key(term: Term, blend: Blend) -> tuple[str, Blocks, tuple]:
    """Return what tells one row from another: the concept, its block groups and how the blend's method prepares it."""
    method = blend.method
    if method is None or method.name == "tsv":
        return term.name, term.blocks, ()
    if method.name in ("norm-equalised", "loss-equalised"):
        present = sorted({other.name for other in blend.terms if other.weight})
        return term.name, term.blocks, (method.name, *dict(method.options).values(), *present)
    return term.name, term.blocks, (method.name, *dict(method.options).values())


def demanded(term: Term) -> list[str]:
    """Return the block groups that must have layers for a term; beside `all`, a factor for `text` may be moot."""
    groups = [group for group, _ in term.blocks or ()]
    return [group for group in groups if group != "text" or "all" not in groups]


def refuse_unknown(blends: Sequence[Blend], table: CoreTable, masks: Mapping[str, Tensor]) -> None:
    """Raise ValueError for concepts, block groups and masks that are not there, all problems at once."""
    problems, groups = [], known_groups(table.groups.values())
    for name in dict.fromkeys(name for blend in blends for name in blend.names):
        if name not in table.subspace.concepts:
            problems.append(unknown_concept(name, table.subspace.concepts))
    wanted = dict.fromkeys(group for blend in blends for term in blend.terms for group in demanded(term))
    if absent := [group for group in wanted if group not in groups]:
        problems.append(f"no adapted layer is in block group {', '.join(absent)}; there are: {', '.join(groups)}")
    if missing := sorted({name for blend in blends for name in blend.masks if name not in masks}):
        problems.append(f"there is no mask for {', '.join('@' + name for name in missing)}; give masks={{name: picture}}")
    if problems:
        raise ValueError("; ".join(problems))
