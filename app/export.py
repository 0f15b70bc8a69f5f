"""A blend as one file to download, in any LoRA format of the library; a format that is a folder comes as a .zip."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from share_diffusion.blend import Blend
from share_diffusion.export import export
from share_diffusion.export.filename import safe_name
from share_diffusion.export.formats import SINGLE
from share_diffusion.subspace import Subspace

FORMATS = {
    "LoRA, kohya (ComfyUI, A1111, Forge, InvokeAI)": "kohya",
    "LoRA, diffusers": "diffusers",
    "LoRA, old names of diffusers": "diffusers-old",
    "PEFT adapters (.zip)": "peft",
    "ComfyUI folder with workflow (.zip)": "comfyui",
}


def write_blend(
    subspace: Subspace, written: str, file_name: str | None, format_name: str, folder: Path, pipeline: Any = None
) -> Path:
    """Write the blend into the folder, in one of FORMATS, under a name that is safe on every system; returns the file.

    `pipeline` is the bare base, which the ComfyUI folder then holds too. The library refuses what no LoRA can hold.
    """
    if format_name not in FORMATS:
        raise ValueError(f"format is {format_name!r}; it is one of {', '.join(FORMATS)}")
    blend, form = Blend.parse(written), FORMATS[format_name]
    if not any(term.weight for term in blend.terms):
        raise ValueError("there is nothing to export: add a concept and give it a weight other than 0")
    folder.mkdir(parents=True, exist_ok=True)
    name = safe_name((file_name or "").strip() or " ".join(blend.names))
    with TemporaryDirectory(dir=folder) as work:
        output = Path(work) / (f"{name}.safetensors" if form in SINGLE else name)
        export(subspace, blend, output, form, pipeline=pipeline, preview=False)
        made = output if form in SINGLE else Path(shutil.make_archive(str(output), "zip", output))
        return made.replace(folder / made.name)
