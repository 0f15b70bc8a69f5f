"""The VAE: diffusers' `decoder.up_blocks.0` is `decoder.up.3`, since the original counts from the picture's side.

The projections of its attention are 1 x 1 convolutions in the original and linear layers here.
"""

from __future__ import annotations

import re
from collections.abc import Collection

LEVEL = re.compile(r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)")
MIDDLE = re.compile(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OUTSIDE = re.compile(r"((encoder|decoder)\.conv_(in|out)|(post_)?quant_conv)\.")


def original_vae(names: Collection[str]) -> dict[str, str]:
    """Return the original name of every parameter of a VAE; ValueError lists those without one."""
    levels = 1 + max((int(match[2]) for match in map(LEVEL.fullmatch, names) if match), default=0)
    renamed = {name: rename(name, levels) for name in names}
    if unknown := [name for name, original in renamed.items() if original is None]:
        raise ValueError(f"{len(unknown)} parts of the VAE have no name in a single-file checkpoint, such as {unknown[0]}")
    return {name: original for name, original in renamed.items() if original is not None}


def rename(name: str, levels: int) -> str | None:
    """Return one name in the original of a VAE with so many levels."""
    if match := LEVEL.fullmatch(name):
        half, level, part, number, rest = match[1], int(match[2]), match[3], match[4], match[5]
        place = f"{half}.down.{level}" if half == "encoder" else f"{half}.up.{levels - 1 - level}"
        if part == "resnets":
            return f"{place}.block.{number}.{rest.replace('conv_shortcut', 'nin_shortcut')}"
        return f"{place}.{part.removesuffix('rs')}.{rest}"
    if match := MIDDLE.fullmatch(name):
        if match[2] == "resnets":
            return f"{match[1]}.mid.block_{int(match[3]) + 1}.{match[4]}"
        stem, _, ending = match[4].rpartition(".")
        return f"{match[1]}.mid.attn_1.{ATTENTION[stem]}.{ending}" if stem in ATTENTION else None
    if OUTSIDE.match(name):
        return name
    if name.startswith(("encoder.conv_norm_out.", "decoder.conv_norm_out.")):
        return name.replace("conv_norm_out", "norm_out")
    return None


def is_projection(name: str) -> bool:
    """Return whether a parameter is the weight of an attention projection, a 1 x 1 convolution in the original."""
    match = MIDDLE.fullmatch(name)
    return bool(match and match[2] == "attentions" and match[4].startswith("to_") and name.endswith(".weight"))
