"""Opens a base file (`NAME.base.safetensors`, written by `share-diffusion export --format comfyui`) as ComfyUI's models.

A base of unusual shape cannot be detected by ComfyUI, which matches checkpoints against fixed shapes; here its shape is
read from the file. The UNet and the text encoder are ComfyUI's own classes, so LoRAs, samplers and the rest just work.
"""

from __future__ import annotations

import json
import os
import tempfile
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import torch
from safetensors import safe_open
from torch import Tensor

from .vae import SmallVAE

VOCABULARY = 49408  # the rows of ComfyUI's token embedding, whatever the tokenizer has
TOKENS = "text_model.embeddings.token_embedding.weight"
Loaded = tuple[Any, Any, Any, dict[str, Tensor]]


def open_base(path: str) -> Loaded:
    """Return a base file's model, text encoder, VAE and an empty latent of its own size."""
    with safe_open(path, "pt") as file:
        described = (file.metadata() or {}).get("share_base")
        if described is None:
            raise ValueError(f"{os.path.basename(path)} is no base file; `share-diffusion export --format comfyui` writes one")
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    facts = json.loads(described)
    if facts["version"] != 1:
        raise ValueError(f"{os.path.basename(path)} has version {facts['version']}, these nodes read 1; update them")
    vae = facts["vae"]
    latent = torch.zeros(1, vae["latents"], facts["latent_side"], facts["latent_side"])
    return model_of(facts, tensors), text_encoder_of(facts, part(tensors, "text.")), vae_of(vae, tensors), {"samples": latent}


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors under a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def model_of(facts: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """Return the UNet as ComfyUI's MODEL, with the base's own noise schedule."""

    class Latents(comfy.latent_formats.LatentFormat):
        scale_factor = facts["vae"]["scale"]
        latent_channels = facts["vae"]["latents"]

    class Config(comfy.supported_models_base.BASE):
        unet_extra_config: dict[str, Any] = {}  # noqa: RUF012
        latent_format = Latents

    kind = comfy.model_base.ModelType
    prediction = kind.V_PREDICTION if facts["prediction"] == "v_prediction" else kind.EPS
    config = Config(facts["unet"])
    config.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.BaseModel(config, model_type=prediction, device="cpu")
    model.diffusion_model.load_state_dict(part(tensors, "unet."))
    kept = tensors["alphas_cumprod"]
    model.model_sampling.set_sigmas(((1 - kept) / kept) ** 0.5)
    devices = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    return comfy.model_patcher.ModelPatcher(model, load_device=devices[0], offload_device=devices[1])


def text_encoder_of(facts: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """Return the text encoder and its tokenizer as ComfyUI's CLIP."""
    text = facts["text"]
    config = {**text, "max_position_embeddings": text["max_length"], "eos_token_id": text["special"]["end"]}

    class Model(comfy.sd1_clip.SDClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None) -> None:
            super().__init__(
                device=device,
                dtype=dtype,
                max_length=text["max_length"],
                textmodel_json_config=dict(config),
                special_tokens=text["special"],
                return_projected_pooled=False,
                model_options=model_options or {},
            )

    class Encoder(comfy.sd1_clip.SD1ClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None) -> None:
            super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_model=Model)

    class Words(comfy.sd1_clip.SDTokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None) -> None:
            with tempfile.TemporaryDirectory() as folder:
                write_tokenizer(folder, facts["tokenizer"])
                super().__init__(
                    folder,
                    max_length=facts["tokenizer"]["max_length"],
                    embedding_directory=embedding_directory,
                    embedding_size=text["hidden_size"],
                )

    class Tokenizer(comfy.sd1_clip.SD1Tokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None) -> None:
            super().__init__(embedding_directory=embedding_directory, tokenizer_data={}, tokenizer=Words)

    clip = comfy.sd.CLIP(comfy.supported_models_base.ClipTarget(Tokenizer, Encoder))
    rows = tensors["text_model.embeddings.token_embedding.weight"]
    tensors["text_model.embeddings.token_embedding.weight"] = torch.cat(
        [rows, rows.new_zeros(VOCABULARY - len(rows), rows.shape[1])]
    )
    missing = clip.cond_stage_model.clip_l.transformer.load_state_dict(tensors, strict=False).missing_keys
    if lacking := [name for name in missing if not name.startswith("text_projection")]:
        raise ValueError(
            f"the base file lacks {len(lacking)} tensors of its text encoder, such as {lacking[0]}; export it again"
        )
    return clip


def write_tokenizer(folder: str, facts: dict[str, Any]) -> None:
    """Write the tokenizer's files where its class looks for them."""
    ends = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    content = {
        "vocab.json": json.dumps(facts["vocab"], ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *facts["merges"]]) + "\n",
        "tokenizer_config.json": json.dumps({**ends, "unk_token": "<|endoftext|>", "model_max_length": facts["max_length"]}),
    }
    for name, text in content.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            file.write(text)


def vae_of(facts: dict[str, Any], tensors: dict[str, Tensor]) -> SmallVAE:
    """Return the VAE, which ComfyUI's decode and encode nodes call as their own."""
    vae = SmallVAE(facts).eval()
    vae.load_state_dict(part(tensors, "vae."))
    return vae
