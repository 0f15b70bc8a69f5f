"""Stable Diffusion XL: two CLIP text encoders, a UNet that is told each picture's size and crop, a VAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from share_diffusion.models import targets
from share_diffusion.models.family import Family, Reader, Size
from share_diffusion.models.latents import reduction
from share_diffusion.models.noise import DIFFUSION
from share_diffusion.models.stable_diffusion import call_arguments, native_resolution


def owns(pipeline: Any) -> bool:
    """Tell whether a pipeline is of this family; the refiner, which has one text encoder, is not."""
    parts = [getattr(pipeline, name, None) for name in ("unet", "vae", "text_encoder", "text_encoder_2")]
    return None not in parts


def readers(pipeline: Any) -> dict[str, Reader]:
    """Return how the two text encoders read."""
    return {
        "text_encoder": Reader(pipeline.tokenizer, pipeline.tokenizer.model_max_length),
        "text_encoder_2": Reader(pipeline.tokenizer_2, pipeline.tokenizer_2.model_max_length),
    }


def encode_text(pipeline: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return both encoders' last but one states side by side (n, L, width), and the second's projection (n, width)."""
    first, second = pipeline.text_encoder, pipeline.text_encoder_2
    one = first(inputs["text_encoder"].to(first.device), output_hidden_states=True)
    two = second(inputs["text_encoder_2"].to(second.device), output_hidden_states=True)
    return {"states": torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1), "pooled": two.text_embeds}


def framing(pipeline: Any, originals: Sequence[Size], corners: Sequence[Size], size: Size) -> dict[str, Tensor]:
    """Return `time_ids` (n, 6): original size, the crop's corner (top, left) and the size, heights first."""
    rows = [(*original, *corner, *size) for original, corner in zip(originals, corners, strict=True)]
    return {"time_ids": torch.tensor(rows, dtype=torch.float32)}


def predict(pipeline: Any, noisy: Tensor, times: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
    """Return the UNet's prediction (n, c, h, w); without `time_ids` the pictures are whole and of their own size."""
    unet = pipeline.unet
    time_ids = conditioning.get("time_ids")
    if time_ids is None:
        size = noisy.shape[-2] * reduction(pipeline), noisy.shape[-1] * reduction(pipeline)
        time_ids = framing(pipeline, [size] * len(noisy), [(0, 0)] * len(noisy), size)["time_ids"]
    return unet(
        noisy.to(unet.dtype),
        times,
        encoder_hidden_states=conditioning["states"].to(unet.dtype),
        added_cond_kwargs={
            "text_embeds": conditioning["pooled"].to(unet.dtype),
            "time_ids": time_ids.to(noisy.device, unet.dtype),
        },
    ).sample


def idle(pipeline: Any) -> tuple[str, ...]:
    """Return the first text encoder's last block: what it makes is never read."""
    return (f"text_encoder.text_model.encoder.layers.{pipeline.text_encoder.config.num_hidden_layers - 1}.",)


def sampling(pipeline: Any) -> tuple[int, float]:
    """Return default steps and guidance scale."""
    return 30, 5.0


def version(pipeline: Any) -> str:
    """Return kohya's name."""
    return "sdxl_base_v1-0"


def architecture(pipeline: Any) -> str:
    """Return ModelSpec's name."""
    return "stable-diffusion-xl-v1-base"


FAMILY = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    denoiser="unet",
    owns=owns,
    attention=f"{targets.UNET_ATTENTION}|{targets.CLIP_ATTENTION}",
    feed_forward=f"{targets.UNET_FEED_FORWARD}|{targets.CLIP_FEED_FORWARD}",
    convolution=targets.UNET_CONVOLUTION,
    readers=readers,
    encode_text=encode_text,
    predict=predict,
    noise=DIFFUSION,
    native_resolution=native_resolution,
    grain=reduction,
    sampling=sampling,
    call_arguments=call_arguments,
    version=version,
    architecture=architecture,
    kohya_prefixes={"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
    idle=idle,
    framing=framing,
)
