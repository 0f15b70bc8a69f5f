"""A blend added into a pipeline's weights for the length of a `with` block: W + dW, summed in float32.

The old weights are kept aside and come back to the last bit, so the same pipeline serves the next export.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from share_diffusion.layer import ShareLayer
from share_diffusion.lora import Factors, LoRA
from share_diffusion.models.identity import weight_of
from share_diffusion.models.layers import layers, shape_of


@contextmanager
def fused(pipeline: Any, lora: LoRA | None) -> Iterator[None]:
    """Have a LoRA in the weights inside the block; None is the untouched base.

    Raises ValueError, with nothing changed, where the pipeline is another base or carries attached layers.
    """
    updates = {} if lora is None else lora.layers
    found = layers(pipeline)
    if problem := fuse_problem(found, updates):
        raise ValueError(problem)
    kept: dict[str, Tensor] = {}
    try:
        with torch.no_grad():
            for path, factors in updates.items():
                weight = weight_of(found[path])
                kept[path] = weight.clone()
                weight.copy_(summed(path, weight, factors))
        yield
    finally:
        with torch.no_grad():
            for path, weight in kept.items():
                weight_of(found[path]).copy_(weight)


def fuse_problem(found: dict[str, Any], updates: dict[str, Factors]) -> str | None:
    """Return why a LoRA cannot go into the weights of these layers, or None."""
    if any(isinstance(module, ShareLayer) for module in found.values()):
        return "the pipeline carries attached layers; call detach() on their handle first"
    absent = [path for path in updates if path not in found]
    wrong = [path for path in updates if path in found and shape_of(found[path])[0] != updates[path].shape]
    if absent or wrong:
        example = (absent + wrong)[0]
        return (
            f"wrong base: {len(absent)} of {len(updates)} layers are absent from it and {len(wrong)} have another shape, "
            f"such as {example}; give the base that the subspace belongs to"
        )
    return None


def summed(path: str, weight: Tensor, factors: Factors) -> Tensor:
    """Return W + dW in the shape and precision of W, refused where it leaves the range of that precision."""
    update = factors.up.to(weight.device, torch.float32) @ factors.down.to(weight.device, torch.float32)
    total = (weight.float().flatten(1) + update).reshape(weight.shape).to(weight.dtype)
    if not torch.isfinite(total).all():
        raise ValueError(f"{path}: the fused weights leave the range of {weight.dtype}; load the base in float32")
    return total
