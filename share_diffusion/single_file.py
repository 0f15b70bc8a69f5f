"""A base from one .safetensors file: which family it is, read off its header, and the pipeline made of it.

A checkpoint holds weights alone. The configurations and tokenisers that turn them into a pipeline come from a diffusers
folder of the same kind of base: the one that is named, one that lies beside the file under the same name
(`models/my.safetensors` and `models/my/`), or, where neither is there, the family's repository on the hub or in its
local cache. Without any of them nothing can be loaded, and the message says so. A file that holds the denoiser alone,
as FLUX.1's do, takes the autoencoder and the text encoders from that folder.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

PREFIX = "model.diffusion_model."
REPOSITORIES = {
    "StableDiffusionPipeline": "stable-diffusion-v1-5/stable-diffusion-v1-5 or stabilityai/stable-diffusion-2-1",
    "StableDiffusionXLPipeline": "stabilityai/stable-diffusion-xl-base-1.0",
    "StableDiffusion3Pipeline": "stabilityai/stable-diffusion-3-medium-diffusers",
    "FluxPipeline": "black-forest-labs/FLUX.1-dev",
}
DENOISERS = {
    "StableDiffusionPipeline": ("unet", "UNet2DConditionModel"),
    "StableDiffusionXLPipeline": ("unet", "UNet2DConditionModel"),
    "StableDiffusion3Pipeline": ("transformer", "SD3Transformer2DModel"),
    "FluxPipeline": ("transformer", "FluxTransformer2DModel"),
}
T5 = ("text_encoder_3", "tokenizer_3")


@dataclass(frozen=True)
class Checkpoint:
    """What a file is: diffusers' pipeline class for it, and whether it is complete or the denoiser alone."""

    pipeline: str
    complete: bool
    t5: bool


def recognise(path: Path) -> Checkpoint:
    """Return what a file is, from the names in its header alone; ValueError says what it is instead of a base."""
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable .safetensors file: {error}") from error
    if any(".lora_" in key or ".lora." in key for key in keys):
        raise ValueError(f"{path} is a LoRA, not a base; fold it in with `share-diffusion merge`")
    if any(key.endswith((".share_alpha", ".share_beta")) for key in keys):
        raise ValueError(f"{path} is a subspace file, not a base")
    bare = {key.removeprefix(PREFIX) for key in keys}
    name = pipeline_class(keys, bare)
    if name is None:
        raise ValueError(f"{path} is no checkpoint of a known family (Stable Diffusion 1.x, 2.x, XL, 3, 3.5, FLUX.1)")
    complete = any(key.startswith(("first_stage_model.", "vae.")) for key in keys) and any(
        key.startswith(("cond_stage_model.", "conditioner.", "text_encoders.")) for key in keys
    )
    return Checkpoint(name, complete, any(key.startswith("text_encoders.t5xxl.") for key in keys))


def pipeline_class(keys: Collection[str], bare: Collection[str]) -> str | None:
    """Return the pipeline class that tensors of these names make, or None; `bare` are the names without PREFIX."""

    def some(*starts: str) -> bool:
        return any(key.startswith(starts) for key in bare)

    if some("double_blocks.0.img_attn.", "single_transformer_blocks."):
        return "FluxPipeline"
    if some("joint_blocks.", "transformer_blocks."):
        return "StableDiffusion3Pipeline"
    if any(key.startswith("conditioner.embedders.0.model.") for key in keys):
        raise ValueError("this is SDXL's refiner, which reads prompts with one encoder; give the base model")
    if some("label_emb.", "add_embedding."):
        return "StableDiffusionXLPipeline"
    return "StableDiffusionPipeline" if some("input_blocks.", "down_blocks.") else None


def config_folder(path: Path, config: Path | None) -> Path | None:
    """Return the folder that the configurations come from: the one named, or one beside the file; None is the hub."""
    if config is not None and not (config / "model_index.json").is_file():
        raise ValueError(f"the folder {config} holds no model_index.json")
    beside = path.with_suffix("")
    return config or (beside if (beside / "model_index.json").is_file() else None)


def open_checkpoint(path: Path, config: Path | None, options: dict[str, Any]) -> Any:
    """Return the pipeline of one file; `options` are diffusers' (dtype, local files only)."""
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    found, folder = recognise(path), config_folder(path, config)
    if folder is not None and (theirs := class_in(folder)) != found.pipeline:
        raise ValueError(f"{path} is for {found.pipeline}, but the folder {folder} is of a {theirs}")
    remedy = (
        f"its configurations and tokenisers are needed as well: put a diffusers folder of the same base (its small files "
        f"{'suffice' if found.complete else 'and all parts but the denoiser, which is all that this file holds'}) at "
        f"{path.with_suffix('')}/, or be online once, or have {REPOSITORIES[found.pipeline]} in the local cache"
    )
    try:
        if found.complete:
            absent = dict.fromkeys(T5) if found.pipeline == "StableDiffusion3Pipeline" and not found.t5 else {}
            place = {} if folder is None else {"config": str(folder)}
            return getattr(diffusers, found.pipeline).from_single_file(str(path), **place, **absent, **options)
        component, kind = DENOISERS[found.pipeline]
        if folder is None:
            raise ValueError("the file holds the denoiser alone")
        denoiser = getattr(diffusers, kind).from_single_file(str(path), config=str(folder), subfolder=component, **options)
        return open_folder(folder, {component: denoiser, **options})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SingleFileComponentError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be opened ({said.rstrip('.')}); {remedy}") from error


def open_folder(folder: Path, options: dict[str, Any]) -> Any:
    """Return the pipeline of a diffusers folder; SD 3 may lack T5, by its index or because the folder was taken out."""
    from diffusers import DiffusionPipeline

    if not (folder / "model_index.json").is_file():
        raise ValueError(f"the folder {folder} holds no model_index.json")
    absent = {}
    if class_in(folder) == "StableDiffusion3Pipeline" and not (folder / T5[0]).is_dir():
        absent = dict.fromkeys(T5)
    return DiffusionPipeline.from_pretrained(str(folder), use_safetensors=True, **absent, **options)


def class_in(folder: Path) -> str:
    """Return the pipeline class that a diffusers folder names."""
    try:
        return str(json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'model_index.json'} names no pipeline class; download the folder again") from error
