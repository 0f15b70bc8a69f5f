"""One blend, one format, one place: the function `export` and what it hands back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from share_diffusion.blend import Blend
from share_diffusion.export.checkpoint import checkpoint_entries, write_checkpoint
from share_diffusion.export.family import Family, family_of, family_of_pipeline
from share_diffusion.export.filename import name_problem
from share_diffusion.export.fuse import fused
from share_diffusion.export.metadata import About, about, hashes, lora_metadata, modelspec, sidecar
from share_diffusion.export.pipeline import write_pipeline
from share_diffusion.export.preview import draw_preview, write_preview
from share_diffusion.export.verify import Verdict, lines, verify
from share_diffusion.export.weighted import Weighted, weighted
from share_diffusion.export.whole import in_the_way, require_room, staged
from share_diffusion.lora import LoRA
from share_diffusion.lora.peft import write_peft
from share_diffusion.subspace import Subspace

LORA_FILES = ("kohya", "diffusers", "diffusers-old")
FUSED = ("pipeline", "checkpoint")
FORMATS = (*LORA_FILES, "peft", *FUSED, "comfyui")
SINGLE = (*LORA_FILES, "checkpoint")  # formats whose output is one .safetensors file


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
) -> Exported:
    """Write a blend for other programs and return what they will match of it.

    `output` is a .safetensors file (kohya, diffusers, diffusers-old, checkpoint) or a folder (peft, pipeline, comfyui).
    `pipeline` is the live base: needed for pipeline and checkpoint, used elsewhere for the preview. `rank` truncates a
    LoRA. `strict=False` accepts a fine-tune of the base. Raises ValueError, all problems at once, with nothing written.
    """
    path, chosen = Path(output), Blend.of(blend)
    refuse([*request_problems(path, format, pipeline, rank, dtype), *base_problems(subspace, pipeline, strict)])
    places = planned(path, format)
    if not replace:
        in_the_way(places)
    task = prepared(subspace, chosen, path, format, pipeline, rank, dtype, preview)
    entire = format in ("peft", "pipeline")
    home = path if format in ("peft", "pipeline", "comfyui") else path.parent
    require_room(home, expected_bytes(task))
    with staged(home, replace=replace, entire=entire) as stage:
        write(task, stage, path.stem if format in SINGLE else path.name)
        written = [file.relative_to(stage) for file in sorted(stage.rglob("*")) if file.is_file()]
    files = tuple(home / file for file in written)
    checked = path if format in (*SINGLE, "pipeline", "peft") else home
    found = tuple(verify(checked))
    return Exported(path, files, task.about.rank, task.about.error, found)


def request_problems(path: Path, format: str, pipeline: Any, rank: int | None, dtype: torch.dtype) -> list[str]:
    """Return what is wrong with what is asked for."""
    problems = [] if format in FORMATS else [f"format {format!r} is unknown; it is one of {', '.join(FORMATS)}"]
    if format in SINGLE and path.suffix != ".safetensors":
        problems.append(f"the output {str(path)!r} must end in .safetensors")
    if format not in SINGLE and path.suffix == ".safetensors":
        problems.append(f"the output of format {format} is a folder; {str(path)!r} names a file")
    if path.name and (problem := name_problem(path.name)):
        problems.append(problem)
    if format in FUSED and pipeline is None:
        problems.append(f"format {format} needs the base; give it with --pretrained_model_name_or_path (pipeline=...)")
    if rank is not None and (format in FUSED or rank < 1):
        problems.append(f"rank is {rank}; it is 1 or more, and only for LoRA formats")
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        problems.append(f"dtype {dtype} is not written; it is float16, bfloat16 or float32")
    return problems


def base_problems(subspace: Subspace, pipeline: Any, strict: bool) -> list[str]:
    """Return why a pipeline is not the subspace's base."""
    if not subspace.complete:
        return ["this subspace was loaded without its base's weights; load it with them"]
    if pipeline is None:
        return []
    from share_diffusion.attached import attach_problems

    return attach_problems(pipeline, subspace, strict)


def planned(path: Path, format: str) -> list[Path]:
    """Return the files or the folder that an export takes."""
    if format in SINGLE:
        return [path, *([path.with_suffix(".json"), path.with_suffix(".png")] if format != "checkpoint" else [])]
    return [] if format == "comfyui" else [path]


def prepared(
    subspace: Subspace,
    blend: Blend,
    path: Path,
    format: str,
    pipeline: Any,
    rank: int | None,
    dtype: torch.dtype,
    preview: bool,
) -> Task:
    """Return the export with its LoRA made, its family known and its preview drawn."""
    cores = subspace.blend(blend.weights)
    # An untouched base may be fused into nothing; a LoRA of nothing is an error that `weighted` words.
    made = None if format in FUSED and not cores else weighted(subspace, cores, rank)
    family = family_in(subspace, pipeline)
    title = path.stem if format in SINGLE else path.name
    said = about(subspace, blend, family, title)
    if made is not None and format not in FUSED:
        said = replace(said, rank=made.rank, error=made.error)
    picture = None
    if preview and pipeline is not None:
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
        from share_diffusion.export.comfyui import write_comfyui

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


def refuse(problems: list[str]) -> None:
    """Raise ValueError with all problems, if there are any."""
    if problems:
        raise ValueError("; ".join(problems))
