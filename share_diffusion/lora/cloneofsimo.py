"""The first LoRAs of Stable Diffusion (cloneofsimo/lora, 2022 and 2023): numbered, not named.

    unet:12:up, text_encoder:3:down      safetensors, numbered in the order of the model's own modules
    [up, down, up, down, ...]            a list in a .pt file, in the same order (here as `list:0:up`, ...)

That order was diffusers' of the day: blocks down, up, middle or down, middle, up; in each transformer block attn1, ff,
attn2 or attn1, attn2, ff. Which it was, the shapes decide. CLIP's projections come as k, v, q, out, as transformers
has always had them. The scale is 1.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping

from torch import Tensor

from share_diffusion.lora.assemble import Role, assemble
from share_diffusion.lora.factors import Factors

KEY = re.compile(r"(unet|text_encoder|list):(\d+):(up|down)")
Shape = tuple[int, int]  # (out, in)

DOWN = tuple(f"down_blocks.{block}.attentions.{index}" for block in range(3) for index in range(2))
MIDDLE = ("mid_block.attentions.0",)
UP = tuple(f"up_blocks.{block}.attentions.{index}" for block in range(1, 4) for index in range(3))
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
CLIP_PROJECTIONS = ("k_proj", "v_proj", "q_proj", "out_proj")
WIDTHS = {"down_blocks.0": 320, "down_blocks.1": 640, "down_blocks.2": 1280, "mid_block": 1280}
WIDTHS |= {"up_blocks.1": 1280, "up_blocks.2": 640, "up_blocks.3": 320}


def is_cloneofsimo(keys: Collection[str]) -> bool:
    """Whether a file is of this dialect."""
    return any(KEY.fullmatch(key) for key in keys)


def read_cloneofsimo(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], most: int) -> dict[str, Factors]:
    """The layers of a file, or a ValueError where no known order has its shapes."""
    pairs: dict[str, set[int]] = {}
    for match in map(KEY.fullmatch, tensors):
        if match:
            pairs.setdefault(match[1], set()).add(int(match[2]))
    names: dict[tuple[str, int], str] = {}
    for component, numbers in pairs.items():
        shapes = [shape(tensors, component, number) for number in range(len(numbers))]
        names |= {(component, number): name for number, name in enumerate(order(component, shapes))}

    def split(key: str) -> tuple[str, Role] | None:
        match = KEY.fullmatch(key)
        return (names[match[1], int(match[2])], match[3]) if match else None

    return assemble(tensors, split)


def shape(tensors: Mapping[str, Tensor], component: str, number: int) -> Shape:
    """(out, in) of one numbered pair."""
    up, down = (tensors.get(f"{component}:{number}:{role}") for role in ("up", "down"))
    if up is None or down is None or up.ndim != 2 or down.ndim != 2:
        raise ValueError(f"{component}:{number}: expected matrices up (out, r) and down (r, in), numbered without a gap")
    return up.shape[0], down.shape[1]


def order(component: str, shapes: list[Shape]) -> list[str]:
    """The layers that a component's numbered pairs are, of all known orders the one with these shapes."""
    if component != "unet" and len({side for pair in shapes for side in pair}) == 1 and len(shapes) % 4 == 0:
        return clip_layers(len(shapes) // 4)
    context = next((width for out, width in shapes if width not in (out, 320, 640, 1280)), 0)
    for blocks, parts in itertools.product(
        ((*DOWN, *UP, *MIDDLE), (*DOWN, *MIDDLE, *UP)),
        (("attn1", "ff", "attn2"), ("attn1", "attn2", "ff"), ("attn1", "attn2")),
    ):
        layers = [layer for block in blocks for part in parts for layer in block_layers(block, part, context)]
        if [expected for _, expected in layers] == shapes:
            return [name for name, _ in layers]
    raise ValueError(
        f"{component} has {len(shapes)} numbered pairs from {shapes[0]} to {shapes[-1]}, in none of the known orders of "
        "Stable Diffusion 1.x and 2.x (attention, with or without ff); only a file with names can be read for other models"
    )


def block_layers(block: str, part: str, context: int) -> list[tuple[str, Shape]]:
    """The layers of one part of a transformer block with their shapes (out, in)."""
    width = WIDTHS[block.partition(".attentions")[0]]
    root = f"unet.{block}.transformer_blocks.0"
    if part == "ff":
        return [(f"{root}.ff.net.0.proj", (8 * width, width))]
    source = context if part == "attn2" else width
    sides = (width, source, source, width)
    return [(f"{root}.{part}.{name}", (width, side)) for name, side in zip(PROJECTIONS, sides, strict=True)]


def clip_layers(count: int) -> list[str]:
    """The attention projections of a CLIP text encoder with `count` layers."""
    root = "text_encoder.text_model.encoder.layers"
    return [f"{root}.{number}.self_attn.{name}" for number in range(count) for name in CLIP_PROJECTIONS]
