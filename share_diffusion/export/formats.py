"""One blend, one format, one place: the function `export` and what it hands back."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from share_diffusion.blend import Blend
from share_diffusion.drawing import read_settings
from share_diffusion.export.asked import (
    FORMATS,
    FUSED,
    LORA_FILES,
    PICTURED,
    SINGLE,
    base_problems,
    name_problems,
    place_problems,
    planned,
    request_problems,
    titled,
)
from share_diffusion.export.checkpoint import checkpoint_entries, write_checkpoint
from share_diffusion.export.comfyui import keep_base, write_comfyui
from share_diffusion.export.earlier import FOLDERS
from share_diffusion.export.family import Family, family_of, family_of_pipeline, predicted
from share_diffusion.export.fuse import fused
from share_diffusion.export.metadata import About, about, hashes, lora_metadata, modelspec, sidecar
from share_diffusion.export.pipeline import write_pipeline
from share_diffusion.export.preview import draw_preview, write_preview
from share_diffusion.export.verify import Verdict, lines, verify
from share_diffusion.export.weighted import Weighted, cores_of, weighted
from share_diffusion.export.whole import in_the_way, require_room, staged
from share_diffusion.lora import LoRA
from share_diffusion.lora.peft import write_peft
from share_diffusion.subspace import Subspace, refuse

__all__ = ["FORMATS", "SINGLE", "Exported", "export"]


@dataclass(frozen=True)
class Exported:
    """What was written: where, as which files, of what rank, what truncation cost, and what each program matches of it."""

    path: Path
    files: tuple[Path, ...]
    rank: int
    error: float
    verdicts: tuple[Verdict, ...]

    def lines(self) -> list[str]:
        """Return the summary, line by line."""
        truncated = f", truncated: relative error {self.error:.2e}" if self.error > 1e-6 else ""
        size = sum(path.stat().st_size for path in self.files)
        made = f"rank {self.rank}{truncated}" if self.rank else "fused"
        return [f"{self.path}  ({made}, {len(self.files)} files, {size:,} bytes)", *lines(self.verdicts)]


@dataclass(frozen=True)
class Task:
    """One export, checked and ready to be written."""

    about: About
    weighted: Weighted | None
    pipeline: Any
    picture: Image.Image | None
    dtype: torch.dtype
    format: str

    @property
    def lora(self) -> LoRA | None:
        return self.weighted.lora if self.weighted else None


def export(
    subspace: Subspace,
    blend: Blend | str | Mapping[str, float],
    output: str | os.PathLike[str],
    format: str = "kohya",
    *,
    pipeline: Any = None,
    rank: int | None = None,
    dtype: torch.dtype = torch.float16,
    preview: bool = True,
    replace: bool = False,
    strict: bool = True,
    name: str | None = None,
) -> Exported:
    """Write a blend for other programs and return what they will match of it.

    `output` is a .safetensors file (kohya, diffusers, diffusers-old, checkpoint) or a folder (peft, pipeline, comfyui).
    `pipeline` is the live base: needed for pipeline and checkpoint, used elsewhere for the preview. `rank` truncates a
    LoRA. `strict=False` accepts a fine-tune of the base. `name` is that of the LoRA and the workflow in a ComfyUI folder
    (default: the folder's). Raises ValueError, all problems at once, with nothing written.
    """
    path, chosen = Path(output), Blend.of(blend)
    asked = [*request_problems(path, format, pipeline, rank, dtype), *name_problems(name, format)]
    refuse([*asked, *place_problems(path, format, pipeline), *base_problems(subspace, pipeline, strict)])
    title = titled(path, format, name)
    if not replace:
        other = "name with --name" if format == "comfyui" else "place"
        in_the_way(planned(path, format, title), f"choose another {other}")
    task = prepared(subspace, chosen, title, format, pipeline, rank, dtype, preview)
    home = path.parent if format in SINGLE else path
    require_room(home, expected_bytes(task))
    with staged(home, replace=replace, entire=format in FOLDERS) as stage:
        write(task, stage, title)
        if format == "comfyui":
            keep_base(stage, home, replace)
        written = [file.relative_to(stage) for file in sorted(stage.rglob("*")) if file.is_file()]
        # Once more: while an export is made there is time to put something into the folder that it is to replace.
        refuse(place_problems(path, format, pipeline))
    files = tuple(home / file for file in written)
    if format in SINGLE and (shown := path.with_suffix(".png")) not in files:
        remove_drawn(shown)
    found = tuple(verdict for place in judged_places(path, format, files) for verdict in verify(place))
    return Exported(path, files, task.about.rank, task.about.error, found)


def remove_drawn(picture: Path) -> None:
    """Remove an earlier export's preview, which shows another blend now; a picture that was not drawn here stays."""
    try:
        if picture.is_file() and read_settings(picture):
            picture.unlink()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return


def judged_places(path: Path, format: str, files: Sequence[Path]) -> list[Path]:
    """Return what of an export the programs are asked about: of a ComfyUI folder only what was written for them."""
    if format != "comfyui":
        return [path]
    return [file for file in files if file.suffix == ".safetensors" and file.parent.name != "share"]


def prepared(
    subspace: Subspace,
    blend: Blend,
    title: str,
    format: str,
    pipeline: Any,
    rank: int | None,
    dtype: torch.dtype,
    preview: bool,
) -> Task:
    """Return the export with its LoRA made, its family known and, where the format has a place for it, its preview drawn."""
    cores = cores_of(subspace, blend)
    # An untouched base may be fused into nothing; a LoRA of nothing is an error that `weighted` words.
    made = None if format in FUSED and not cores else weighted(subspace, cores, rank)
    family = family_in(subspace, pipeline)
    said = about(subspace, blend, family, title, predicted(pipeline) if pipeline is not None else "")
    if made is not None and format not in FUSED:
        said = replace(said, rank=made.rank, error=made.error)
    picture = None
    if preview and pipeline is not None and format in PICTURED:
        with fused(pipeline, made.lora if made else None):
            picture = draw_preview(pipeline, subspace, blend)
    return Task(said, made, pipeline, picture, dtype, format)


def family_in(subspace: Subspace, pipeline: Any) -> Family:
    """Return the family, from the live base where it is at hand, else from the shapes in the subspace."""
    if pipeline is not None:
        return family_of_pipeline(pipeline)
    return family_of({layer: (basis.beta.shape[0], basis.alpha.shape[0]) for layer, basis in subspace.layers.items()})


def expected_bytes(task: Task) -> int:
    """Return about how many bytes an export takes."""
    lora = task.lora.layers.values() if task.lora else ()
    if task.format not in FUSED:
        return 2**16 + sum((factors.up.numel() + factors.down.numel()) * task.dtype.itemsize for factors in lora)
    if task.format == "checkpoint":
        return sum(one.bytes for one in checkpoint_entries(task.pipeline, task.about.family, task.dtype).values())
    models = [part for part in task.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    return sum(tensor.numel() for model in models for tensor in model.parameters()) * task.dtype.itemsize


def write(task: Task, stage: Path, name: str) -> None:
    """Write an export into its stage."""
    if task.format in LORA_FILES:
        write_lora(task, stage / f"{name}.safetensors", task.format)
    elif task.format == "peft":
        assert task.lora is not None
        write_peft(task.lora, stage, task.dtype, task.about.base, installed_names(task.pipeline))
    elif task.format == "comfyui":
        write_comfyui(task, stage)
    else:
        with fused(task.pipeline, task.lora):
            write_fused(task, stage, name)


def write_fused(task: Task, stage: Path, name: str) -> None:
    """Write the pipeline as it is now, with the blend in its weights."""
    if task.format == "pipeline":
        write_pipeline(task.pipeline, stage, task.dtype)
        return
    said = modelspec(task.about, task.about.family.modelspec, task.picture)
    write_checkpoint(task.pipeline, task.about.family, stage / f"{name}.safetensors", task.dtype, said)


def write_lora(task: Task, path: Path, dialect: str) -> None:
    """Write a LoRA with its metadata, its sidecar and its preview."""
    assert task.lora is not None
    said = lora_metadata(task.about, task.picture)
    # Twice: what the metadata says of the tensors is known when they are written.
    task.lora.write(path, dialect, task.dtype, said)
    task.lora.write(path, dialect, task.dtype, {**said, **hashes(path)})
    path.with_suffix(".json").write_text(sidecar(task.about), encoding="utf-8")
    if task.picture is not None:
        write_preview(task.picture, path.with_suffix(".png"), task.about)


def installed_names(pipeline: Any) -> dict[str, list[str]]:
    """Return the module names of the components as the installed libraries spell them, for PEFT."""
    if pipeline is not None:
        from share_diffusion.models.layers import components

        return {name: [path for path, _ in part.named_modules()] for name, part in components(pipeline).items()}
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=40, num_attention_heads=1)
    with torch.device("meta"):
        models = {"text_encoder": CLIPTextModel(config), "text_encoder_2": CLIPTextModelWithProjection(config)}
    return {name: [path for path, _ in model.named_modules()] for name, model in models.items()}
