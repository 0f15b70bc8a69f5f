"""InvokeAI: kohya's names; it raises on a key that is left over, where others log a line.

It is told SD 1.x, SD 2.x and SDXL apart by the widths of the matrices, and takes diffusers' or the original UNet names.
"""

from __future__ import annotations

from share_diffusion.export.family import FLUX, Family
from share_diffusion.export.readers import keys

NAME = "InvokeAI"
TEXT = {"SDXL": ("lora_te1_", "lora_te2_")}


def lora(key: str, family: Family) -> str | None:
    """Return why InvokeAI refuses a key of a LoRA, or None."""
    stem, ending = keys.apart(key)
    if family is FLUX:
        known = ("transformer.", *keys.ORIGINAL_STARTS[family.name], "lora_te1_")
        return None if stem.startswith(known) else "no such layer"
    if ending not in keys.KOHYA_ENDINGS or not stem.startswith("lora_"):
        return "only kohya's names are read, anything else raises; export --format kohya"
    if not keys.is_stock(family):
        return keys.foreign(family)
    known = stem in keys.kohya_unet(family) or stem in keys.kohya_text(family, TEXT.get(family.name, ("lora_te_",)))
    return None if known else "no such layer, it raises"


def checkpoint(key: str, family: Family) -> str | None:
    """Return why InvokeAI passes over a tensor of a checkpoint, or None."""
    return keys.checkpoint_reason(key, family)


def folder(names: frozenset[str], clip_prefixed: bool, family: Family) -> list[str]:
    """Return what keeps InvokeAI, which pins an older transformers, from opening a pipeline folder."""
    return diffusers_folder(names, clip_prefixed)


def diffusers_folder(names: frozenset[str], clip_prefixed: bool) -> list[str]:
    """Return what an older diffusers and transformers would stumble over in a pipeline folder."""
    problems = [] if "model_index.json" in names else ["there is no model_index.json"]
    problems += [] if clip_prefixed else ["the text encoder's names lack text_model., it would start at random"]
    for home in sorted({name.rpartition("/")[0] for name in names if name.endswith("tokenizer.json")}):
        if f"{home}/vocab.json" not in names and f"{home}/merges.txt" not in names and "3" not in home:
            problems.append(f"{home} lacks vocab.json and merges.txt")
    return problems
