"""The algebra of a shared low-rank subspace: tensors in, tensors out.

A LoRA updates a frozen weight by dW = up @ down. Here many updates of one layer share two orthonormal bases,

    dW_i = beta @ C_i @ alpha.T,        C_i = eps_beta_i @ eps_alpha_i.T,

so that concept i costs only its coefficients (arXiv 2602.06043, equations 2 to 5). Unlike the paper, the fit works on
dW itself and not on its factors, which are unique only up to (up R, R^-1 down), weighs every concept by 1 / ||dW||, and
never subtracts a mean (a mean that is not stored cannot be added back).

Shapes; every function accepts leading batch dimensions (layers of equal shape are worked on together):

    out, in    sides of the frozen weight; `side` below is either of them
    r          rank of a LoRA, possibly padded with zero columns
    k          basis rank (may differ between the two sides)
    p          pseudo-rank, the rank of one concept inside the subspace

Everything is computed in float64 (`WORK`) and costs O(side * (k + r)^2); nothing forms an out x in matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WORK = torch.float64
RANK_TOLERANCE = 1e-6  # a direction weaker than this share of the vectors it comes from is rounding, not content


@dataclass(frozen=True, eq=False)
class Basis:
    """The shared orthonormal bases of one layer: `alpha` (in, k) and `beta` (out, k'); k and k' may differ."""

    alpha: Tensor
    beta: Tensor

    @property
    def rank(self) -> tuple[int, int]:
        """(columns of alpha, columns of beta)."""
        return self.alpha.shape[-1], self.beta.shape[-1]


@dataclass(frozen=True, eq=False)
class Coefficients:
    """One concept in one layer: `alpha` (k, p) and `beta` (k', p); rows missing at the end are zero."""

    alpha: Tensor
    beta: Tensor

    @property
    def pseudo_rank(self) -> int:
        return self.alpha.shape[-1]

    def core(self, rank: tuple[int, int] | None = None) -> Tensor:
        """Return C = eps_beta @ eps_alpha.T, padded to (k', k) = reversed(rank)."""
        alpha, beta = self.alpha, self.beta
        if rank is not None:
            alpha, beta = pad_rows(alpha, rank[0]), pad_rows(beta, rank[1])
        return beta @ alpha.mT


def pad_rows(matrix: Tensor, rows: int) -> Tensor:
    """Return the matrix with zero rows added at the end, up to `rows`."""
    return torch.nn.functional.pad(matrix, (0, 0, 0, rows - matrix.shape[-2]))


def pad_columns(matrix: Tensor, columns: int) -> Tensor:
    """Return the matrix with zero columns added at the end, up to `columns`."""
    return torch.nn.functional.pad(matrix, (0, columns - matrix.shape[-1]))


def thin_svd(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (out, r), S (r), V (in, r) with up @ down = U diag(S) V.T, through QR of both factors."""
    left, left_triangle = torch.linalg.qr(up.to(WORK))
    right, right_triangle = torch.linalg.qr(down.to(WORK).mT)
    inner_left, values, inner_right = torch.linalg.svd(left_triangle @ right_triangle.mT, full_matrices=False)
    return left @ inner_left, values, right @ inner_right.mT


def energy(up: Tensor, down: Tensor) -> Tensor:
    """Return ||up @ down||_F^2 from the r x r Gram matrices."""
    up, down = up.to(WORK), down.to(WORK)
    return ((up.mT @ up) * (down @ down.mT)).sum((-2, -1)).clamp_min(0)


def outside(basis: Tensor, vectors: Tensor) -> Tensor:
    """Return what the orthonormal basis (side, k) does not span of the vectors (side, m); projected twice for accuracy."""
    for _ in range(2):
        vectors = vectors - basis @ (basis.mT @ vectors)
    return vectors


def orthonormalised(frame: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q (side, k) and R (k, k) with frame = Q R, for a frame that is orthonormal to rounding: Q is next to it."""
    turned, triangle = torch.linalg.qr(frame)
    sign = torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(triangle)
    return turned * sign, sign[:, None] * triangle


def principal_directions(vectors: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return orthonormal directions (side, m) of the vectors (side, m'), strongest first, and each one's energy (m).

    Directions weaker than RANK_TOLERANCE times `scale` (the norm of what the vectors were taken from) are rounding: they
    are returned with energy 0 and nothing should be built on them.
    """
    frame, triangle = torch.linalg.qr(vectors)
    rotation, values, _ = torch.linalg.svd(triangle, full_matrices=False)
    present = values > RANK_TOLERANCE * scale[..., None]
    return frame @ rotation, torch.where(present, values.square(), 0)


def project(basis: Basis, up: Tensor, down: Tensor) -> Tensor:
    """Return the core beta.T @ (up @ down) @ alpha of an update, (k', k)."""
    return (basis.beta.to(WORK).mT @ up.to(WORK)) @ (down.to(WORK) @ basis.alpha.to(WORK))


def factor_core(core: Tensor, pseudo_rank: int) -> Coefficients:
    """Return the best coefficients of rank `pseudo_rank` for a core, its singular values split evenly between the sides."""
    left, values, right = torch.linalg.svd(core.to(WORK), full_matrices=False)
    root = values[..., None, :pseudo_rank].sqrt()
    return Coefficients(alpha=right.mT[..., :pseudo_rank] * root, beta=left[..., :pseudo_rank] * root)


def rotate(coefficients: Coefficients, alpha: Tensor, beta: Tensor) -> Coefficients:
    """Re-express coefficients in the bases (old basis @ alpha), (old basis @ beta); the rotations are (k_old, k_new)."""
    return Coefficients(
        alpha=alpha.mT @ pad_rows(coefficients.alpha.to(alpha), alpha.shape[-2]),
        beta=beta.mT @ pad_rows(coefficients.beta.to(beta), beta.shape[-2]),
    )


def reconstruct(basis: Basis, coefficients: Coefficients) -> tuple[Tensor, Tensor]:
    """Return the concept's update as factors up (out, p), down (p, in)."""
    alpha, beta = coefficients.alpha, coefficients.beta
    return (
        basis.beta[..., : beta.shape[-2]].to(beta) @ beta,
        (basis.alpha[..., : alpha.shape[-2]].to(alpha) @ alpha).mT,
    )


def random_basis(side: int, rank: int, seed: int) -> Tensor:
    """Return an orthonormal (side, rank) drawn from a seed: the same on every machine, to rounding."""
    generator = torch.Generator().manual_seed(seed)
    frame, triangle = torch.linalg.qr(torch.randn(side, rank, generator=generator, dtype=WORK))
    return frame * triangle.diagonal().sign()


def weight_basis(weight: Tensor, rank: int, iterations: int = 12) -> Basis:
    """Return the top singular vectors of a frozen weight (out, in), by subspace iteration from a fixed start.

    The start, the number of steps and the rounding of the weight to half precision are fixed, because a basis that is
    not stored has to come out the same for everybody who holds the same base.
    """
    weight = weight.to(torch.float16).to(WORK)
    out, width = weight.shape
    rank = min(rank, out, width)
    right = random_basis(width, min(rank + 8, out, width), seed=0)
    left = weight @ right
    for _ in range(iterations):
        left, _ = torch.linalg.qr(left)
        right, _ = torch.linalg.qr(weight.mT @ left)
        left = weight @ right
    inner_left, _, inner_right = torch.linalg.svd(left, full_matrices=False)
    beta, alpha = inner_left[:, :rank], (right @ inner_right.mT)[:, :rank]
    sign = torch.where(alpha.gather(0, alpha.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
    return Basis(alpha=alpha * sign, beta=beta * sign)
