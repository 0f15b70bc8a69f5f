"""ComfyUI: every key it can name in the loaded model; others are skipped with a line in its log.

The UNet answers to kohya's names, in diffusers' and the original spelling, and to attention processors; PEFT's
`to_q.lora_A` matches nothing in a UNet. The text encoders answer to kohya's names and to their dotted paths.
"""

from __future__ import annotations

from share_diffusion.export.family import FLUX, SD3, Family
from share_diffusion.export.readers import keys

NAME = "ComfyUI"
TEXT = ("lora_te_|lora_te1_", "lora_te2_")


def lora(key: str, family: Family) -> str | None:
    """Return why ComfyUI passes over a key of a LoRA, or None."""
    stem, ending = keys.apart(key)
    if not ending:
        return "no LoRA matrix by its ending"
    if family in (SD3, FLUX):
        known = ("transformer.", *keys.ORIGINAL_STARTS[family.name], "lora_te")
        return None if stem.startswith(known) else "no such layer"
    if not keys.is_stock(family):
        return f"{keys.foreign(family)} without the nodes of app/comfyui"
    if stem.startswith("lora_"):
        return None if stem in keys.kohya_unet(family) or stem in keys.kohya_text(family, TEXT) else "no such layer"
    if stem in keys.dotted_text(family) or stem in keys.processor_names(family):
        return None
    if ending in keys.PEFT_ENDINGS:
        return "PEFT's names of UNet layers match nothing in it; export --format kohya"
    return "no such layer"


def checkpoint(key: str, family: Family) -> str | None:
    """Return why ComfyUI passes over a tensor of a checkpoint, or None."""
    return keys.checkpoint_reason(key, family)


def folder(names: frozenset[str], clip_prefixed: bool, family: Family) -> list[str]:
    """Return what keeps ComfyUI's DiffusersLoader from opening a pipeline folder."""
    problems = [] if clip_prefixed else ["the text encoder's names lack text_model., it would be NaN"]
    return problems + ([] if keys.is_stock(family) else [keys.foreign(family)])
