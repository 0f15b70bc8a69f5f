"""Files of tensors, read without trust and written whole or not at all."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from share_diffusion.lora.pickled import PICKLES, read_pickle

# In a folder, the file that holds the LoRA: PEFT's name and diffusers', and what both wrote before safetensors.
NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
OLD_NAMES = ("adapter_model.bin", "pytorch_lora_weights.bin")
# Files with a header of a hundred megabytes keep the parser busy for half a minute; real ones stay under one.
HEADER_LIMIT = 16 * 2**20
TENSOR_LIMIT = 200_000


def locate(path: Path) -> Path:
    """The file itself, or the one LoRA file in a folder."""
    if not path.is_dir():
        return path
    found = [path / name for name in NAMES if (path / name).exists()]
    found = found or [path / name for name in OLD_NAMES if (path / name).exists()]
    if len(found) != 1:
        held = "both" if found else "neither"
        raise ValueError(f"{path}: the folder holds {held} of {' and '.join(NAMES)}; name the LoRA file itself")
    return found[0]


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, in memory of their own, and the metadata of a safetensors file or of an old pickle."""
    if problem := file_problem(path):
        raise ValueError(f"{path}: {problem}")
    return (read_pickle(path), {}) if path.suffix.lower() in PICKLES else read_safetensors(path)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, in memory of their own, and the metadata of a safetensors file; ValueError for any other file."""
    # Not memory-mapped: a file that another program rewrites would change these tensors, or end the process.
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise ValueError(f"{path}: not a safetensors file, or cut short at {len(data)} bytes; download it again")
    if size > HEADER_LIMIT:
        raise ValueError(f"{path}: the header has {size} bytes; no LoRA needs more than the limit of {HEADER_LIMIT}")
    try:
        header = json.loads(data[8 : 8 + size], object_pairs_hook=without_doubles)
        tensors = load(data)
    except KeyError as error:
        raise ValueError(f"{path}: holds numbers of kind {error}, which no LoRA is made of; convert them to float16") from None
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a valid safetensors file ({error}); download it again") from None
    if len(tensors) > TENSOR_LIMIT:
        raise ValueError(f"{path}: {len(tensors)} tensors; no LoRA needs more than the limit of {TENSOR_LIMIT}")
    return tensors, header.get("__metadata__") or {}


def without_doubles(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object, refused where it says two things under one key (safetensors takes the last one)."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def file_problem(path: Path) -> str | None:
    """Why a path cannot be read as a file of tensors without opening it, or None."""
    if not path.exists():
        return "no such file"
    if not path.is_file():
        return "not a regular file; give a .safetensors file or a folder with one"
    return None


def adapter_config(path: Path) -> dict[str, str]:
    """The text of the `adapter_config.json` that PEFT wrote beside this file and its folder's name, if it is there."""
    config = path.with_name(re.sub(r"adapter_model\.(safetensors|bin)$", "adapter_config.json", path.name))
    if config == path or not config.is_file():
        return {}
    try:
        return {"adapter_config": config.read_text(encoding="utf-8"), "adapter_folder": path.absolute().parent.name}
    except UnicodeDecodeError as error:
        raise ValueError(f"{config}: not a text file in UTF-8 ({error})") from None


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one file so that at every moment either the old one or the new one is there in full."""
    data = encoded(tensors, metadata)
    # A symbolic link stays a link: what it points to is replaced.
    target = path.resolve()
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def encoded(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file, the same ones for the same content."""
    data = save({key: tensors[key] for key in sorted(tensors)}, metadata=dict(sorted(metadata.items())))
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    # safetensors writes the metadata in an order that changes from run to run.
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def sync_folder(folder: Path) -> None:
    """Make a rename in this folder survive a power loss, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
