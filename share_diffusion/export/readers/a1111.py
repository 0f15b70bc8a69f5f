"""AUTOMATIC1111 and Forge: kohya's names alone, taken apart at the first dot.

They rename diffusers' UNet names to the original ones by patterns, which know no `add_embedding`. Of the text encoders
they take `lora_te_` in SD 1.x and 2.x and `lora_te1_`, `lora_te2_` in SDXL. Forge rejects a file with more than a dozen
keys that it does not match.
"""

from __future__ import annotations

from share_diffusion.export.family import Family
from share_diffusion.export.readers import keys

NAME = "A1111 / Forge"
TEXT = {"SDXL": ("lora_te1_", "lora_te2_")}


def lora(key: str, family: Family) -> str | None:
    """Return why A1111 passes over a key of a LoRA, or None."""
    stem, ending = keys.apart(key)
    if ending not in keys.KOHYA_ENDINGS or not stem.startswith("lora_"):
        return "only kohya's names are read; export --format kohya"
    if not keys.is_stock(family):
        return keys.foreign(family)
    if "add_embedding" in stem:
        return "add_embedding is in none of its patterns"
    known = stem in keys.kohya_unet(family) or stem in keys.kohya_text(family, TEXT.get(family.name, ("lora_te_|lora_te1_",)))
    return None if known else "no such layer"


def checkpoint(key: str, family: Family) -> str | None:
    """Return why A1111 passes over a tensor of a checkpoint, or None."""
    return keys.checkpoint_reason(key, family)


def folder(names: frozenset[str], clip_prefixed: bool, family: Family) -> list[str]:
    """Return what keeps A1111 from opening a pipeline folder."""
    return ["it opens single files, no folders; export --format checkpoint"]
