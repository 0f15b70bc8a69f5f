"""A pipeline as one file in the original layout: `model.diffusion_model.`, `first_stage_model.` and the text encoders.

SD 1.x, SD 2.x and SDXL have one. Tensors are converted and written one by one, so a file of SDXL's size costs no memory
beyond the pipeline's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from share_diffusion.export.family import SD1, SD2, SD2_V, SDXL, Family
from share_diffusion.export.original.clip import clip_entries, open_clip_entries
from share_diffusion.export.original.unet import original_unet
from share_diffusion.export.original.vae import is_projection, original_vae
from share_diffusion.export.stream import Entry, entry, write_stream

Entries = dict[str, Entry]
# What the original text encoders have, the layer that diffusers leaves out included.
OPEN_CLIP_LAYERS = {SD2.name: 24, SDXL.name: 32}


def checkpoint_entries(pipeline: Any, family: Family, dtype: torch.dtype) -> Entries:
    """Return every tensor of the file by its original name; ValueError where the family has no such layout."""
    if family not in (SD1, SD2, SD2_V, SDXL):
        raise ValueError(f"{family.name} has no single-file checkpoint; SD 1.x, SD 2.x and SDXL have. Use --format pipeline")
    return {
        **prefixed("model.diffusion_model.", unet_entries(pipeline.unet.state_dict(), dtype)),
        **prefixed("first_stage_model.", vae_entries(pipeline.vae.state_dict(), dtype)),
        **text_entries(pipeline, family, dtype),
        **velocity_entries(pipeline, family),
    }


def prefixed(prefix: str, entries: Entries) -> Entries:
    """Return the entries under a prefix."""
    return {prefix + name: one for name, one in entries.items()}


def unet_entries(state: dict[str, Tensor], dtype: torch.dtype) -> Entries:
    """Return the UNet's entries."""
    return {original: entry(state[name], dtype) for name, original in original_unet(state).items()}


def vae_entries(state: dict[str, Tensor], dtype: torch.dtype) -> Entries:
    """Return the VAE's entries."""
    shaped = {name: tensor[:, :, None, None] if is_projection(name) else tensor for name, tensor in state.items()}
    return {original: entry(shaped[name], dtype) for name, original in original_vae(state).items()}


def text_entries(pipeline: Any, family: Family, dtype: torch.dtype) -> Entries:
    """Return the entries of the text encoders."""
    state = pipeline.text_encoder.state_dict()
    layers = OPEN_CLIP_LAYERS.get(family.name, 0)
    if family is SD1:
        return prefixed("cond_stage_model.transformer.", clip_entries(state, dtype))
    if family.name == SD2.name:
        return prefixed("cond_stage_model.model.", open_clip_entries(state, dtype, layers))
    second = open_clip_entries(pipeline.text_encoder_2.state_dict(), dtype, layers)
    return {
        **prefixed("conditioner.embedders.0.transformer.", clip_entries(state, dtype)),
        **prefixed("conditioner.embedders.1.model.", second),
    }


def velocity_entries(pipeline: Any, family: Family) -> Entries:
    """Return the empty tensors by which ComfyUI and Forge know an SDXL that predicts velocity."""
    config = pipeline.scheduler.config
    if family is not SDXL or getattr(config, "prediction_type", "") != "v_prediction":
        return {}
    marks = ["v_pred"] + ["ztsnr"] * bool(getattr(config, "rescale_betas_zero_snr", False))
    return {mark: entry(torch.zeros(0), torch.float32) for mark in marks}


def write_checkpoint(pipeline: Any, family: Family, path: Path, dtype: torch.dtype, metadata: dict[str, str]) -> None:
    """Write a pipeline's single file."""
    write_stream(path, checkpoint_entries(pipeline, family, dtype), {"format": "pt", **metadata})
