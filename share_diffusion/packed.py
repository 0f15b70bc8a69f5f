"""A concept's coefficients as they lie in a file: one row of numbers, in half precision or in 8 bits.

    row       (n,)    for every layer, in the order of the layer list, alpha (k, p) and then beta (k', p), row by row
    scales    (s,)    bfloat16, in 8 bits only: for every layer the p columns of alpha and then those of beta

In half precision a value is a number in units of sqrt(norm). In 8 bits it is a whole number from -127 to 127 that its
column's scale (in units of sqrt(norm)) stretches; the largest of a column is always 127 or -127, so that reading and
rounding again gives the same bits. Rounding to 8 bits costs some 0.00007 of a concept's energy, which `settled` takes off
its retention.

8 bits are for columns that never change, of a seed, the base's weights or measurements: there a file is mostly coefficients.
Where columns are learned they take most of a file, a merge may rotate the coefficients again and again, and half precision
costs little.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from share_diffusion.basis import WORK, Coefficients
from share_diffusion.concept import Concept

STEPS = 127  # of 8 bits, to either side
SCALE_BYTES = torch.bfloat16.itemsize
Places = Mapping[str, tuple[int, int, int]]  # layer -> rows of alpha, rows of beta, pseudo-rank


@dataclass(frozen=True, eq=False)
class Packed(Mapping[str, Coefficients]):
    """Coefficients by layer, cut out of their packed form when one is first asked for.

    A file of 10,000 concepts is read in a second that way: who draws needs two of them.
    """

    row: Tensor
    scales: Tensor | None
    unit: float
    places: Places

    def __post_init__(self) -> None:
        counts = [(self.row, sum((alpha + beta) * rank for alpha, beta, rank in self.places.values()))]
        if self.scales is not None:
            counts.append((self.scales, sum(2 * rank for _, _, rank in self.places.values())))
        if wrong := [f"{found.numel()} where {count} belong" for found, count in counts if found.numel() != count]:
            raise IndexError(f"coefficients and layout disagree: {', '.join(wrong)}")

    @cached_property
    def entries(self) -> dict[str, Coefficients]:
        """All of them, cut."""
        sides = [(rows, rank) for alpha, beta, rank in self.places.values() for rows in (alpha, beta)]
        values = self.row.float().split([rows * rank for rows, rank in sides])
        matrices = [part.reshape(size) for part, size in zip(values, sides, strict=True)]
        if self.scales is not None:
            scales = self.scales.float().split([rank for _, rank in sides])
            matrices = [matrix * scale for matrix, scale in zip(matrices, scales, strict=True)]
        pairs = zip(self.places, matrices[::2], matrices[1::2], strict=True)
        return {layer: Coefficients(alpha * self.unit, beta * self.unit) for layer, alpha, beta in pairs}

    def __getitem__(self, layer: str) -> Coefficients:
        return self.entries[layer]

    def __contains__(self, layer: object) -> bool:
        return layer in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def packed(coefficients: Mapping[str, Coefficients], norm: float, eight_bits: bool, what: str) -> Packed:
    """Return coefficients as they are stored; raises ValueError, naming `what`, where they leave the range of float16."""
    unit = unit_of(norm)
    places = {layer: entry for layer, entry in sorted(layout_of(coefficients).items()) if entry[2]}
    sides = [side / unit for layer in places for side in (coefficients[layer].alpha, coefficients[layer].beta)]
    if not eight_bits:
        return Packed(half(torch.cat([side.flatten() for side in sides] or [torch.zeros(0)]), what), None, unit, places)
    scales = [(side.abs().amax(0) / STEPS).to(torch.bfloat16) for side in sides]
    whole = [
        (side / torch.where(scale > 0, scale, 1).float()).round().clamp(-STEPS, STEPS).to(torch.int8).flatten()
        for side, scale in zip(sides, scales, strict=True)
    ]
    none = torch.zeros(0)
    return Packed(torch.cat(whole or [none.to(torch.int8)]), torch.cat(scales or [none.to(torch.bfloat16)]), unit, places)


def settled(concept: Concept, eight_bits: bool) -> Concept:
    """Return the concept as a file gives it back, to the last bit; one that was read from a file is that already.

    Its retention is lowered by what rounding to 8 bits may have cost: losses need not be orthogonal, so their norms add.
    """
    norm = float(f"{concept.norm:.6g}")
    if isinstance(concept.coefficients, Packed) and concept.coefficients.unit == unit_of(norm):
        return concept
    stored = packed(concept.coefficients, norm, eight_bits, concept.name)
    if not eight_bits or not norm:
        return replace(concept, coefficients=stored)
    lost = (1 - concept.retention) ** 0.5 + distance(concept.coefficients, stored) / norm
    return replace(concept, coefficients=stored, retention=max(0.0, 1 - lost**2))


def distance(one: Mapping[str, Coefficients], other: Mapping[str, Coefficients]) -> float:
    """Return the Frobenius norm of the difference of two concepts' cores over all layers."""
    gaps = (one[layer].core().to(WORK) - other[layer].core().to(WORK) for layer in one)
    return sum(float(gap.square().sum()) for gap in gaps) ** 0.5


def stored_bytes(concept: Concept, eight_bits: bool) -> int:
    """Return the bytes of a concept's coefficients in a file, scales included; `eight_bits` is how it would be written."""
    held = concept.coefficients
    if isinstance(held, Packed):
        eight_bits = held.scales is not None
    columns = sum(2 * entry[2] for entry in layout_of(held).values())
    return concept.numbers + SCALE_BYTES * columns if eight_bits else torch.float16.itemsize * concept.numbers


def layout_of(coefficients: Mapping[str, Coefficients]) -> Places:
    """Return rows of alpha, rows of beta and pseudo-rank of the layers that a concept changes."""
    if isinstance(coefficients, Packed):
        return coefficients.places
    return {layer: sizes_of(entry) for layer, entry in coefficients.items()}


def sizes_of(entry: Coefficients) -> tuple[int, int, int]:
    """Return rows of alpha, rows of beta and pseudo-rank."""
    return entry.alpha.shape[0], entry.beta.shape[0], entry.pseudo_rank


def unit_of(norm: float) -> float:
    """Return what a concept's coefficients are stored in: then float16 holds those of any scale."""
    return norm**0.5 or 1.0


def half(tensor: Tensor, what: str) -> Tensor:
    """Return a tensor as it is stored, or raise ValueError where it leaves the range of float16."""
    stored = tensor.to(torch.float16).clone(memory_format=torch.contiguous_format)
    if not torch.isfinite(stored).all():
        raise ValueError(f"{what}: values up to {float(tensor.abs().max()):.3g} do not fit float16; train with a lower rate")
    return stored
