"""Ways of merging concepts, all of them on small cores: tensors in, tensors out.

A concept is a row: its cores of all layers, flattened and joined, in the shared orthonormal bases. Norms, angles and
singular values are therefore those of the dense updates. What looks at single entries (TIES, DARE) depends on the basis;
here that is the shared one, as in Core Space merging (arXiv 2509.17786), and its directions are the concepts' own
principal axes rather than neurons.

    T  concepts        N  entries of a row        L  layers of one shape        k, k'  ranks of their bases
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-12


def linear(rows: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum (N) of rows (T, N): exactly the sum of the updates."""
    return weights @ rows


def ties(rows: Tensor, weights: Tensor, density: float) -> Tensor:
    """Return TIES (Yadav et al. 2023, arXiv 2306.01708): trim each row, elect a sign per entry, average those that agree."""
    return elect(trim(rows, density), weights)


def trim(rows: Tensor, density: float) -> Tensor:
    """Return rows of which only the largest `density` of all entries are kept."""
    kept = max(1, round(density * rows.shape[-1]))
    least = rows.abs().topk(kept, dim=-1, sorted=True).values[..., -1:]
    return torch.where(rows.abs() >= least.clamp_min(TINY), rows, 0)


def elect(rows: Tensor, weights: Tensor) -> Tensor:
    """Return, entry by entry, the mean of the weighted rows that have the sign of their sum."""
    scaled = weights[:, None] * rows
    agreeing = torch.where(scaled.sign() == scaled.sum(0).sign(), scaled, 0)
    return agreeing.sum(0) / (agreeing != 0).sum(0).clamp_min(1)


def dare(rows: Tensor, weights: Tensor, drop: float, drawn: Tensor) -> Tensor:
    """Return DARE (Yu et al. 2023, arXiv 2311.03099): drop entries at random, rescale what is left, then sum."""
    return linear(drop_out(rows, drop, drawn), weights)


def drop_out(rows: Tensor, drop: float, drawn: Tensor) -> Tensor:
    """Return rows in which each entry is zero with probability `drop`, else larger by 1 / (1 - drop).

    `drawn` are numbers from 0 to 1, one an entry; those below `drop` are out.
    """
    return torch.where(drawn >= drop, rows / (1 - drop), 0)


def norm_equalised(rows: Tensor, weights: Tensor) -> Tensor:
    """Return the sum of rows that are made equally loud: the fit's own weighting by 1 / ||dW||, applied to a blend."""
    return linear(equalise(rows), weights)


def equalise(rows: Tensor) -> Tensor:
    """Return rows scaled to their mean norm; rows of norm zero stay."""
    norms = rows.norm(dim=-1, keepdim=True)
    present = norms > 0
    mean = norms.sum() / present.sum().clamp_min(1)
    return torch.where(present, rows * (mean / norms.clamp_min(TINY)), rows)


def tsv(cores: Tensor, weights: Tensor) -> Tensor:
    """Return TSV-Merge (Gargiulo et al. 2024, arXiv 2412.00081) of cores (T, L, k, k'): (L, k, k').

    Each concept keeps its strongest singular directions, 1/T of the rank; those of all concepts together are made
    orthonormal on either side, which removes their interference.
    """
    left, values, right = torch.linalg.svd(cores, full_matrices=False)
    kept = max(1, values.shape[-1] // cores.shape[0])
    values = values[..., :kept]
    present = values > 1e-6 * values.amax(-1, keepdim=True).clamp_min(TINY)
    sign = weights.sign()[:, None, None, None]
    left = torch.where(present[..., None, :], left[..., :kept], 0) * sign
    right = torch.where(present[..., None, :], right.mT[..., :kept], 0)
    scaled = torch.cat(list(values * weights.abs()[:, None, None]), dim=-1)
    return decorrelated(torch.cat(list(left), dim=-1)) * scaled[..., None, :] @ decorrelated(torch.cat(list(right), dim=-1)).mT


def decorrelated(vectors: Tensor) -> Tensor:
    """Return the nearest orthonormal frame of vectors (..., side, m): U V.T of their SVD, over its true rank."""
    left, values, right = torch.linalg.svd(vectors, full_matrices=False)
    present = values > 1e-5 * values.amax(-1, keepdim=True).clamp_min(TINY)
    return torch.where(present[..., None, :], left, 0) @ right
