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

from share_diffusion.active import Active
from share_diffusion.basis import RANK_TOLERANCE, thin_svd
from share_diffusion.blend import Blend, Term
from share_diffusion.cores import CoreTable
from share_diffusion.lora import Factors, LoRA
from share_diffusion.models.blocks import block_groups
from share_diffusion.subspace import Subspace

LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Weighted:
    """A blend as a LoRA, its largest rank, and the share ||left out|| / ||dW|| that a truncation cost."""

    lora: LoRA
    rank: int
    error: float


def cores_of(subspace: Subspace, blend: Blend) -> dict[str, Tensor]:
    """Return the core (k', k) of every layer that a blend changes, block groups and merge methods included.

    A LoRA acts everywhere and at every step: a blend with regions or a schedule is a ValueError that names its terms, as
    is one whose update float32 cannot hold.
    """
    if moving := [term.name for term in blend.terms if term.steps or term.region]:
        raise ValueError(
            f"{', '.join(dict.fromkeys(moving))}: [steps=...] and [region=...] cannot be put into weights, which act at every "
            "step and everywhere; leave these options out, or export the concepts one by one and schedule them there"
        )
    if problems := [problem for term in blend.terms if (problem := overflow_problem(subspace, term))]:
        raise ValueError("; ".join(problems))
    cores = subspace.blend(blend.weights) if blend.plain else merged(subspace, blend)
    if broken := [layer for layer, core in cores.items() if not torch.isfinite(core).all()]:
        raise ValueError(
            f"the blend leaves the range of float32 in {len(broken)} layers, such as {broken[0]}; give it smaller weights"
        )
    return cores


def overflow_problem(subspace: Subspace, term: Term) -> str | None:
    """Return why a term's own cores leave the range of float32, with the largest weight that fits, or None."""
    if not term.weight or term.name not in subspace.concepts:
        return None
    cores = (entry.core() for entry in subspace[term.name].coefficients.values())
    peaks = (float(core.abs().max()) for core in cores if core.numel())
    peak, factor = max(peaks, default=0.0), max((abs(factor) for _, factor in term.blocks or ()), default=1.0)
    if factor * max(peak, 1.0) > LARGEST:
        return f"{term.name}: the factor {factor:g} of its blocks leaves the range of float32; give it a smaller one"
    limit = LARGEST / max(factor * peak, 1.0)
    if abs(term.weight) <= limit:
        return None
    # Rounded to three digits it is not above the limit.
    return f"{term.name}: weight {term.weight:g} leaves the range of float32; weights up to about {0.995 * limit:.3g} fit"


def merged(subspace: Subspace, blend: Blend) -> dict[str, Tensor]:
    """Return the cores of a blend with block groups or a merge method, as they act when it is attached."""
    table = CoreTable(subspace, block_groups(subspace.layers, subspace.base.blocks))
    active = Active([blend], table, {})
    moment = active.moment(0.0)
    acting, flat = active.layers(moment), active.flat(moment, 0, table.width)[0, 0]
    return {layer: core.mT for layer, core in table.split(flat) if layer in acting}


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
