"""Which family of base models a set of layers belongs to, and what other programs call that family."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Family:
    """One family's names: in kohya's and ModelSpec's metadata, in A1111's sidecar, and the side of its pictures."""

    name: str
    kohya: str = ""
    modelspec: str = ""
    sidecar: str = "Unknown"
    resolution: int = 0
    implementation: str = "https://github.com/Stability-AI/generative-models"


SD1 = Family("SD 1.x", "sd_v1", "stable-diffusion-v1", "SD1", 512)
SD2 = Family("SD 2.x", "sd_v2", "stable-diffusion-v2-512", "SD2", 512)
SD2_V = Family("SD 2.x", "sd_v2_v", "stable-diffusion-v2-768-v", "SD2", 768)
SDXL = Family("SDXL", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base", "SDXL", 1024)
SD3 = Family("SD 3", "sd3_m", "stable-diffusion-3-medium", "SD3", 1024)
FLUX = Family("FLUX.1", "flux1", "flux-1-dev", "Flux", 1024, "https://github.com/black-forest-labs/flux")
OTHER = Family("another base", implementation="diffusers")

Shapes = Mapping[str, tuple[int, int]]  # layer -> (out, in)
STOCK_WIDTHS = {320, 640, 1280}
CROSS = re.compile(r"unet\..*\.attn2\.to_[kv]$")
QUERY = re.compile(r"unet\..*\.attn[12]\.to_q$")
CLIP = re.compile(r"text_encoder\.text_model\.encoder\.layers\.\d+\.self_attn\.[qkv]_proj$")
BY_CONTEXT = {768: SD1, 1024: SD2, 2048: SDXL}


def family_of(shapes: Shapes) -> Family:
    """Return the family that layers of these paths and shapes belong to, as far as they tell."""
    if any(layer.startswith("transformer.") for layer in shapes):
        return FLUX if any("single_transformer_blocks" in layer for layer in shapes) else SD3
    stock = all(shapes[layer][0] in STOCK_WIDTHS for layer in shapes if QUERY.match(layer))
    contexts = {shapes[layer][1] for layer in shapes if CROSS.match(layer)}
    if len(contexts) == 1:
        return BY_CONTEXT.get(contexts.pop(), OTHER) if stock else OTHER
    if any(layer.startswith("text_encoder_2.") for layer in shapes):
        return SDXL
    widths = {shapes[layer][1] for layer in shapes if CLIP.match(layer)}
    return {768: SD1, 1024: SD2}.get(widths.pop(), OTHER) if len(widths) == 1 else OTHER


def predicted(pipeline: Any) -> str:
    """Return what a live pipeline predicts as ModelSpec spells it for Stable Diffusion, `epsilon` or `v`, else ''.

    Flow models (SD 3, FLUX) have no word in that standard.
    """
    if getattr(pipeline, "unet", None) is None:
        return ""
    return {"epsilon": "epsilon", "v_prediction": "v"}.get(getattr(pipeline.scheduler.config, "prediction_type", ""), "")


def family_of_pipeline(pipeline: Any) -> Family:
    """Return the family of a live pipeline; SD 2.x with velocity prediction, SD 3.5 and FLUX schnell have their own names."""
    from share_diffusion import models
    from share_diffusion.models.layers import layers, shape_of

    family = family_of({path: shape_of(module)[0] for path, module in layers(pipeline).items()})
    if family in (SD3, FLUX):
        return replace(family, modelspec=models.family_of(pipeline).architecture(pipeline))
    velocity = getattr(pipeline.scheduler.config, "prediction_type", "") == "v_prediction"
    return SD2_V if family is SD2 and velocity else family
