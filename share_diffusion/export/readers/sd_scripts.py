"""kohya's sd-scripts: layers inside attention and residual blocks, and CLIP's attention and feed-forward.

What lies outside those blocks (conv_in, conv_out, the time embeddings) has no module there. In SD 1.x and 2.x it looks
for `lora_te_` alone and ignores `lora_te1_` silently; the UNet of SDXL has the original names and is renamed to them.
"""

from __future__ import annotations

import re

from share_diffusion.export.family import FLUX, SD3, Family
from share_diffusion.export.readers import keys

NAME = "sd-scripts"
TEXT = {"SDXL": ("lora_te1_", "lora_te2_")}
INSIDE = re.compile(r".*\.(attentions|resnets|downsamplers|upsamplers)\.")


def lora(key: str, family: Family) -> str | None:
    """Return why sd-scripts passes over a key of a LoRA, or None."""
    stem, ending = keys.apart(key)
    if ending not in keys.KOHYA_ENDINGS or not stem.startswith("lora_"):
        return "only kohya's names are read; export --format kohya"
    if family in (FLUX, SD3):
        known = (*keys.ORIGINAL_STARTS[family.name], "lora_te1_", "lora_te2_", "lora_te3_")
        return None if stem.startswith(known) else "it lies outside the blocks that sd-scripts adapts"
    if not keys.is_stock(family):
        return keys.foreign(family)
    if stem in keys.kohya_text(family, TEXT.get(family.name, ("lora_te_",))):
        return None
    if stem.startswith("lora_te1_") and family.name != "SDXL":
        return "lora_te1_ is ignored in this family; it is lora_te_ there"
    module = keys.kohya_unet(family).get(stem)
    if module is None:
        return "no such layer"
    if family.name != "SDXL" and stem.startswith(("lora_unet_input", "lora_unet_middle", "lora_unet_output")):
        return "the original UNet names are read in SDXL only"
    return None if INSIDE.match(f"{module}.") else "it lies outside the blocks that sd-scripts adapts"


def checkpoint(key: str, family: Family) -> str | None:
    """Return why sd-scripts passes over a tensor of a checkpoint, or None."""
    return keys.checkpoint_reason(key, family)


def folder(names: frozenset[str], clip_prefixed: bool, family: Family) -> list[str]:
    """Return what keeps sd-scripts from opening a pipeline folder."""
    from share_diffusion.export.readers.invokeai import diffusers_folder

    return diffusers_folder(names, clip_prefixed)
