"""FLUX.1, dev and schnell: CLIP for one vector, T5 for the words, a transformer on packed latents, flow matching.

dev is distilled to take its guidance as an input. Training tells it 1, which is what it then predicts without any
guidance; `guidance` (n) in the conditioning tells it otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from share_diffusion.models import targets
from share_diffusion.models.family import Family, Reader, inner
from share_diffusion.models.latents import latent_shape, reduction
from share_diffusion.models.noise import FLOW


def owns(pipeline: Any) -> bool:
    """Tell whether a pipeline is of this family; those that also take pictures (Fill, Depth, Redux) are not."""
    transformer: Any = getattr(pipeline, "transformer", None)
    vae = getattr(pipeline, "vae", None)
    if vae is None or type(inner(transformer)).__name__ != "FluxTransformer2DModel":
        return False
    return transformer.config.in_channels == 4 * vae.config.latent_channels


def takes_guidance(pipeline: Any) -> bool:
    """Tell dev, which takes guidance as an input, from schnell."""
    return pipeline.transformer.config.guidance_embeds


def t5_tokens(pipeline: Any) -> int:
    """Return how many tokens T5 is given: there is no mask, so that padding is seen, as many as in the base's training."""
    return 512 if takes_guidance(pipeline) else 256


def readers(pipeline: Any) -> dict[str, Reader]:
    """Return how the two text encoders read."""
    return {
        "text_encoder": Reader(pipeline.tokenizer, pipeline.tokenizer.model_max_length),
        "text_encoder_2": Reader(pipeline.tokenizer_2, t5_tokens(pipeline)),
    }


def encode_text(pipeline: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return T5's states (n, L, width) and CLIP's pooled state (n, width)."""
    clip, t5 = pipeline.text_encoder, pipeline.text_encoder_2
    pooled = clip(inputs["text_encoder"].to(clip.device)).pooler_output
    return {"states": t5(inputs["text_encoder_2"].to(t5.device))[0], "pooled": pooled}


def pack(latents: Tensor) -> Tensor:
    """Return latents (n, c, h, w) as patches of 2 x 2, (n, h / 2 * w / 2, 4 c)."""
    n, c, h, w = latents.shape
    patches = latents.unflatten(3, (w // 2, 2)).unflatten(2, (h // 2, 2))  # (n, c, h / 2, 2, w / 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(n, (h // 2) * (w // 2), 4 * c)


def unpack(packed: Tensor, h: int, w: int) -> Tensor:
    """Return latents (n, c, h, w) of their patches: the inverse of `pack`."""
    n, _, width = packed.shape
    patches = packed.view(n, h // 2, w // 2, width // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(n, width // 4, h, w)


def latents_of_drawn(pipeline: Any, drawn: Tensor, size: tuple[int, int]) -> Tensor:
    """Return latents (n, c, h, w) of the patches that the pipeline hands out for pictures of a size."""
    return unpack(drawn, *latent_shape(pipeline, size)[1:])


def places(h: int, w: int) -> Tensor:
    """Return the patches' places (h / 2 * w / 2, 3): zero, row, column."""
    rows, columns = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).float()


def predict(pipeline: Any, noisy: Tensor, times: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
    """Return the transformer's prediction (n, c, h, w)."""
    transformer, (h, w) = pipeline.transformer, noisy.shape[-2:]
    states = conditioning["states"].to(transformer.dtype)
    guidance = conditioning.get("guidance", torch.ones(len(noisy))).to(noisy.device) if takes_guidance(pipeline) else None
    predicted = transformer(
        hidden_states=pack(noisy).to(transformer.dtype),
        timestep=times / 1000,  # the transformer multiplies by 1000 again, whatever the scheduler's number of times
        guidance=guidance,
        pooled_projections=conditioning["pooled"].to(transformer.dtype),
        encoder_hidden_states=states,
        txt_ids=torch.zeros(states.shape[1], 3, device=noisy.device, dtype=transformer.dtype),
        img_ids=places(h, w).to(noisy.device, transformer.dtype),
    ).sample
    return unpack(predicted, h, w)


def native_resolution(pipeline: Any) -> int:
    """Return the side of the pictures that the base was made for."""
    return pipeline.default_sample_size * reduction(pipeline)


def grain(pipeline: Any) -> int:
    """Return the side of the pixels of one patch."""
    return 2 * reduction(pipeline)


def sampling(pipeline: Any) -> tuple[int, float]:
    """Return default steps and guidance scale."""
    return (28, 3.5) if takes_guidance(pipeline) else (4, 0.0)


def call_arguments(pipeline: Any, negative_prompts: Sequence[str], guidance_scale: float) -> dict[str, Any]:
    """Return what the pipeline's call takes for guidance.

    With a negative prompt the scale is that of true classifier-free guidance, which costs a second pass a step, and the
    distilled guidance is 1.
    """
    arguments: dict[str, Any] = {"max_sequence_length": t5_tokens(pipeline)}
    if not any(negative_prompts):
        return {**arguments, "guidance_scale": guidance_scale}
    return {
        **arguments,
        "guidance_scale": 1.0,
        "negative_prompt": list(negative_prompts),
        "true_cfg_scale": guidance_scale,
    }


def version(pipeline: Any) -> str:
    """Return kohya's name."""
    return "flux1"


def architecture(pipeline: Any) -> str:
    """Return ModelSpec's name."""
    return "flux-1-dev" if takes_guidance(pipeline) else "flux-1-schnell"


FAMILY = Family(
    name="flux",
    title="FLUX.1",
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
    latents_of_drawn=latents_of_drawn,
    kohya_prefixes={"transformer": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te3_"},
)
