"""Which folder an export may take the place of: an empty one, or an earlier export of its format with nothing else in it.

The formats peft and pipeline are a folder as a whole, so that `--replace` removes all that was in it. Therefore every file
there must be one that such an export writes: one that is not is somebody's own, and named.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NoReturn

from share_diffusion.lora.names import COMPONENTS

FOLDERS = ("peft", "pipeline")
MARKS = {"peft": "adapter_config.json", "pipeline": "model_index.json"}
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
# What models, schedulers, tokenizers and feature extractors are written as, by this library's versions and transformers'.
PARTS = (
    *("config.json", "diffusion_pytorch_model.safetensors", "model.safetensors", "scheduler_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("spiece.model", "preprocessor_config.json", "processor_config.json", "generation_config.json"),
)
# What file managers leave in every folder that was looked at.
NOBODYS = (".DS_Store", "Thumbs.db", "desktop.ini")
SHOWN = 3


def folder_problem(path: Path, format: str) -> str | None:
    """Return why an export of this format cannot take a folder's place, or None."""
    if format not in FOLDERS:
        return None
    try:
        target, here = Path(os.path.realpath(path)), Path(os.path.realpath("."))
        if target == here or target in here.parents:
            return (
                f"the output {str(path)!r} is the working folder or holds it, and format {format} takes a folder as a whole; "
                "give it a folder of its own"
            )
        if target.exists() and not target.is_dir():
            return f"the output {str(path)!r} is a file; format {format} writes a folder"
        return content_problem(path, target, format)
    except OSError as error:
        return f"cannot look into {error.filename or path} ({error.strerror or error}); choose another folder"


def content_problem(path: Path, target: Path, format: str) -> str | None:
    """Return what in a folder keeps it from being replaced, or None; OSError where it cannot be looked into."""
    if not target.is_dir() or not any(target.iterdir()):
        return None
    known = written(target, format)
    if not known:
        return (
            f"{path} is not empty and no earlier export of format {format} (it has no {MARKS[format]} of one), which alone is "
            "replaced; choose another folder"
        )
    strange = (name for name in held(target) if name not in known and name.rpartition("/")[2] not in NOBODYS)
    if found := list(islice(strange, SHOWN + 1)):
        more = " and more" if len(found) > SHOWN else ""
        shown = ", ".join(sorted(found[:SHOWN]))
        return f"{path} holds {shown}{more}, which no export of format {format} writes; choose another folder, or move it out"
    return None


def written(folder: Path, format: str) -> set[str]:
    """Return the files that the export in this folder can consist of, none where it is no export of this format."""
    if format == "pipeline":
        parts = pipeline_parts(folder / MARKS[format])
        return {MARKS[format], *(f"{part}/{name}" for part in parts for name in PARTS)} if parts else set()
    homes = [part for part in ("", *COMPONENTS) if (folder / part / MARKS[format]).is_file()]
    return {f"{home}/{name}".lstrip("/") for home in homes for name in ADAPTER}


def pipeline_parts(index: Path) -> list[str]:
    """Return the components that a pipeline's index names, none where it is no such index."""
    try:
        said = json.loads(index.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        return []
    if not isinstance(said, dict) or "_class_name" not in said:
        return []
    return [name for name, value in said.items() if isinstance(value, list)]


def held(folder: Path) -> Iterator[str]:
    """Yield everything below a folder that is no plain folder, relative to it; OSError where a part cannot be read."""

    def stop(error: OSError) -> NoReturn:
        raise error

    for home, folders, files in os.walk(folder, onerror=stop):
        links = [name for name in folders if os.path.islink(os.path.join(home, name))]
        for name in sorted([*files, *links]):
            yield Path(home, name).relative_to(folder).as_posix()
