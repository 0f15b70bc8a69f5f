"""A weighted blend as one ordinary LoRA: the blended core of every layer, split by a thin SVD.

    dW = beta @ core @ alpha.T = U diag(S) V.T,    up = U sqrt(S),    down = sqrt(S) V.T

Shapes: core (k', k), alpha (in, k), beta (out, k'), up (out, r), down (r, in). Nothing of shape (out, in) is formed:
what is decomposed is (k', k), through the QR of both bases, which half precision has left not quite orthonormal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from share_diffusion.basis import RANK_TOLERANCE, thin_svd
from share_diffusion.lora import Factors, LoRA
from share_diffusion.subspace import Subspace


@dataclass(frozen=True)
class Weighted:
    """A blend as a LoRA, its largest rank, and the share ||left out|| / ||dW|| that a truncation cost."""

    lora: LoRA
    rank: int
    error: float


def weighted(subspace: Subspace, cores: Mapping[str, Tensor], rank: int | None = None) -> Weighted:
    """Return the LoRA of blended cores (`Subspace.blend`), of full rank or of at most `rank` a layer.

    Raises ValueError where nothing is left to write.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank is {rank}; it is 1 or more, or left out for the full rank")
    layers: dict[str, Factors] = {}
    total = lost = 0.0
    for layer, core in cores.items():
        basis = subspace.layers[layer]
        left, values, right = thin_svd(basis.beta.double() @ core.double(), basis.alpha.double().mT)
        kept = min(numerical_rank(values), rank or len(values))
        total += float(values.square().sum())
        lost += float(values[kept:].square().sum())
        if kept:
            root = values[:kept].sqrt()
            factors = (left[:, :kept] * root).float(), (right[:, :kept] * root).mT.float()
            layers[layer] = Factors(*factors, subspace.kernels.get(layer))
    if not layers:
        raise ValueError("the blend changes nothing (every weight is 0, or the concepts cancel); there is nothing to export")
    return Weighted(LoRA(layers), max(factors.rank for factors in layers.values()), math.sqrt(lost / total))


def numerical_rank(values: Tensor) -> int:
    """Return how many singular values, strongest first, are more than the rounding of float32."""
    largest = float(values[0]) if len(values) else 0.0
    return int(torch.count_nonzero(values > RANK_TOLERANCE * largest)) if largest else 0
