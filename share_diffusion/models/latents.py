"""Pictures to latents and back, for autoencoders that diffusers calls AutoencoderKL: latents = (z - shift) * scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def reduction(pipeline: Any) -> int:
    """Return how many pixels of a side become one latent."""
    return 2 ** (len(pipeline.vae.config.block_out_channels) - 1)


@torch.no_grad()
def encode_pictures(pipeline: Any, pictures: Tensor) -> Tensor:
    """Return latents (n, c, h, w) of pictures (n, 3, height, width), the mean of the posterior."""
    vae = pipeline.vae
    latents = vae.encode(pictures.to(vae.device, vae.dtype)).latent_dist.mean
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return ((latents - shift) * vae.config.scaling_factor).float()


@torch.no_grad()
def decode_latents(pipeline: Any, latents: Tensor) -> Tensor:
    """Return pictures (n, 3, height, width) in [-1, 1] of latents (n, c, h, w)."""
    vae = pipeline.vae
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return vae.decode((latents / vae.config.scaling_factor + shift).to(vae.dtype)).sample.float().clamp(-1, 1)


def latent_shape(pipeline: Any, size: tuple[int, int]) -> tuple[int, int, int]:
    """Return (c, h, w) of the latents of pictures of a size (height, width)."""
    height, width = size
    return pipeline.vae.config.latent_channels, height // reduction(pipeline), width // reduction(pipeline)
