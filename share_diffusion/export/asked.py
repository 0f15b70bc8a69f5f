"""What is asked of an export, and all that is wrong with it before anything slow or anything on the disk is begun."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from share_diffusion.export.comfyui import own_files
from share_diffusion.export.earlier import FOLDERS, folder_problem
from share_diffusion.export.filename import name_problem, safe_name
from share_diffusion.storage import read_header
from share_diffusion.subspace import Subspace

LORA_FILES = ("kohya", "diffusers", "diffusers-old")
FUSED = ("pipeline", "checkpoint")
FORMATS = (*LORA_FILES, "peft", *FUSED, "comfyui")
PICTURED = (*LORA_FILES, "checkpoint", "comfyui")  # formats that a preview goes into
SINGLE = (*LORA_FILES, "checkpoint")  # formats whose output is one .safetensors file


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


def name_problems(name: str | None, format: str) -> list[str]:
    """Return what is wrong with the name of a LoRA and workflow."""
    if name is None:
        return []
    if format != "comfyui":
        return [f"name is {name!r}; only format comfyui takes one, others are named by their output"]
    if not name or name.endswith(".safetensors"):
        return ["the name is empty" if not name else f"the name {name!r} is given without its ending .safetensors"]
    problem = name_problem(name)
    return [problem] if problem else []


def place_problems(path: Path, format: str, pipeline: Any) -> list[str]:
    """Return why an export that is a folder as a whole cannot take this folder's place."""
    if problem := folder_problem(path, format):
        return [problem]
    if format in SINGLE and is_share(path):
        return [f"the output {str(path)!r} is a subspace file or a patch, which no export replaces; choose another place"]
    source = str(getattr(pipeline, "name_or_path", None) or "")
    if format in FOLDERS and os.path.isdir(source) and os.path.realpath(source) == os.path.realpath(path):
        return [f"the output {str(path)!r} is the base itself; choose another folder"]
    return []


def is_share(path: Path) -> bool:
    """Return whether there is a file of this library, which --replace must not take for an earlier export."""
    try:
        return path.is_file() and bool(read_header(path).metadata)
    except (OSError, ValueError):
        return False


def base_problems(subspace: Subspace, pipeline: Any, strict: bool) -> list[str]:
    """Return why a pipeline is not the subspace's base."""
    if not subspace.complete:
        return ["this subspace was loaded without its base's weights; load it with them"]
    if pipeline is None:
        return []
    from share_diffusion.attached import attach_problems

    return attach_problems(pipeline, subspace, strict)


def titled(path: Path, format: str, name: str | None) -> str:
    """Return what an export is called: the name that is given, the file's stem or the folder's name."""
    if name is not None:
        return name
    if format in SINGLE:
        return path.stem
    return path.name or Path(os.path.realpath(path)).name  # "." has no name of its own


def planned(path: Path, format: str, title: str) -> list[Path]:
    """Return the files or the folder that an export takes; a base in a ComfyUI folder is not its own."""
    if format in SINGLE:
        return [path, *([path.with_suffix(".json"), path.with_suffix(".png")] if format != "checkpoint" else [])]
    return own_files(path, safe_name(title)) if format == "comfyui" else [path]
