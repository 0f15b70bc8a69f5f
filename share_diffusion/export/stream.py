"""Safetensors files of any size, written one tensor at a time: memory never holds more than one converted tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}


@dataclass(frozen=True)
class Entry:
    """A tensor of a file that is made when it is written: its shape, its dtype in the file, and how to make it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def entry(tensor: Tensor, dtype: torch.dtype) -> Entry:
    """Return the entry of a tensor as it is; integers keep their own dtype."""
    return Entry(tuple(tensor.shape), dtype if tensor.is_floating_point() else tensor.dtype, lambda: tensor)


def write_stream(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
    """Write a file of these tensors, sorted by name; ValueError names a tensor that does not fit its precision."""
    offset, fields = 0, {}
    for name in sorted(entries):
        one = entries[name]
        fields[name] = {"dtype": CODES[one.dtype], "shape": one.shape, "data_offsets": [offset, offset + one.bytes]}
        offset += one.bytes
    header = {"__metadata__": dict(sorted(metadata.items())), **fields}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in fields:
            file.write(payload(name, entries[name]))


def payload(name: str, one: Entry) -> Any:
    """Return a tensor's bytes, as a buffer, in the precision of the file."""
    made = one.make().detach().to("cpu")
    stored = made.to(one.dtype).contiguous()
    if tuple(stored.shape) != one.shape:
        raise AssertionError(f"{name} was announced as {one.shape} and came as {tuple(stored.shape)}")
    if stored.is_floating_point() and not torch.isfinite(stored).all():
        largest = float(made.float().abs().max())
        kind = str(one.dtype).removeprefix("torch.")
        raise ValueError(f"{name} (largest value {largest:.3g}) leaves the range of {kind}; export with --precision float32")
    # Byte order: safetensors is little-endian, as are all systems that torch runs on.
    return stored.view(-1).view(torch.uint8).numpy() if stored.numel() else b""
