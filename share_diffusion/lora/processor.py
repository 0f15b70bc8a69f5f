"""diffusers' names from before PEFT: attention processors in the UNet, `lora_linear_layer` in the text encoders.

    unet.<path>.attn1.processor.to_q_lora.down.weight, .up.weight
    unet.<path>.ff.net.2.lora.down.weight                               every other layer of the UNet
    text_encoder.<path>.q_proj.lora_linear_layer.down.weight

The one dotted dialect that ComfyUI reads as well. It has no alpha, so the scale stays folded into `up`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from share_diffusion.lora.factors import Factors
from share_diffusion.lora.kohya import four_dimensional

ATTENTION = re.compile(r"(?P<block>.+\.attn[12])\.(?P<side>to_[qkv]|to_out)(\.0)?")


def spell_processor(layers: Mapping[str, Factors], name: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file of diffusers 0.13 to 0.21, and its metadata."""
    tensors: dict[str, Tensor] = {}
    for layer, factors in layers.items():
        stem = processor_stem(layer)
        tensors[f"{stem}.up.weight"], tensors[f"{stem}.down.weight"] = four_dimensional(factors)
    return tensors, {"format": "pt"}


def processor_stem(layer: str) -> str:
    """What stands before `.up.weight` and `.down.weight` of a layer."""
    if layer.startswith("text_encoder"):
        return f"{layer}.lora_linear_layer"
    if match := ATTENTION.fullmatch(layer):
        return f"{match['block']}.processor.{match['side']}_lora"
    return f"{layer}.lora"
