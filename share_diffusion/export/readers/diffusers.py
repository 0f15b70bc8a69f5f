"""diffusers' `load_lora_weights`, `from_single_file` and `from_pretrained`.

A LoRA may be dotted under its component's name, of any base, or kohya's, which it renames for SD 1.x, 2.x, SDXL and
FLUX. Of kohya's it knows attention, feed-forward, residual blocks and samplers, not the layers outside.
"""

from __future__ import annotations

import re

from share_diffusion.export.family import FLUX, SD3, Family
from share_diffusion.export.readers import keys
from share_diffusion.lora.names import COMPONENTS, dotted

NAME = "diffusers"
PREFIXES = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
T5 = {"FLUX.1": ("text_encoder_2.", "lora_te3_"), "SD 3": ("text_encoder_3.", "lora_te3_")}
INSIDE = re.compile(r".*(attentions|resnets|downsamplers|upsamplers|self_attn|mlp)\.")


def lora(key: str, family: Family) -> str | None:
    """Return why diffusers passes over a key of a LoRA, or None."""
    stem, ending = keys.apart(key)
    if not ending:
        return "no LoRA matrix by its ending"
    if stem.startswith(T5.get(family.name, ())):
        return "it loads no LoRA into T5"
    if not stem.startswith("lora_"):
        return None if stem.partition(".")[0] in COMPONENTS else "no component of a pipeline by its first word"
    if family in (SD3, FLUX):
        return None if family is FLUX else "kohya's names of SD 3 are not read; export --format diffusers"
    if keys.is_stock(family) and stem in keys.kohya_unet(family):
        module = keys.kohya_unet(family)[stem]
        return None if INSIDE.match(f"{module}.") else "it renames no layers outside the blocks; export --format diffusers"
    prefix = next((prefix for prefix in PREFIXES if stem.startswith(prefix)), None)
    module = None if prefix is None else dotted(stem.removeprefix(prefix), PREFIXES[prefix])
    if module is None:
        return "no such layer"
    return None if INSIDE.match(f"{module}.") else "it renames no layers outside the blocks; export --format diffusers"


def checkpoint(key: str, family: Family) -> str | None:
    """Return why diffusers passes over a tensor of a checkpoint, or None."""
    return keys.checkpoint_reason(key, family)


def folder(names: frozenset[str], clip_prefixed: bool, family: Family) -> list[str]:
    """Return what keeps diffusers from opening a pipeline folder."""
    from share_diffusion.export.readers.invokeai import diffusers_folder

    return diffusers_folder(names, clip_prefixed)
