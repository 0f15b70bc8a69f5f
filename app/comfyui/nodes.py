"""The nodes: one concept with a slider, a mix written as text, what a file holds, and the embedded base.

A concept becomes an ordinary LoRA in memory and goes through `comfy.sd.load_lora_for_models`, so it works with every
model that takes LoRAs and stacks with them; the slider is the LoRA's strength.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import comfy.sd
import folder_paths

from .base import open_base
from .mixing import mixed, parse
from .reader import SubspaceFile, read

FOLDER = "share"
SEPARATOR = " :: "
BASE_ENDING = ".base.safetensors"
NONE = "(no subspace file in models/share)"
STRENGTH = ("FLOAT", {"default": 1.0, "min": -4.0, "max": 4.0, "step": 0.01, "display": "slider"})

folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))


@lru_cache(maxsize=4)
def opened(path: str, stamp: tuple[int, int]) -> SubspaceFile:
    """Return a file, read once for as long as it stays the same."""
    return read(path)


def stamp_of(path: str) -> tuple[int, int]:
    """Return what changes when a file does."""
    facts = os.stat(path)
    return facts.st_mtime_ns, facts.st_size


def place(name: str) -> str:
    """Return the path of a file in models/share."""
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        raise ValueError(f"{name} is not in models/share; put the subspace file there and reload the page")
    return path


def subspace(name: str) -> SubspaceFile:
    """Return a file of models/share."""
    path = place(name)
    return opened(path, stamp_of(path))


def files() -> list[str]:
    """Return the subspace files of models/share."""
    names = folder_paths.get_filename_list(FOLDER)
    return sorted(name for name in names if name.endswith(".safetensors") and not name.endswith(BASE_ENDING)) or [NONE]


def choices() -> list[str]:
    """Return every concept as `file :: concept`; a file that cannot be read is left out of the list, not of the info node."""
    found = []
    for name in files():
        try:
            found += [f"{name}{SEPARATOR}{concept}" for concept in subspace(name).concepts]
        except (ValueError, OSError):
            continue
    return found or [NONE]


def applied(model: Any, clip: Any, file: SubspaceFile, weights: dict[str, float], strength: float) -> tuple[Any, Any, str]:
    """Return the model and text encoder with a mix on them, and the triggers of its concepts."""
    lora = mixed(file, weights)
    triggers = ", ".join(file.concepts[name].trigger for name, weight in weights.items() if weight)
    if lora and strength:
        model, clip = comfy.sd.load_lora_for_models(model, clip, lora, strength, strength)
    return model, clip, triggers


class ShareConcept:
    """One concept of a subspace file; chain several for a mix."""

    CATEGORY = "share"
    FUNCTION = "apply"
    RETURN_TYPES = ("MODEL", "CLIP", "STRING")
    RETURN_NAMES = ("MODEL", "CLIP", "trigger")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        required = {"model": ("MODEL",), "concept": (choices(),), "strength": STRENGTH}
        return {"required": required, "optional": {"clip": ("CLIP",)}}

    @classmethod
    def IS_CHANGED(cls, concept: str, **_: Any) -> Any:
        return stamp_of(place(concept.partition(SEPARATOR)[0]))

    def apply(self, model: Any, concept: str, strength: float, clip: Any = None) -> tuple[Any, Any, str]:
        name, _, chosen = concept.partition(SEPARATOR)
        return applied(model, clip, subspace(name), {chosen: 1.0}, strength)


class ShareMix:
    """A mix of one file's concepts, written as text."""

    CATEGORY = "share"
    FUNCTION = "apply"
    RETURN_TYPES = ("MODEL", "CLIP", "STRING")
    RETURN_NAMES = ("MODEL", "CLIP", "triggers")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        text = ("STRING", {"default": "", "multiline": True, "placeholder": "watercolor:0.8, robot:0.5"})
        required = {"model": ("MODEL",), "file": (files(),), "mix": text, "strength": STRENGTH}
        return {"required": required, "optional": {"clip": ("CLIP",)}}

    @classmethod
    def IS_CHANGED(cls, file: str, **_: Any) -> Any:
        return stamp_of(place(file))

    def apply(self, model: Any, file: str, mix: str, strength: float, clip: Any = None) -> tuple[Any, Any, str]:
        return applied(model, clip, subspace(file), parse(mix), strength)


class ShareInfo:
    """What a subspace file holds, as text."""

    CATEGORY = "share"
    FUNCTION = "tell"
    RETURN_TYPES = ("STRING",)
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"file": (files(),)}}

    @classmethod
    def IS_CHANGED(cls, file: str) -> Any:
        return stamp_of(place(file))

    def tell(self, file: str) -> dict[str, Any]:
        held = subspace(file)
        rows = [
            f"{one.name} ({one.kind}), trigger {one.trigger or 'none'}, retention {one.retention:.4f}"
            for one in held.concepts.values()
        ]
        text = "\n".join([f"{file}: base {held.base or 'unknown'}, {len(held.layers)} layers, {len(rows)} concepts", *rows])
        return {"ui": {"text": [text]}, "result": (text,)}


class ShareBase:
    """A base of unusual shape, such as the embedded `tiny`, with an empty latent of its own size."""

    CATEGORY = "share"
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL", "CLIP", "VAE", "LATENT")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        names = sorted(name for name in folder_paths.get_filename_list(FOLDER) if name.endswith(BASE_ENDING))
        return {"required": {"base": (names or ["(no .base.safetensors file in models/share)"],)}}

    @classmethod
    def IS_CHANGED(cls, base: str) -> Any:
        return stamp_of(place(base))

    def load(self, base: str) -> tuple[Any, Any, Any, Any]:
        return open_base(place(base))


NODE_CLASS_MAPPINGS = {
    "ShareConcept": ShareConcept,
    "ShareMix": ShareMix,
    "ShareInfo": ShareInfo,
    "ShareBase": ShareBase,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "ShareConcept": "Share: concept",
    "ShareMix": "Share: mix by text",
    "ShareInfo": "Share: what a file holds",
    "ShareBase": "Share: embedded base",
}
