"""A base of a shape that no program knows, as one file for the ComfyUI nodes of app/comfyui.

    unet.<original name>          the UNet, in the layout of single-file checkpoints
    text.text_model.<path>        the text encoder, in transformers' spelling
    vae.<path>                    the VAE, in diffusers' spelling
    alphas_cumprod (steps,)       the noise schedule

and one metadata key, `share_base`, with sorted JSON: the UNet in the words of ComfyUI's own UNet, the text encoder's and
VAE's sizes, the tokenizer's vocabulary, what the UNet predicts, and the side of its pictures.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from share_diffusion.export.original.clip import clip_entries
from share_diffusion.export.original.unet import original_unet
from share_diffusion.export.stream import Entry, entry, write_stream

ENDING = ".base.safetensors"
CLIP_FIELDS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "hidden_act")


def base_problem(pipeline: Any) -> str | None:
    """Return why a pipeline cannot become such a file, or None."""
    unet, vae = pipeline.unet.config, pipeline.vae.config
    if getattr(pipeline, "text_encoder_2", None) is not None or unet.get("addition_embed_type"):
        return "it has more than one text encoder"
    if len(set(head_widths(unet))) != 1 or unet.norm_num_groups != 32:
        return "its attention heads differ in width, or its UNet has other than 32 norm groups"
    if vae.mid_block_add_attention:
        return "its VAE has attention, which the nodes' small VAE lacks"
    return None


def head_widths(config: Any) -> list[int]:
    """Return the width of an attention head on every level; diffusers calls the number of heads `attention_head_dim`."""
    levels = config.block_out_channels
    heads = config.num_attention_heads or config.attention_head_dim
    each = heads if isinstance(heads, (list, tuple)) else [heads] * len(levels)
    return [width // count for width, count in zip(levels, each, strict=True)]


def unet_words(config: Any) -> dict[str, Any]:
    """Return the UNet's shape in the words of ComfyUI's UNet; depths are listed block by block."""
    widths, layers = list(config.block_out_channels), config.layers_per_block
    down = [int("CrossAttn" in kind) for kind in config.down_block_types]
    up = [int("CrossAttn" in kind) for kind in reversed(config.up_block_types)]
    return {
        "image_size": 32,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": [layers] * len(widths),
        "transformer_depth": [depth for depth in down for _ in range(layers)],
        "transformer_depth_output": [depth for depth in up for _ in range(layers + 1)],
        "transformer_depth_middle": 1,
        "context_dim": config.cross_attention_dim,
        "use_linear_in_transformer": bool(config.use_linear_projection),
        "num_heads": -1,
        "num_head_channels": head_widths(config)[0],
        "use_spatial_transformer": True,
        "legacy": False,
    }


def described(pipeline: Any) -> dict[str, Any]:
    """Return what the nodes need to build the models."""
    text, vae = pipeline.text_encoder.config, pipeline.vae.config
    model = json.loads(pipeline.tokenizer.backend_tokenizer.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    special = {"start": text.bos_token_id, "end": text.eos_token_id, "pad": pipeline.tokenizer.pad_token_id}
    return {
        "version": 1,
        "unet": unet_words(pipeline.unet.config),
        "text": {
            **{name: getattr(text, name) for name in CLIP_FIELDS},
            "special": special,
            "max_length": text.max_position_embeddings,
        },
        "vae": {
            "widths": list(vae.block_out_channels),
            "layers": vae.layers_per_block,
            "latents": vae.latent_channels,
            "groups": vae.norm_num_groups,
            "scale": vae.scaling_factor,
        },
        "tokenizer": {"vocab": model["vocab"], "merges": merges, "max_length": pipeline.tokenizer.model_max_length},
        "prediction": pipeline.scheduler.config.prediction_type,
        "latent_side": pipeline.unet.config.sample_size,
    }


def write_base_file(pipeline: Any, path: Path, dtype: torch.dtype) -> None:
    """Write a pipeline's file for the nodes; ValueError where it has parts that they do not know."""
    if problem := base_problem(pipeline):
        raise ValueError(f"this base has no file for the ComfyUI nodes: {problem}; export --format kohya or pipeline")
    state: dict[str, Tensor] = pipeline.unet.state_dict()
    found: dict[str, Entry] = {f"unet.{new}": entry(state[old], dtype) for old, new in original_unet(state).items()}
    found |= {f"text.{name}": one for name, one in clip_entries(pipeline.text_encoder.state_dict(), dtype).items()}
    found |= {f"vae.{name}": entry(tensor, dtype) for name, tensor in pipeline.vae.state_dict().items()}
    found["alphas_cumprod"] = entry(pipeline.scheduler.alphas_cumprod, torch.float32)
    write_stream(path, found, {"share_base": json.dumps(described(pipeline), sort_keys=True, ensure_ascii=False)})
