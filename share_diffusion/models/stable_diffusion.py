"""Stable Diffusion 1.x and 2.x, and every model of their shape: one CLIP text encoder, a UNet, a VAE.

Shapes: pictures (n, 3, height, width) in [-1, 1], latents (n, c, height / f, width / f), states (n, tokens, width).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

KIND = "stable-diffusion"


def owns(pipeline: Any) -> bool:
    """Tell whether a pipeline is of this family."""
    return getattr(pipeline, "unet", None) is not None and getattr(pipeline, "text_encoder_2", None) is None


def tokenize(pipeline: Any, captions: Sequence[str]) -> Tensor:
    """Return token ids (n, tokens), padded and cut to what the text encoder takes."""
    tokenizer = pipeline.tokenizer
    return tokenizer(
        list(captions),
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids


def too_long(pipeline: Any, captions: Sequence[str]) -> list[str]:
    """Return the captions that would be cut."""
    limit = pipeline.tokenizer.model_max_length
    return [text for text in captions if len(pipeline.tokenizer(text).input_ids) > limit]


def encode_text(pipeline: Any, tokens: Tensor) -> Tensor:
    """Return the text encoder's states; gradients flow where it is adapted."""
    return pipeline.text_encoder(tokens.to(pipeline.text_encoder.device))[0]


@torch.no_grad()
def encode_pictures(pipeline: Any, pictures: Tensor) -> Tensor:
    """Return scaled latents, the mean of the posterior."""
    vae = pipeline.vae
    latents = vae.encode(pictures.to(vae.device, vae.dtype)).latent_dist.mean
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return ((latents - shift) * vae.config.scaling_factor).float()


@torch.no_grad()
def decode_latents(pipeline: Any, latents: Tensor) -> Tensor:
    """Return pictures of scaled latents."""
    vae = pipeline.vae
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return vae.decode((latents / vae.config.scaling_factor + shift).to(vae.dtype)).sample.float().clamp(-1, 1)


def predict(pipeline: Any, noisy: Tensor, times: Tensor, states: Tensor) -> Tensor:
    """Return the denoiser's prediction for noisy latents at integer times."""
    return pipeline.unet(noisy, times, encoder_hidden_states=states).sample


def latent_side(pipeline: Any, resolution: int) -> int:
    """Return the side of the latents of square pictures."""
    return resolution // 2 ** (len(pipeline.vae.config.block_out_channels) - 1)


def native_resolution(pipeline: Any) -> int:
    """Return the side of the pictures that the base was made for."""
    return pipeline.unet.config.sample_size * 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
