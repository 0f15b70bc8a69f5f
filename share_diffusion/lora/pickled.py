"""`.pt` and `.bin` files: old LoRAs that torch saved as a pickle, opened without trusting it.

A zip archive may be compressed a thousandfold or tell another story to another reader. So its members are read here,
uncompressed ones only and no more than the file has bytes, into a new archive, and that one goes to
`torch.load(weights_only=True)`, which builds tensors and plain containers and calls nothing else.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
import zipfile
from pathlib import Path

import torch
from torch import Tensor

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
SIZE_LIMIT = 8 * 2**30
PICKLE_LIMIT = 16 * 2**20
ENCRYPTED = 1  # the bit of a zip member's flags
MEMBER_LIMIT = 200_000
# What an archive or a pickle with a few wrong bytes raises, in zipfile and in torch.load.
DAMAGED = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, struct.error),
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, RuntimeError, TypeError, ValueError),
)


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, those of a list as `list:0:up`, `list:0:down`; ValueError for anything else."""
    archive = copied(path)
    try:
        held = torch.load(archive, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        called = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it would call {called[1]}" if called else type(error).__name__
        raise ValueError(f"{path}: not tensors alone ({reason}); where you trust it, convert it to .safetensors") from None
    tensors = named(held["state_dict"] if isinstance(held, dict) and set(held) == {"state_dict"} else held)
    if tensors is None:
        raise ValueError(f"{path}: holds a {type(held).__name__}; expected tensors by name, or a list of up and down matrices")
    if wrong := [name for name, tensor in tensors.items() if not is_plain(tensor)]:
        raise ValueError(f"{path}: {', '.join(wrong[:5])}: not plain tensors of their own; the file is broken")
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def copied(path: Path) -> io.BytesIO:
    """The archive once more, from members that are stored as they are; ValueError for a bomb or another kind of file."""
    size = path.stat().st_size
    if size > SIZE_LIMIT:
        raise ValueError(f"{path}: {size:,} bytes; no LoRA needs more than the limit of {SIZE_LIMIT:,}")
    target, problem = io.BytesIO(), None
    try:
        with zipfile.ZipFile(path) as source:
            members = source.infolist()
            if not (problem := bomb(members, size)):
                with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as safe:
                    for member in members:
                        safe.writestr(zipfile.ZipInfo(member.filename), source.read(member))
    except (*DAMAGED, OSError) as error:
        raise ValueError(
            f"{path}: not a file of torch.save since version 1.6 ({error}); convert it where you trust it: "
            'safetensors.torch.save_file(torch.load(old, map_location="cpu", weights_only=True), new)'
        ) from None
    if problem:
        raise ValueError(f"{path}: {problem}; it is not opened")
    target.seek(0)
    return target


def bomb(members: list[zipfile.ZipInfo], size: int) -> str | None:
    """Why an archive cannot be opened or would grow when it is, or None."""
    locked = [member.filename for member in members if member.flag_bits & ENCRYPTED]
    if locked:
        return f"{len(locked)} of its parts are encrypted ({locked[0]!r}), which torch never does"
    packed = [member.filename for member in members if member.compress_type != zipfile.ZIP_STORED]
    if packed:
        return f"{len(packed)} of its parts are compressed ({packed[0]!r}), which torch never does"
    if (total := sum(member.file_size for member in members)) > size:
        return f"its parts claim {total:,} bytes where the file has {size:,}"
    if len(members) > MEMBER_LIMIT:
        return f"it has {len(members):,} parts; the limit is {MEMBER_LIMIT:,}"
    large = [member for member in members if member.filename.endswith(".pkl") and member.file_size > PICKLE_LIMIT]
    return f"its pickle has {large[0].file_size:,} bytes; the limit is {PICKLE_LIMIT:,}" if large else None


def named(held: object) -> dict[str, Tensor] | None:
    """What was loaded as tensors by name, or None where it is something else."""
    if isinstance(held, list):
        roles = ("up", "down")
        pairs = {f"list:{place // 2}:{roles[place % 2]}": tensor for place, tensor in enumerate(held)}
        return named(pairs) if held and len(held) % 2 == 0 else None
    if not isinstance(held, dict) or not held:
        return None
    tensors = {key: value for key, value in held.items() if isinstance(key, str) and isinstance(value, Tensor)}
    return tensors if len(tensors) == len(held) else None


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is dense, on the CPU, and not larger than the memory behind it."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
