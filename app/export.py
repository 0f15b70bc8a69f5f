"""A blend as a file that other programs read: one LoRA of exactly the blended update.

The blend's core in every layer is small, (k', k); its thin SVD gives the LoRA of least rank that equals it.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from pathlib import Path
from typing import Any

import torch

from share_diffusion.blend import Blend
from share_diffusion.lora import Factors, LoRA
from share_diffusion.subspace import Subspace

FORMATS = {"kohya (ComfyUI, A1111, Forge, InvokeAI)": "kohya", "diffusers": "diffusers"}
NEGLIGIBLE = 1e-6  # of a layer's largest singular value
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def blended_lora(subspace: Subspace, blend: Blend) -> LoRA:
    """Return the blend as one LoRA; ValueError where it has no weight or is more than a weighted sum."""
    if not blend.plain:
        raise ValueError(
            "this blend has regions, steps, block groups or a merge method; a LoRA file holds a plain weighted sum only: "
            "take the options in [...] out"
        )
    layers = {}
    for path, core in subspace.blend(blend.weights).items():
        left, values, right = torch.linalg.svd(core.double(), full_matrices=False)
        rank = int((values > NEGLIGIBLE * values.max().clamp_min(1e-30)).sum())
        if not rank or not values[0]:
            continue
        basis, roots = subspace.layers[path], values[:rank].sqrt()
        up = basis.beta.double() @ (left[:, :rank] * roots)
        down = (roots[:, None] * right[:rank]) @ basis.alpha.double().T
        layers[path] = Factors(up.float(), down.float(), subspace.kernels.get(path))
    if not layers:
        raise ValueError("there is nothing to export: add a concept and give it a weight other than 0")
    return LoRA(layers, {})


def write_blend(subspace: Subspace, written: str, file_name: str, format_name: str, folder: Path) -> Path:
    """Write the blend into the folder, in one of FORMATS, under a name that is safe on every system; returns the file."""
    if format_name not in FORMATS:
        raise ValueError(f"format is {format_name!r}; it is one of {', '.join(FORMATS)}")
    blend = Blend.parse(written)
    lora = blended_lora(subspace, blend)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{safe_name(file_name or ' '.join(blend.names))}.safetensors"
    lora.write(path, FORMATS[format_name], metadata=about(subspace, blend))
    return path


def about(subspace: Subspace, blend: Blend) -> dict[str, str]:
    """Return what the file says of itself: names and weights, nothing of this machine."""
    triggers = ", ".join(subspace[name].trigger for name in blend.names if subspace[name].trigger)
    return {"share_blend": str(blend), "modelspec.trigger_phrase": triggers, "modelspec.title": str(blend)[:200]}


def safe_name(text: Any) -> str:
    """Return a file name of letters, digits and '-', no longer than 60 characters and allowed on every system."""
    plain = unicodedata.normalize("NFKD", str(text)).encode("ascii", "ignore").decode()
    name = re.sub(r"[^A-Za-z0-9]+", "-", plain).strip("-")[:60].strip("-").lower()
    digest = hashlib.sha256(str(text).encode("utf-8", "replace")).hexdigest()[:8]
    return f"blend-{digest}" if not name or RESERVED.fullmatch(name) else name
