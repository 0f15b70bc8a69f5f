"""Layers of FLUX and SD 3 by the names of the original programs, which is how kohya's dialect spells them.

Where the original holds query, key and value (and in FLUX's single blocks the feed-forward too) in one matrix, layers
with up (out_i, r_i), down (r_i, in) become one: up block diagonal (sum out_i, sum r_i), down stacked (sum r_i, in); with
one down for all of them up is stacked and the rank stays. Both are exact, and `native.apart` takes them apart again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from share_diffusion.lora.factors import Factors
from share_diffusion.lora.native import FINAL, FLUX, SD3, Rule, in_order

SINGLE = "single_transformer_blocks"
FLUX_WIDTH = 3072  # of every FLUX.1; no SD 3 is as wide
READS_WIDTH = re.compile(r"\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.0\.proj)$")
WRITES_WIDTH = re.compile(r"\.ff(_context)?\.net\.2$")
MLP_RATIO = 4  # of FLUX's feed-forward


def is_flux(layers: Mapping[str, Factors]) -> bool:
    """Whether the layers are FLUX's and not SD 3's: the one has single blocks, and is of one width."""
    return any(SINGLE in layer or width_of(layer, factors) == FLUX_WIDTH for layer, factors in layers.items())


def width_of(layer: str, factors: Factors) -> int | None:
    """The width of a transformer as one of its layers shows it, None where it does not."""
    out, into = factors.shape
    if not layer.startswith("transformer."):
        return None
    return into if READS_WIDTH.search(layer) else out if WRITES_WIDTH.search(layer) else None


def joined(layers: Mapping[str, Factors]) -> dict[str, Factors]:
    """The layers of a transformer by the original paths, `transformer.double_blocks.0.img_attn.qkv` and so on.

    Layers without an original name keep theirs. Parts of a fused layer that are not adapted become rows of zeros.
    """
    rules = (*(FLUX if is_flux(layers) else SD3), *FINAL)
    whole: dict[str, tuple[Rule, dict[int, Factors]]] = {}
    rest: dict[str, Factors] = {}
    for layer, factors in layers.items():
        component, _, module = layer.partition(".")
        if component == "transformer" and (found := place(module, rules)):
            path, rule, part = found
            whole.setdefault(f"{component}.{path}", (rule, {}))[1][part] = factors
        else:
            rest[layer] = factors
    return rest | {path: fuse(path, rule, parts) for path, (rule, parts) in whole.items()}


def place(module: str, rules: tuple[Rule, ...]) -> tuple[str, Rule, int] | None:
    """The original path of a diffusers module, its rule, and which part of it the module is."""
    for rule in rules:
        if rule.path.endswith(r"single_blocks\.(\d+)\.qkv"):
            continue  # XLabs' alone; the original has them in linear1
        for part, layer in enumerate(rule.layers):
            pattern = re.escape(layer).replace(re.escape(r"\1"), r"(\d+)")
            if match := re.fullmatch(pattern, module):
                path = rule.path.replace(r"(\d+)", match.group(1) if match.groups() else "")
                return path.replace("\\", ""), rule, part
    return None


def fuse(path: str, rule: Rule, parts: Mapping[int, Factors]) -> Factors:
    """One original layer of some of its parts."""
    if len(rule.layers) == 1:
        return in_order(rule, path, parts[0])
    downs = [factors.down for _, factors in sorted(parts.items())]
    one_side = all(torch.equal(down, downs[0]) for down in downs)
    width = downs[0].shape[1]
    heights = [width] * 3 + [MLP_RATIO * width] * (len(rule.layers) - 3)
    absent = downs[0].shape[0] if one_side else 0  # columns that rows of zeros need
    ups = [parts[n].up if n in parts else downs[0].new_zeros(height, absent) for n, height in enumerate(heights)]
    up = torch.cat(ups) if one_side else torch.block_diag(*ups)
    down = downs[0] if one_side else torch.cat(downs)
    return Factors(up, down, lost=sum(factors.lost for factors in parts.values()))
