"""XLabs' dialect of FLUX: one LoRA for each stream of a double block, one for a single block.

double_blocks.0.processor.qkv_lora1.down.weight     the picture's stream; `lora2` is the text's
single_blocks.0.processor.proj_lora.up.weight
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import Tensor

from share_diffusion.lora.assemble import Role, assemble
from share_diffusion.lora.factors import Factors
from share_diffusion.lora.native import renamed

DOUBLE = re.compile(r"(?:diffusion_model\.)?(double_blocks\.\d+)\.processor\.(qkv|proj)_lora([12])\.(up|down)\.weight")
SINGLE = re.compile(r"(?:diffusion_model\.)?(single_blocks\.\d+)\.processor\.(qkv|proj)_lora\.(up|down)\.weight")


def is_xlabs(keys: Collection[str]) -> bool:
    """Whether a file is XLabs'."""
    return any(DOUBLE.fullmatch(key) or SINGLE.fullmatch(key) for key in keys)


def read_xlabs(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], most: int) -> dict[str, Factors]:
    """The layers of an XLabs file, which knows no scale."""
    return renamed(assemble(tensors, split_xlabs))


def split_xlabs(key: str) -> tuple[str, Role] | None:
    """`double_blocks.3.processor.qkv_lora2.up.weight` -> (`transformer.double_blocks.3.txt_attn.qkv`, `up`)."""
    if match := DOUBLE.fullmatch(key):
        block, name, stream, role = match.groups()
        return f"transformer.{block}.{'img' if stream == '1' else 'txt'}_attn.{name}", role
    if match := SINGLE.fullmatch(key):
        block, name, role = match.groups()
        return f"transformer.{block}.{'qkv' if name == 'qkv' else 'linear2'}", role
    return None
