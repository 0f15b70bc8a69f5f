"""Stable Diffusion 3 and 3.5: two CLIP text encoders, T5 where it is loaded, a transformer, flow matching."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from share_diffusion.models import targets
from share_diffusion.models.family import Family, Reader, inner
from share_diffusion.models.latents import reduction
from share_diffusion.models.noise import FLOW
from share_diffusion.models.stable_diffusion import call_arguments

T5_TOKENS = 256


def owns(pipeline: Any) -> bool:
    """Tell whether a pipeline is of this family."""
    transformer = getattr(pipeline, "transformer", None)
    return type(inner(transformer)).__name__ == "SD3Transformer2DModel"


def readers(pipeline: Any) -> dict[str, Reader]:
    """Return how the text encoders read; T5 may be absent."""
    length = pipeline.tokenizer.model_max_length
    found = {"text_encoder": Reader(pipeline.tokenizer, length), "text_encoder_2": Reader(pipeline.tokenizer_2, length)}
    if pipeline.text_encoder_3 is not None:
        found["text_encoder_3"] = Reader(pipeline.tokenizer_3, T5_TOKENS)
    return found


def encode_text(pipeline: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return states (n, L, width): CLIP's side by side, padded, then T5's, zeros without it; and CLIP's projections."""
    clips = [(getattr(pipeline, name), inputs[name]) for name in ("text_encoder", "text_encoder_2")]
    outputs = [encoder(ids.to(encoder.device), output_hidden_states=True) for encoder, ids in clips]
    states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    width = pipeline.transformer.config.joint_attention_dim
    t5 = pipeline.text_encoder_3
    if t5 is None:
        long = states.new_zeros(len(states), T5_TOKENS, width)
    else:
        long = t5(inputs["text_encoder_3"].to(t5.device))[0]
    return {
        "states": torch.cat([F.pad(states, (0, width - states.shape[-1])), long], dim=1),
        "pooled": torch.cat([output.text_embeds for output in outputs], dim=-1),
    }


def predict(pipeline: Any, noisy: Tensor, times: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
    """Return the transformer's prediction (n, c, h, w)."""
    dtype = pipeline.transformer.dtype
    return pipeline.transformer(
        hidden_states=noisy.to(dtype),
        timestep=times,
        encoder_hidden_states=conditioning["states"].to(dtype),
        pooled_projections=conditioning["pooled"].to(dtype),
    ).sample


def native_resolution(pipeline: Any) -> int:
    """Return the side of the pictures that the base was made for."""
    return pipeline.transformer.config.sample_size * reduction(pipeline)


def grain(pipeline: Any) -> int:
    """Return the side of the pixels of one patch."""
    return reduction(pipeline) * pipeline.transformer.config.patch_size


def idle(pipeline: Any) -> tuple[str, ...]:
    """Return the last block's queries of the text: what the text becomes there is never read."""
    return (f"transformer.transformer_blocks.{pipeline.transformer.config.num_layers - 1}.attn.add_q_proj",)


def is_3_5(pipeline: Any) -> bool:
    """Tell 3.5, which normalises queries and keys, from 3."""
    return pipeline.transformer.config.qk_norm is not None


def sampling(pipeline: Any) -> tuple[int, float]:
    """Return default steps and guidance scale."""
    return 28, 4.5 if is_3_5(pipeline) else 7.0


def version(pipeline: Any) -> str:
    """Return kohya's name: medium, 5-medium or 5-large; only 3.5 medium attends twice in some blocks."""
    if not is_3_5(pipeline):
        return "medium"
    return "5-medium" if pipeline.transformer.config.dual_attention_layers else "5-large"


def architecture(pipeline: Any) -> str:
    """Return ModelSpec's name as kohya spells it."""
    return f"stable-diffusion-3-{version(pipeline)}"


FAMILY = Family(
    name="sd3",
    title="Stable Diffusion 3 and 3.5",
    denoiser="transformer",
    owns=owns,
    attention="|".join((targets.TRANSFORMER_ATTENTION, targets.CLIP_ATTENTION, targets.T5_ATTENTION)),
    feed_forward="|".join((targets.TRANSFORMER_FEED_FORWARD, targets.CLIP_FEED_FORWARD, targets.T5_FEED_FORWARD)),
    readers=readers,
    encode_text=encode_text,
    predict=predict,
    noise=FLOW,
    native_resolution=native_resolution,
    grain=grain,
    sampling=sampling,
    call_arguments=call_arguments,
    version=version,
    architecture=architecture,
    kohya_prefixes={
        "transformer": "lora_unet_",
        "text_encoder": "lora_te1_",
        "text_encoder_2": "lora_te2_",
        "text_encoder_3": "lora_te3_",
    },
    idle=idle,
)
