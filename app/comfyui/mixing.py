"""A mix of concepts as text, and as the LoRA that ComfyUI is handed.

    a:0.8, b:-0.4        or        a:0.8 + b:-0.4        a name alone has weight 1

The update of a mix is the sum of its concepts' updates, so their factors stand side by side: up = [w1 up1, w2 up2],
down = [down1; down2]. That is exact, and the same as loading the concepts one after another.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from .reader import SubspaceFile, factors

NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
NAME = r'(?:"(?P<quoted>[^"]+)"|(?P<plain>[^\s:+,"](?:[^:+,"]*[^\s:+,"])?))'
TERM = re.compile(rf"\s*{NAME}\s*(?::\s*(?P<weight>{NUMBER})\s*)?(?P<end>[,+]|$)")
PREFIXES = {
    "unet": "lora_unet_",
    "text_encoder": "lora_te1_",
    "text_encoder_2": "lora_te2_",
    "text_encoder_3": "lora_te3_",
}


def parse(text: str) -> dict[str, float]:
    """Return the weight of every concept named in a text; ValueError says where it makes no sense."""
    weights: dict[str, float] = {}
    position = 0
    while position < len(text.rstrip()) or (weights and text[position - 1 : position] in (",", "+")):
        match = TERM.match(text, position)
        if match is None:
            raise ValueError(f"the mix makes no sense at {text[position:].strip()[:30]!r}; write it as in a:0.8, b:-0.4")
        name, weight = match["quoted"] or match["plain"], float(match["weight"] or 1)
        if name in weights:
            raise ValueError(f"{name!r} is named twice in the mix; give it one weight")
        if not math.isfinite(weight):
            raise ValueError(f"the weight of {name!r} is not a finite number")
        weights[name] = weight
        position = match.end()
    return weights


def mixed(file: SubspaceFile, weights: dict[str, float]) -> dict[str, Tensor]:
    """Return a mix as the tensors of a LoRA, by the names that ComfyUI knows; a concept of weight 0 is exactly absent."""
    if unknown := [name for name in weights if name not in file.concepts]:
        raise ValueError(f"unknown concept {', '.join(unknown)}; the file holds: {', '.join(file.concepts) or 'none'}")
    sides: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, weight in weights.items():
        for path, (up, down) in factors(file, file.concepts[name]).items() if weight else ():
            sides.setdefault(path, []).append((up * weight, down))
    tensors: dict[str, Tensor] = {}
    kernels = {layer.path: layer.kernel for layer in file.layers}
    for path, pairs in sides.items():
        up, down = torch.cat([pair[0] for pair in pairs], dim=1), torch.cat([pair[1] for pair in pairs])
        if kernel := kernels[path]:
            up, down = up[:, :, None, None], down.unflatten(1, (-1, *kernel))
        # Without a matrix called alpha the scale is 1.
        tensors[f"{spelled(path)}.lora_up.weight"] = up.contiguous()
        tensors[f"{spelled(path)}.lora_down.weight"] = down.contiguous()
    return tensors


def spelled(path: str) -> str:
    """Return a layer's name in a LoRA: kohya's for UNets and text encoders, the dotted path for transformers."""
    component, _, module = path.partition(".")
    return PREFIXES[component] + module.replace(".", "_") if component in PREFIXES else path
