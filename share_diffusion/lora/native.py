"""Modules by the names of the original programs (ldm and sgm, FLUX, SD3), as the layers that diffusers has for them.

Several of those programs keep query, key and value in one fused matrix, where diffusers has a layer for each: the rows
of `up` come apart and every part keeps the whole `down`, which is exact. A fused layer that was itself joined from
separate ones (block diagonal) loses the columns that are zero in its part, so that its rank does not triple.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from share_diffusion.lora.factors import Factors


@dataclass(frozen=True)
class Rule:
    """A path in the original spelling and the layers it is; several share its rows, `swapped` exchanges its halves."""

    path: str
    layers: tuple[str, ...]
    swapped: bool = False


QKV = ("to_q", "to_k", "to_v")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")


def inside(block: str, *names: str) -> tuple[str, ...]:
    """Names under one block."""
    return tuple(f"{block}.{name}" for name in names)


DOUBLE, SINGLE = r"transformer_blocks.\1", r"single_transformer_blocks.\1"
FLUX = (
    Rule(r"double_blocks\.(\d+)\.img_attn\.qkv", inside(f"{DOUBLE}.attn", *QKV)),
    Rule(r"double_blocks\.(\d+)\.txt_attn\.qkv", inside(f"{DOUBLE}.attn", *ADDED)),
    Rule(r"double_blocks\.(\d+)\.img_attn\.proj", (f"{DOUBLE}.attn.to_out.0",)),
    Rule(r"double_blocks\.(\d+)\.txt_attn\.proj", (f"{DOUBLE}.attn.to_add_out",)),
    Rule(r"double_blocks\.(\d+)\.img_mlp\.0", (f"{DOUBLE}.ff.net.0.proj",)),
    Rule(r"double_blocks\.(\d+)\.img_mlp\.2", (f"{DOUBLE}.ff.net.2",)),
    Rule(r"double_blocks\.(\d+)\.txt_mlp\.0", (f"{DOUBLE}.ff_context.net.0.proj",)),
    Rule(r"double_blocks\.(\d+)\.txt_mlp\.2", (f"{DOUBLE}.ff_context.net.2",)),
    Rule(r"double_blocks\.(\d+)\.img_mod\.lin", (f"{DOUBLE}.norm1.linear",)),
    Rule(r"double_blocks\.(\d+)\.txt_mod\.lin", (f"{DOUBLE}.norm1_context.linear",)),
    Rule(r"single_blocks\.(\d+)\.linear1", (*inside(f"{SINGLE}.attn", *QKV), f"{SINGLE}.proj_mlp")),
    Rule(r"single_blocks\.(\d+)\.qkv", inside(f"{SINGLE}.attn", *QKV)),
    Rule(r"single_blocks\.(\d+)\.linear2", (f"{SINGLE}.proj_out",)),
    Rule(r"single_blocks\.(\d+)\.modulation\.lin", (f"{SINGLE}.norm.linear",)),
    Rule(r"img_in", ("x_embedder",)),
    Rule(r"txt_in", ("context_embedder",)),
    *(
        Rule(rf"{ours}_in\.{side}_layer", (f"time_text_embed.{theirs}_embedder.linear_{number}",))
        for ours, theirs in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance"))
        for number, side in ((1, "in"), (2, "out"))
    ),
)
SD3 = (
    Rule(r"joint_blocks\.(\d+)\.x_block\.attn\.qkv", inside(f"{DOUBLE}.attn", *QKV)),
    Rule(r"joint_blocks\.(\d+)\.x_block\.attn2\.qkv", inside(f"{DOUBLE}.attn2", *QKV)),
    Rule(r"joint_blocks\.(\d+)\.context_block\.attn\.qkv", inside(f"{DOUBLE}.attn", *ADDED)),
    Rule(r"joint_blocks\.(\d+)\.x_block\.attn\.proj", (f"{DOUBLE}.attn.to_out.0",)),
    Rule(r"joint_blocks\.(\d+)\.x_block\.attn2\.proj", (f"{DOUBLE}.attn2.to_out.0",)),
    Rule(r"joint_blocks\.(\d+)\.context_block\.attn\.proj", (f"{DOUBLE}.attn.to_add_out",)),
    Rule(r"joint_blocks\.(\d+)\.x_block\.mlp\.fc1", (f"{DOUBLE}.ff.net.0.proj",)),
    Rule(r"joint_blocks\.(\d+)\.x_block\.mlp\.fc2", (f"{DOUBLE}.ff.net.2",)),
    Rule(r"joint_blocks\.(\d+)\.context_block\.mlp\.fc1", (f"{DOUBLE}.ff_context.net.0.proj",)),
    Rule(r"joint_blocks\.(\d+)\.context_block\.mlp\.fc2", (f"{DOUBLE}.ff_context.net.2",)),
    Rule(r"joint_blocks\.(\d+)\.x_block\.adaLN_modulation\.1", (f"{DOUBLE}.norm1.linear",)),
    Rule(r"joint_blocks\.(\d+)\.context_block\.adaLN_modulation\.1", (f"{DOUBLE}.norm1_context.linear",)),
    Rule(r"x_embedder\.proj", ("pos_embed.proj",)),
    Rule(r"t_embedder\.mlp\.0", ("time_text_embed.timestep_embedder.linear_1",)),
    Rule(r"t_embedder\.mlp\.2", ("time_text_embed.timestep_embedder.linear_2",)),
    Rule(r"y_embedder\.mlp\.0", ("time_text_embed.text_embedder.linear_1",)),
    Rule(r"y_embedder\.mlp\.2", ("time_text_embed.text_embedder.linear_2",)),
)
# The two keep shift before scale where diffusers has scale before shift.
FINAL = (
    Rule(r"final_layer\.linear", ("proj_out",)),
    Rule(r"final_layer\.adaLN_modulation\.1", ("norm_out.linear",), swapped=True),
)
LDM = (
    Rule(r"time_embed\.0", ("time_embedding.linear_1",)),
    Rule(r"time_embed\.2", ("time_embedding.linear_2",)),
    Rule(r"label_emb\.0\.0", ("add_embedding.linear_1",)),
    Rule(r"label_emb\.0\.2", ("add_embedding.linear_2",)),
    Rule(r"input_blocks\.0\.0", ("conv_in",)),
    Rule(r"out\.2", ("conv_out",)),
)
RULES = (*FLUX, *SD3, *FINAL, *LDM)

RESNET = {
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
LAYERS_PER_BLOCK = 2  # of every UNet of Stable Diffusion 1.x, 2.x and XL


def renamed(layers: Mapping[str, Factors]) -> dict[str, Factors]:
    """The same updates by diffusers' layer names; ValueError where two become the same layer."""
    found: dict[str, Factors] = {}
    for layer, factors in layers.items():
        for name, part in apart(layer, factors).items():
            if name in found:
                raise ValueError(f"{name} is in the file twice, in two spellings; keep one of the two")
            found[name] = part
    return found


def apart(layer: str, factors: Factors) -> dict[str, Factors]:
    """One module in any spelling as diffusers' layers; a path that is diffusers' own already stays."""
    component, _, path = layer.partition(".")
    if component == "unet":
        path = unet_path(path) or path
    for rule in RULES if component in ("unet", "transformer") else ():
        if match := re.fullmatch(rule.path, path):
            names = [f"{component}.{match.expand(name)}" for name in rule.layers]
            return dict(zip(names, rows_of(in_order(rule, path, factors), len(names)), strict=True))
    return {f"{component}.{path}": factors}


def in_order(rule: Rule, path: str, factors: Factors) -> Factors:
    """The factors with the halves of their output exchanged where the two spellings differ in that; its own inverse."""
    if rule.swapped or is_final_context(path, factors):
        return replace(factors, up=torch.cat(factors.up.chunk(2)[::-1]))
    return factors


def is_final_context(path: str, factors: Factors) -> bool:
    """Whether a layer is the last modulation of SD3's text stream, which has two outputs instead of six."""
    return "context_block.adaLN_modulation" in path and factors.shape[0] == 2 * factors.shape[1]


def rows_of(factors: Factors, parts: int) -> list[Factors]:
    """The rows of a fused layer: three equal parts, or four of which three are as wide as the input."""
    if parts == 1:
        return [factors]
    out, width = factors.shape
    sizes = [out // 3] * 3 if parts == 3 else [width, width, width, out - 3 * width]
    if sum(sizes) != out or min(sizes) < 1:
        raise ValueError(f"{out} outputs of {width} inputs do not come apart into {parts} layers; is it another model?")
    return [without_zeros(up, factors) for up in factors.up.split(sizes)]


def without_zeros(up: Tensor, factors: Factors) -> Factors:
    """One part of a fused layer, without the rank-1 terms that are nothing in it."""
    present = up.any(dim=0)
    if not present.any():
        present[0] = True
    kept = Factors(up[:, present].clone(), factors.down[present].clone(), factors.kernel)
    # What a conversion left out of the whole is shared by rows.
    return replace(kept, lost=factors.lost * up.shape[0] / factors.shape[0])


def unet_path(path: str) -> str | None:
    """`input_blocks.4.1.transformer_blocks.0.attn1.to_q` -> `down_blocks.1.attentions.0.…`, None for any other path."""
    match = re.fullmatch(r"(input_blocks|output_blocks)\.(\d+)\.(\d+)\.(.+)|middle_block\.(\d+)\.(.+)", path)
    if match is None or path.startswith("input_blocks.0."):
        return None
    side, block, place, rest, middle, below = match.groups()
    if side is None:
        return f"mid_block.attentions.0.{below}" if middle == "1" else resnet(f"mid_block.resnets.{int(middle) // 2}", below)
    step = LAYERS_PER_BLOCK + 1
    if side == "input_blocks":
        number, index = divmod(int(block) - 1, step)
        root, sampler = f"down_blocks.{number}", "downsamplers.0.conv"
    else:
        number, index = divmod(int(block), step)
        root, sampler = f"up_blocks.{number}", "upsamplers.0.conv"
    if rest in ("op", "conv"):
        return f"{root}.{sampler}"
    return resnet(f"{root}.resnets.{index}", rest) if place == "0" else f"{root}.attentions.{index}.{rest}"


def resnet(root: str, rest: str) -> str | None:
    """A convolution of a residual block by diffusers' name."""
    return f"{root}.{RESNET[rest]}" if rest in RESNET else None
