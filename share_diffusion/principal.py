"""Columns measured on the base, as a file holds them: where a layer's inputs vary, and where the loss asks for change.

Random columns see every direction alike; a base does not use them alike. The principal directions of what a layer is given
(its inputs) and of what the loss asks of it (the gradient at its output) hold most of both in a few columns, so columns are
given to the layers and sides that need them (`calibration.py` measures and chooses). They are frozen like those of a seed:
a concept is coefficients in them, forgetting is 0 and no order has a say.

Such columns have to be stored, so they are stored small. A direction is whole numbers from -7 to 7, two in a byte; its length
is of no matter, because the columns are made orthonormal when they are read. A convolution's inputs are directions of
channels times patterns over the kernel (the cosines of a DCT-II, which are stored nowhere), so that one stored direction
serves every pattern.

    c       channels of a side: all of `out`, and `in` without the kernel's places
    a       stored directions of channels
    k       columns: pairs of a direction and a pattern, strongest first

In a file (`file.py`), for the layers in sorted order, alpha before beta:

    principal.numbers   (bytes,)        the directions (c, a), row by row, each number + 8 in four bits, the first one high
    principal.pairs     (n,) int16      direction * patterns + pattern of every column, of kernels larger than 1 x 1 alone
    principal.sizes     (layers, 4)     int16: a and k of alpha, a and k of beta; zeros where nothing was measured
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from share_diffusion.basis import WORK, Basis, orthonormalised

LEVELS = 7
SHRINKS = (1.0, 0.9, 0.8, 0.7, 0.6)  # of the largest number, among which rounding errs least
Kernel = tuple[int, int]
POINT: Kernel = (1, 1)


@dataclass(frozen=True, eq=False)
class Side:
    """One side of one layer: `directions` (c, a) int8 and `pairs` (k,), which of them times which pattern a column is."""

    directions: Tensor
    pairs: Tensor
    kernel: Kernel = POINT

    @property
    def width(self) -> int:
        """How many columns there are."""
        return len(self.pairs)

    def columns(self) -> Tensor:
        """Return the orthonormal columns (c * kh * kw, k); the first ones span what the strongest pairs span.

        Columns of different patterns are orthogonal already, so that directions are made so pattern by pattern.
        """
        waves, pairs = patterns(self.kernel), self.pairs.long()
        count, directions = waves.shape[1], self.directions.to(WORK)
        columns = torch.zeros(len(directions), count, len(pairs))
        for pattern in (pairs % count).unique().tolist():
            places = (pairs % count == pattern).nonzero().flatten()
            chosen = directions[:, pairs[places] // count]
            frame, _ = orthonormalised(chosen / chosen.norm(dim=0))
            columns[:, :, places] = (frame[:, None] * waves[None, :, pattern, None]).float()
        return columns.flatten(0, 1)


@dataclass(frozen=True, eq=False)
class Principal:
    """The measured columns of a base's layers, (alpha, beta) by path."""

    sides: Mapping[str, tuple[Side, Side]]

    def basis(self, layer: str) -> Basis:
        """Return a layer's columns as a basis."""
        alpha, beta = self.sides[layer]
        return Basis(alpha.columns(), beta.columns())

    def widths(self, layer: str) -> tuple[int, int]:
        """Return how many columns a layer has in (alpha, beta)."""
        alpha, beta = self.sides[layer]
        return alpha.width, beta.width

    @cached_property
    def bytes(self) -> int:
        """What the columns take in a file."""
        sides = [side for pair in self.sides.values() for side in pair]
        numbers = sum(side.directions.numel() for side in sides)
        return (numbers + 1) // 2 + 2 * sum(side.width for side in sides if side.kernel != POINT) + 8 * len(self.sides)

    @cached_property
    def digest(self) -> str:
        """What identifies the columns: equal exactly when the stored numbers are."""
        total = hashlib.sha256()
        for layer, pair in sorted(self.sides.items()):
            for side in pair:
                total.update(repr((layer, tuple(side.directions.shape), side.kernel, side.pairs.tolist())).encode())
                total.update(side.directions.contiguous().numpy().tobytes())
        return total.hexdigest()[:12]


def patterns(kernel: Kernel) -> Tensor:
    """Return the orthonormal cosines over a kernel's places, (kh * kw, kh * kw): the DCT-II, smoothest first."""
    rows, columns = (cosines(length) for length in kernel)
    both = torch.kron(rows, columns)
    order = sorted(range(both.shape[1]), key=lambda index: (sum(divmod(index, kernel[1])), index))
    return both[:, order]


def cosines(length: int) -> Tensor:
    """Return the DCT-II over `length` places as orthonormal columns."""
    places = torch.arange(length, dtype=WORK)
    waves = torch.cos(math.pi / length * (places[:, None] + 0.5) * places[None])
    return waves / waves.norm(dim=0)


def rounded(directions: Tensor) -> Tensor:
    """Return directions (c, a) as whole numbers from -7 to 7, each scaled so that rounding turns it least."""
    best = torch.zeros_like(directions)
    least = torch.full((directions.shape[1],), torch.inf, dtype=directions.dtype)
    unit = directions / directions.norm(dim=0).clamp_min(1e-30)
    for shrink in SHRINKS:
        scale = shrink * unit.abs().amax(0).clamp_min(1e-30) / LEVELS
        numbers = (unit / scale).round().clamp(-LEVELS, LEVELS)
        lost = 1 - (unit * numbers).sum(0) / numbers.norm(dim=0).clamp_min(1e-30)
        best, least = torch.where(lost < least, numbers, best), torch.minimum(lost, least)
    return best.to(torch.int8)


def pack(principal: Principal, order: Sequence[str]) -> dict[str, Tensor]:
    """Return the tensors of a file whose layers are in this order."""
    chosen = [principal.sides.get(layer) for layer in order]
    sides = [side for pair in chosen if pair for side in pair]
    empty = torch.zeros(0, dtype=torch.int8)
    numbers = torch.cat([empty, *(side.directions.flatten() for side in sides)]) + LEVELS + 1
    high, low = torch.nn.functional.pad(numbers, (0, len(numbers) % 2)).reshape(-1, 2).to(torch.uint8).unbind(1)
    pairs = [side.pairs for side in sides if side.kernel != POINT]
    sizes = [[n for side in pair for n in (side.directions.shape[1], side.width)] if pair else [0] * 4 for pair in chosen]
    return {
        "principal.numbers": high * 16 + low,
        "principal.pairs": torch.cat([torch.zeros(0, dtype=torch.int16), *(entry.to(torch.int16) for entry in pairs)]),
        "principal.sizes": torch.tensor(sizes, dtype=torch.int16).reshape(len(order), 4),
    }


def unpack(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], kernels: Mapping[str, Kernel]) -> Principal:
    """Return what the tensors of a file hold; `shapes` (out, in) has the layers in the file's order.

    Raises IndexError where the tensors hold too few or too many numbers.
    """
    packed = tensors["principal.numbers"]
    numbers = torch.stack([packed // 16, packed % 16], 1).flatten().to(torch.int8) - LEVELS - 1
    pairs, sizes = tensors["principal.pairs"], tensors["principal.sizes"].tolist()
    if len(sizes) != len(shapes):
        raise IndexError(f"measured columns of {len(sizes)} layers where there are {len(shapes)}")
    sides, place, pair = {}, 0, 0
    for (layer, (out, width)), entry in zip(shapes.items(), sizes, strict=True):
        both = []
        for side, kernel, stored, columns in ((width, kernels.get(layer, POINT), *entry[:2]), (out, POINT, *entry[2:])):
            channels = side // math.prod(kernel)
            end = place + channels * stored
            chosen = torch.arange(columns, dtype=torch.int16) if kernel == POINT else pairs[pair : pair + columns]
            pair += 0 if kernel == POINT else columns
            whole = end <= len(numbers) and len(chosen) == columns
            if not whole or (columns and int(chosen.max()) >= stored * math.prod(kernel)):
                raise IndexError(f"the measured columns of {layer} are not all there")
            both.append(Side(numbers[place:end].reshape(channels, stored), chosen, kernel))
            place = end
        if any(entry):
            sides[layer] = (both[0], both[1])
    if len(numbers) - place not in (0, 1) or pair != len(pairs):
        raise IndexError("the file holds more measured columns than its layers have")
    return Principal(sides)
