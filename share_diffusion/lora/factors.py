"""The low-rank update of one layer.

Shapes: up (out, r), down (r, in), dW = up @ down (out, in).
For a Conv2d, in = in_channels * kh * kw, which is how `weight.flatten(1)` lays a convolution out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# The Grams of `energy` are (r, r), so a file that claims a rank of a million would ask for terabytes.
RANK_LIMIT = 4096


@dataclass(frozen=True, eq=False)
class Factors:
    """One layer's update dW = up @ down, with every scale already folded into `up`.

    `kernel` is (kh, kw) for a Conv2d and None for a Linear; `lost` is the energy that a conversion from another form
    left out. Raises ValueError where the shapes do not fit together.
    """

    up: Tensor
    down: Tensor
    kernel: tuple[int, int] | None = None
    lost: float = 0.0

    def __post_init__(self) -> None:
        if problem := shape_problem(self.up, self.down, self.kernel):
            raise ValueError(problem)

    def detached(self) -> Factors:
        """Return the factors without gradients and in main memory; themselves where they are so already."""
        if not any(side.requires_grad or side.device.type != "cpu" for side in (self.up, self.down)):
            return self
        return replace(self, up=self.up.detach().cpu(), down=self.down.detach().cpu())

    @property
    def rank(self) -> int:
        """The inner dimension r, whatever the numerical rank."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of dW as a matrix."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def energy(self) -> float:
        """||dW||_F^2 = tr((up^T up)(down down^T)) in float64, without ever forming the (out, in) matrix."""
        up, down = self.up.detach().double(), self.down.detach().double()
        left, right = up.T @ up, down @ down.T
        total = float((left * right).sum())
        # What is left of factors that cancel, below the rounding of their own entries in float32, is nothing.
        return total if total > 1e-14 * float(left.trace() * right.trace()) else 0.0

    def dense(self) -> Tensor:
        """dW itself: (out, in), or (out, in_channels, kh, kw) for a Conv2d; meant for small layers."""
        matrix = self.up @ self.down
        return matrix if self.kernel is None else matrix.unflatten(1, (-1, *self.kernel))


def shape_problem(up: Tensor, down: Tensor, kernel: tuple[int, int] | None) -> str | None:
    """What is wrong with these shapes, or None."""
    shapes = f"up {tuple(up.shape)} and down {tuple(down.shape)}"
    if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
        return f"{shapes} do not multiply; expected (out, r) and (r, in)"
    if 0 in (*up.shape, *down.shape):
        return f"{shapes} are empty; leave out a layer that has no update"
    if down.shape[0] > RANK_LIMIT:
        return f"rank {down.shape[0]} is above the limit of {RANK_LIMIT}; reduce it with a truncated SVD first"
    if kernel is not None and (min(kernel) < 1 or down.shape[1] % math.prod(kernel)):
        return f"{shapes} do not fit a {kernel[0]}x{kernel[1]} kernel: {down.shape[1]} inputs are no whole channels"
    return None


def is_finite(factors: Factors) -> bool:
    """Whether no entry is NaN or infinite."""
    return bool(torch.isfinite(factors.up).all() and torch.isfinite(factors.down).all())
