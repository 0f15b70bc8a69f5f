"""Which base a pipeline is: a digest of its architecture and a few of its weights, compared with a tolerance."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from share_diffusion.models.blocks import blocks_of
from share_diffusion.models.layers import layers, shape_of
from share_diffusion.subspace import BaseIdentity

PROBES = 32


def weight_of(module: nn.Module) -> Tensor:
    """Return a layer's own frozen weight, wrapped or not."""
    weight = getattr(module, "base", module).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def precision_of(layer: nn.Module) -> torch.dtype:
    """Return the precision in which a layer computes: its weight's, unless that only packs numbers of 8 or 4 bits."""
    weight = weight_of(layer)
    packed = getattr(getattr(weight, "quant_state", None), "dtype", None)  # what bitsandbytes unpacks to
    bias = getattr(layer, "bias", None)
    found = (weight.dtype, packed, bias.dtype if isinstance(bias, Tensor) else None)
    return next((kind for kind in found if kind is not None and kind.is_floating_point and kind.itemsize > 1), torch.float32)


def identify(pipeline: Any, name: str = "") -> BaseIdentity:
    """Return the pipeline's identity; the weights are left out where they are offloaded or quantised."""
    everything = layers(pipeline)
    lines = [f"{path} {shape_of(module)}" for path, module in sorted(everything.items())]
    architecture = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
    blocks = blocks_of(everything)
    chosen = [module for _, module in sorted(everything.items()) if isinstance(getattr(module, "base", module), nn.Linear)]
    picked = [weight_of(chosen[index * len(chosen) // PROBES]) for index in range(PROBES)]
    if not all(is_readable(weight) for weight in picked):
        return BaseIdentity(name, architecture, blocks=blocks)
    values = tuple(float(f"{float(weight[0, index % weight.shape[1]]):.5g}") for index, weight in enumerate(picked))
    return BaseIdentity(name, architecture, values, blocks)


def is_readable(weight: Tensor) -> bool:
    """Tell whether a weight's entries are there and are the base's own, neither offloaded nor quantised."""
    return weight.device.type != "meta" and weight.is_floating_point() and type(weight) is Tensor


def weights_of(pipeline: Any) -> dict[str, Tensor]:
    """Return the frozen weights of every layer, by path, for a subspace whose basis comes from them."""
    return {path: weight_of(module) for path, module in layers(pipeline).items()}
