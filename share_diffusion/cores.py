"""The cores of concepts as rows: one flat row a concept, over all layers, so that a blend is one product.

Layers lie in a row in an order that puts text encoders first and layers of equal shape side by side; within a layer lies
the transposed core C.T (k, k'), as the forward wants it. Rows are made when a concept is first used and kept while there
is room for them, so that a slider moves without touching coefficients again.

    N  entries of a row        T  terms        k, k'  ranks of a layer's bases
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from share_diffusion.blend import Term
from share_diffusion.subspace import Subspace

ROOM = 2**28  # bytes of rows that are kept
AT_ONCE = 2**22  # numbers that are narrowed at once, in double precision

Factor = Callable[[Tensor, int | None], tuple[Tensor | None, Tensor | None]]


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

    def held(self, name: str) -> int:
        """Return how many entries of its row a concept holds; the others are there for concepts with more columns."""
        held = self.subspace[name].coefficients
        return sum(held[layer].alpha.shape[0] * held[layer].beta.shape[0] for layer in self.groups if layer in held)

    def drawn(self, name: str, seed: str) -> Tensor:
        """Return a number from 0 to 1 for every entry of a concept's row (N), whatever else the subspace holds.

        Each layer has a generator of its own, and what the concept does not hold has 1.
        """
        coefficients, parts = self.subspace[name].coefficients, []
        for stack in self.stacks:
            part = torch.ones(len(stack.layers), *stack.shape)
            for index, layer in enumerate(stack.layers):
                if layer in coefficients:
                    rows, columns = coefficients[layer].alpha.shape[0], coefficients[layer].beta.shape[0]
                    part[index, :rows, :columns] = torch.rand(rows, columns, generator=generator_of(f"{seed}/{layer}"))
            parts.append(part.flatten())
        return torch.cat(parts or [torch.empty(0)])

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
        there = (layer for layer in self.groups if layer in held and min(self.subspace.layers[layer].rank))
        return {layer for layer in there if term.factor(self.groups[layer]) != 0}

    def split(self, flat: Tensor, start: int = 0) -> Iterator[tuple[str, Tensor]]:
        """Yield each layer with its (..., k, k') of a flat tensor (..., N); `start` is where the flat tensor begins."""
        for stack, cores in self.parts(flat, start):
            yield from zip(stack.layers, cores.unbind(-3), strict=True)

    def factored(
        self, flat: Tensor, layers: Collection[str], rank: int | None, start: int, factor: Factor
    ) -> Iterator[tuple[list[str], Tensor | None, Tensor | None]]:
        """Yield some layers of equal shape at a time, with the two factors of their (..., k, k') of a flat tensor (..., N).

        `factor` is `narrow` or `frame`, and `rank` the bound that it takes; no other layer is worked on.
        """
        for stack, cores in self.parts(flat, start):
            chosen = [index for index, layer in enumerate(stack.layers) if layer in layers]
            if chosen:
                some = cores if len(chosen) == len(stack.layers) else cores[..., chosen, :, :]
                yield [stack.layers[index] for index in chosen], *factor(some, rank)

    def parts(self, flat: Tensor, start: int) -> Iterator[tuple[Stack, Tensor]]:
        """Yield the stacks that a flat tensor (..., N) holds from `start` on, with their cores (..., layers, k, k')."""
        for stack in self.stacks:
            if start <= stack.start < start + flat.shape[-1]:
                part = flat[..., stack.start - start : stack.stop - start]
                yield stack, part.unflatten(-1, (len(stack.layers), *stack.shape))


def generator_of(seed: str) -> torch.Generator:
    """Return a generator that starts from words."""
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big")
    return torch.Generator().manual_seed(number)


def narrow(cores: Tensor, rank: int | None) -> tuple[Tensor | None, Tensor | None]:
    """Return cores (layers, k, k') as left (layers, k, r) @ right (layers, r, k'), exact to rounding; None is the identity."""
    k, other = cores.shape[-2:]
    if rank is None or rank >= min(k, other):
        return (cores, None) if other <= k else (None, cores)
    return frame(cores, rank)


def frame(cores: Tensor, rank: int | None) -> tuple[Tensor | None, Tensor]:
    """Return cores (..., layers, k, k') as left (layers, k, r) @ rest (..., layers, r, k'), exact to rounding.

    `rank` bounds the rank of all of a layer's cores side by side, C (k, n). Where it is below k, left is an orthonormal
    basis Q of C @ omega with r random columns omega, which spans what C spans (Halko, Martinsson and Tropp 2011, section 4),
    and the rest is Q.T @ C; otherwise left is the identity, told as None.
    """
    if rank is None or rank >= cores.shape[-2]:
        return None, cores
    each = max(1, AT_ONCE // max(1, cores.numel() // cores.shape[-3]))
    parts = [spanned(some, rank) for some in cores.split(each, dim=-3)]
    return torch.cat([left for left, _ in parts]), torch.cat([rest for _, rest in parts], dim=-3)


def spanned(cores: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return left and rest of a few layers' cores, worked out in double precision: r random columns may lie badly."""
    double = cores.double()
    beside = double.reshape(math.prod(double.shape[:-3]), *double.shape[-3:]).permute(1, 2, 0, 3).flatten(2)  # (layers, k, n)
    omega = torch.randn(beside.shape[-1], rank, generator=torch.Generator().manual_seed(0), dtype=double.dtype)
    left = torch.linalg.qr(beside @ omega).Q
    return left.to(cores), (left.mT @ double).to(cores)


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
