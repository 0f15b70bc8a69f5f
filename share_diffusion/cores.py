"""The cores of concepts as rows: one flat row a concept, over all layers, so that a blend is one product.

Layers lie in a row in an order that puts text encoders first and layers of equal shape side by side; within a layer lies
the transposed core C.T (k, k'), as the forward wants it. Rows are made when a concept is first used and kept while there
is room for them, so that a slider moves without touching coefficients again.

    N  entries of a row        T  terms        k, k'  ranks of a layer's bases
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from share_diffusion.blend import Term
from share_diffusion.subspace import Subspace

ROOM = 2**28  # bytes of rows that are kept


@dataclass(frozen=True)
class Stack:
    """Layers of equal shape (k, k') that lie side by side from `start` to `stop`."""

    layers: tuple[str, ...]
    start: int
    stop: int
    shape: tuple[int, int]


class CoreTable:
    """Rows of the concepts of one subspace; `groups` gives every layer's block groups."""

    def __init__(self, subspace: Subspace, groups: Mapping[str, Sequence[str]]) -> None:
        self.subspace, self.groups = subspace, groups
        self.stacks = list(stacked({layer: subspace.layers[layer].rank for layer in groups}))
        self.width = self.stacks[-1].stop if self.stacks else 0
        self.text = max((stack.stop for stack in self.stacks if stack.layers[0].startswith("text_encoder")), default=0)
        self.rows: OrderedDict[str, Tensor] = OrderedDict()

    def row(self, name: str) -> Tensor:
        """Return a concept's row (N)."""
        if name not in self.rows:
            coefficients = self.subspace[name].coefficients
            self.rows[name] = torch.cat(
                [self.cores(stack, coefficients).flatten() for stack in self.stacks] or [torch.empty(0)]
            )
            while len(self.rows) > 1 and 4 * self.width * len(self.rows) > ROOM:
                self.rows.popitem(last=False)
        self.rows.move_to_end(name)
        return self.rows[name]

    def cores(self, stack: Stack, coefficients: Mapping) -> Tensor:
        """Return one concept's transposed cores of a stack, (layers, k, k')."""
        held = [(index, coefficients[layer]) for index, layer in enumerate(stack.layers) if layer in coefficients]
        rank = max((entry.pseudo_rank for _, entry in held), default=0)
        alpha = torch.zeros(len(stack.layers), stack.shape[0], rank)
        beta = torch.zeros(len(stack.layers), stack.shape[1], rank)
        for index, entry in held:
            alpha[index, : entry.alpha.shape[0], : entry.pseudo_rank] = entry.alpha
            beta[index, : entry.beta.shape[0], : entry.pseudo_rank] = entry.beta
        return alpha @ beta.mT

    def factors(self, term: Term) -> Tensor | None:
        """Return the factor of each entry of a row that a term's block groups make, (N), or None for 1 everywhere."""
        if term.blocks is None:
            return None
        each = [term.factor(self.groups[layer]) for stack in self.stacks for layer in stack.layers]
        sizes = [stack.shape[0] * stack.shape[1] for stack in self.stacks for _ in stack.layers]
        return torch.tensor(each).repeat_interleave(torch.tensor(sizes))

    def touched(self, term: Term) -> set[str]:
        """Return the layers that a term changes."""
        held = self.subspace[term.name].coefficients
        return {layer for layer in self.groups if layer in held and term.factor(self.groups[layer]) != 0}

    def split(self, flat: Tensor, start: int = 0) -> Iterator[tuple[str, Tensor]]:
        """Yield each layer with its (..., k, k') of a flat tensor (..., N); `start` is where the flat tensor begins."""
        for stack in self.stacks:
            if start <= stack.start < start + flat.shape[-1]:
                part = flat[..., stack.start - start : stack.stop - start]
                every = part.unflatten(-1, (len(stack.layers), *stack.shape)).unbind(-3)
                yield from zip(stack.layers, every, strict=True)


def stacked(ranks: Mapping[str, tuple[int, int]]) -> Iterator[Stack]:
    """Yield the layers in the order of a row, those of equal rank together."""
    start = 0
    for (_, shape), layers in groupby(
        sorted(ranks, key=lambda layer: order(layer, ranks)), lambda layer: order(layer, ranks)[:2]
    ):
        some = tuple(layers)
        stop = start + len(some) * shape[0] * shape[1]
        yield Stack(some, start, stop, shape)
        start = stop


def order(layer: str, ranks: Mapping[str, tuple[int, int]]) -> tuple[bool, tuple[int, int], str]:
    """Return what layers are sorted by: text encoders first, then rank, then path."""
    return not layer.startswith("text_encoder"), ranks[layer], layer


def known_groups(groups: Iterable[Sequence[str]]) -> list[str]:
    """Return every block group that some layer is in, once."""
    return sorted({group for each in groups for group in each})
