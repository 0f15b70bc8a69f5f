"""How many columns each layer's basis gets: the most energy per byte first, until enough is kept or the budget is spent.

A column of the input side of a layer costs `in` numbers and one of the output side `out`; what it is worth is the share
of the concepts' energy that it holds. Taking columns in the order of worth per cost, over all layers and both sides at
once, is water-filling: every column kept is worth more per byte than every column left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Widths = dict[str, tuple[int, int]]  # layer -> (columns of alpha, columns of beta)


@dataclass(frozen=True)
class Capacity:
    """What a merge may use: at least `retain` of every new concept, at most `rank` columns a side, `budget` bytes in all.

    None means that the limit is off. Where the limits contradict each other, `rank` and `budget` win and the loss is told.
    """

    retain: float | None = 0.999
    rank: int | None = None
    budget: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.retain is not None and not 0 < self.retain <= 1:
            problems.append(f"retain is {self.retain}; it is a share above 0 and at most 1")
        if self.rank is not None and self.rank < 1:
            problems.append(f"basis_rank is {self.rank}; at least 1 column is needed")
        if self.budget is not None and self.budget < 1:
            problems.append(f"budget is {self.budget} bytes; it must be positive")
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(frozen=True)
class Candidates:
    """The columns one layer could keep, each side's energies in descending order, with the cost of one column."""

    alpha: Tensor  # (m,) energy of each candidate column of the input side
    beta: Tensor  # (m',)
    costs: tuple[int, int]  # (in, out)

    def above(self, price: float) -> tuple[int, int]:
        """Return how many columns of (alpha, beta) are worth more than `price` energy per number."""
        return (
            int((self.alpha / self.costs[0] > price).sum()),
            int((self.beta / self.costs[1] > price).sum()),
        )


def prices(candidates: Mapping[str, Candidates]) -> list[float]:
    """Return every price at which the choice of columns changes, lowest first; 0 keeps all that hold anything."""
    worth = [entry.alpha / entry.costs[0] for entry in candidates.values()]
    worth += [entry.beta / entry.costs[1] for entry in candidates.values()]
    return [0.0, *torch.cat(worth).unique().tolist()] if worth else [0.0]


def choose(candidates: Mapping[str, Candidates], price: float, cap: Mapping[str, tuple[int, int]] | None = None) -> Widths:
    """Return the widths bought at a price, no side above its cap."""
    widths = {name: entry.above(price) for name, entry in candidates.items()}
    if cap is None:
        return widths
    return {name: (min(alpha, cap[name][0]), min(beta, cap[name][1])) for name, (alpha, beta) in widths.items()}


def dearest(options: list[float], accepted: Callable[[float], bool]) -> float:
    """Return the highest price still accepted, by bisection; the lowest one when none is (accepted falls with the price)."""
    low, high = 0, len(options) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if accepted(options[middle]):
            low = middle
        else:
            high = middle - 1
    return options[low]


def cheapest(options: list[float], accepted: Callable[[float], bool]) -> float:
    """Return the lowest price that is accepted, by bisection; the highest one when none is (accepted rises with the price)."""
    low, high = 0, len(options) - 1
    while low < high:
        middle = (low + high) // 2
        if accepted(options[middle]):
            high = middle
        else:
            low = middle + 1
    return options[low]


def parse_bytes(text: str) -> int:
    """Return the bytes that `60MB`, `1.5 GiB` or `200000` mean."""
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    number = text.strip().lower().rstrip("bgikm ")
    unit = text.strip().lower()[len(number) :].strip()
    try:
        return int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        raise ValueError(f"budget {text!r} is not a size; write it as 60MB, 1.5GiB or 200000") from None
