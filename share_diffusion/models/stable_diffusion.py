"""Stable Diffusion 1.x and 2.x, and every model of their shape: one CLIP text encoder, a UNet, a VAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from share_diffusion.models import targets
from share_diffusion.models.family import Family, Reader
from share_diffusion.models.latents import reduction
from share_diffusion.models.noise import DIFFUSION


def owns(pipeline: Any) -> bool:
    """Tell whether a pipeline is of this family."""
    parts = [getattr(pipeline, name, None) for name in ("unet", "vae", "text_encoder")]
    return None not in parts and getattr(pipeline, "text_encoder_2", None) is None


def readers(pipeline: Any) -> dict[str, Reader]:
    """Return how the text encoder reads."""
    return {"text_encoder": Reader(pipeline.tokenizer, pipeline.tokenizer.model_max_length)}


def encode_text(pipeline: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the text encoder's last states (n, L, width)."""
    encoder = pipeline.text_encoder
    return {"states": encoder(inputs["text_encoder"].to(encoder.device))[0]}


def predict(pipeline: Any, noisy: Tensor, times: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
    """Return the UNet's prediction (n, c, h, w)."""
    states = conditioning["states"].to(pipeline.unet.dtype)
    return pipeline.unet(noisy.to(pipeline.unet.dtype), times, encoder_hidden_states=states).sample


def native_resolution(pipeline: Any) -> int:
    """Return the side of the pictures that the base was made for."""
    return pipeline.unet.config.sample_size * reduction(pipeline)


def sampling(pipeline: Any) -> tuple[int, float]:
    """Return default steps and guidance scale; small bases want less of both (`tiny`: nights lose their stars above 2)."""
    return (25, 2.0) if native_resolution(pipeline) <= 128 else (30, 7.5)


def call_arguments(pipeline: Any, negative_prompts: Sequence[str], guidance_scale: float) -> dict[str, Any]:
    """Return what the pipeline's call takes for guidance."""
    return {"negative_prompt": list(negative_prompts), "guidance_scale": guidance_scale}


def generation(pipeline: Any) -> int:
    """Return 1 or 2: only 2.x reads OpenCLIP's states of width 1024."""
    return 2 if pipeline.unet.config.cross_attention_dim == 1024 else 1


def predicts_velocity(pipeline: Any) -> bool:
    """Tell whether the UNet predicts v."""
    return pipeline.scheduler.config.prediction_type == "v_prediction"


def version(pipeline: Any) -> str:
    """Return kohya's name: sd_v1, sd_v2 or sd_v2_v."""
    return f"sd_v{generation(pipeline)}{'_v' if predicts_velocity(pipeline) else ''}"


def architecture(pipeline: Any) -> str:
    """Return ModelSpec's name."""
    if generation(pipeline) == 1:
        return "stable-diffusion-v1"
    return "stable-diffusion-v2-768-v" if predicts_velocity(pipeline) else "stable-diffusion-v2-512"


FAMILY = Family(
    name="sd",
    title="Stable Diffusion 1.x and 2.x",
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
    kohya_prefixes={"unet": "lora_unet_", "text_encoder": "lora_te_"},
)
