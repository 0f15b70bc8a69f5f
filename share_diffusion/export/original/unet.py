"""The UNet: diffusers' `down_blocks.1.attentions.0` is `input_blocks.4.1` in a single-file checkpoint.

In the original a UNet is one list of input blocks, a middle and one list of output blocks. With L layers a level, level
i starts at 1 + i (L + 1) among the inputs (0 is `conv_in`, the last of a level the downsampler) and at i (L + 1) among the
outputs. Within a block 0 is the residual part, 1 the attention, and the upsampler comes last.
"""

from __future__ import annotations

import re
from collections.abc import Collection

OUTER = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
PARTS = {"resnets": 0, "attentions": 1}
LEVEL = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def original_unet(names: Collection[str]) -> dict[str, str]:
    """Return the original name of every parameter or module of a UNet; ValueError lists those without one."""
    found = [match for match in map(LEVEL.fullmatch, names) if match]
    layers = 1 + max((int(match[4]) for match in found if match[1] == "down" and match[3] == "resnets"), default=0)
    attending = {match[2] for match in found if match[1] == "up" and match[3] == "attentions"}
    renamed = {name: rename(name, layers, attending) for name in names}
    if unknown := [name for name, original in renamed.items() if original is None]:
        raise ValueError(f"{len(unknown)} parts of the UNet have no name in a single-file checkpoint, such as {unknown[0]}")
    return {name: original for name, original in renamed.items() if original is not None}


def rename(name: str, layers: int, attending: Collection[str]) -> str | None:
    """Return one name in the original; `attending` are the output levels with attention, whose upsampler is number 2."""
    if match := LEVEL.fullmatch(name):
        return in_level(match, layers, attending)
    if match := MIDDLE.fullmatch(name):
        place = 1 if match[1] == "attentions" else 2 * int(match[2])
        return f"middle_block.{place}.{inner(match[1], match[3])}"
    for part, original in OUTER.items():
        if name == part or name.startswith(f"{part}."):
            return original + name.removeprefix(part)
    return None


def in_level(match: re.Match[str], layers: int, attending: Collection[str]) -> str:
    """Return the original name of a part of one level."""
    side, level, part, number, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    blocks, start = ("input_blocks", 1) if side == "down" else ("output_blocks", 0)
    first = start + level * (layers + 1)
    if part == "downsamplers":
        return f"{blocks}.{first + layers}.0.op{rest.removeprefix('conv')}"
    if part == "upsamplers":
        return f"{blocks}.{first + layers}.{2 if match[2] in attending else 1}.{rest}"
    return f"{blocks}.{first + number}.{PARTS[part]}.{inner(part, rest)}"


def inner(part: str, rest: str) -> str:
    """Return the name inside a residual part; attention is spelled alike in both."""
    word, _, ending = rest.partition(".")
    if part == "attentions":
        return rest
    return RESIDUAL.get(word, word) + (f".{ending}" if ending else "")
