"""How much concepts overlap, told before anything is drawn: cosines of their updates, as a whole and per block group.

The cosine of two updates is that of their cores. Concepts that overlap change the same directions; a blend adds them up
there, and what one says shows in the other ("bleed"). Adding cannot take that apart again; regions and steps can.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from share_diffusion.cores import CoreTable
from share_diffusion.models.blocks import block_groups
from share_diffusion.subspace import Subspace

MOST = 256
STRONG, SOME = 0.5, 0.25


@dataclass(frozen=True)
class Overlap:
    """Two concepts, the cosine of their updates (-1 to 1), and the same per block group."""

    one: str
    other: str
    cosine: float
    groups: dict[str, float]

    @property
    def advice(self) -> str:
        """What to expect of the two in one picture."""
        if self.cosine >= STRONG:
            return "expect bleed; give each its own region or its own steps"
        if self.cosine >= SOME:
            return "expect some bleed"
        return "they partly cancel" if self.cosine <= -SOME else "little bleed from their weights"

    def __str__(self) -> str:
        each = ", ".join(f"{group} {100 * cosine:.0f} %" for group, cosine in self.groups.items())
        return f"{self.one} and {self.other} overlap {100 * self.cosine:.0f} % ({each}): {self.advice}"


def overlaps(subspace: Subspace, names: Iterable[str] | None = None) -> list[Overlap]:
    """Return the overlap of every pair of concepts, the strongest first."""
    chosen = [subspace[name].name for name in (subspace.concepts if names is None else dict.fromkeys(names))]
    if len(chosen) > MOST:
        raise ValueError(f"{len(chosen)} concepts make too many pairs; name at most {MOST} of them")
    table = CoreTable(subspace, block_groups(subspace.layers, subspace.base.blocks))
    whole, parts = cosines(table, chosen)
    pairs = [
        Overlap(chosen[i], chosen[j], float(whole[i, j]), {group: float(part[i, j]) for group, part in parts.items()})
        for i, j in combinations(range(len(chosen)), 2)
    ]
    return sorted(pairs, key=lambda pair: -pair.cosine)


def cosines(table: CoreTable, names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the cosines of all pairs (names, names), over all layers and over those of each block group."""
    products: dict[str, Tensor] = {}
    rows = torch.stack([table.row(name) for name in names]) if names else torch.zeros(0, table.width)
    for layer, cores in table.split(rows):
        flat = cores.flatten(1).double()
        group = table.groups[layer][1]
        products[group] = products.get(group, torch.zeros(len(names), len(names), dtype=torch.float64)) + flat @ flat.T
    whole = sum(products.values(), torch.zeros(len(names), len(names), dtype=torch.float64))
    return normalised(whole), {group: normalised(products[group]) for group in sorted(products)}


def normalised(products: Tensor) -> Tensor:
    """Return cosines from scalar products; what has no length has cosine 0 with everything."""
    lengths = products.diagonal().sqrt()
    inverse = torch.where(lengths > 0, 1 / lengths, 0)
    return products * inverse[:, None] * inverse


def report(pairs: Sequence[Overlap]) -> str:
    """Return the pairs as lines."""
    return "\n".join(map(str, pairs)) or "one concept alone overlaps with nothing"
