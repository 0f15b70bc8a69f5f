"""What the frozen parts of a base make of pictures and captions, kept by content: the same bytes in, the same tensor out.

A key is a digest of everything the tensor depends on: the picture file's bytes, the autoencoder's weights, the size, the
cut. Names and times are no part of it, so that editing a picture or caption can never serve an old tensor, and a copied
folder is served at once. On disk a tensor is a safetensors file of its own, written whole; a damaged one counts as absent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

VERSION = 1  # of what a key means
ROOM = 2**29  # bytes of captions that are not the data set's own


class Cache:
    """Tensors by key, in memory, or in a folder where one is given."""

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = Path(folder) if folder is not None else None
        self.held: dict[str, dict[str, Tensor]] = {}
        self.hits = self.misses = 0

    def find(self, key: str) -> dict[str, Tensor] | None:
        """Return the tensors of a key, or None."""
        found = self.held.get(key) or self.read(key)
        self.hits, self.misses = self.hits + (found is not None), self.misses + (found is None)
        return found

    def keep(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store the tensors of a key."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        if self.folder is None:
            self.held[key] = tensors
            return
        path = self.place(key)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, part)
            part.replace(path)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                part.unlink()
            raise ValueError(f"the cache {self.folder} cannot be written: {error}; choose another --cache_dir") from error

    def read(self, key: str) -> dict[str, Tensor] | None:
        """Return the tensors of a key from the folder, None where they are absent or damaged."""
        if self.folder is None or not self.place(key).is_file():
            return None
        try:
            return load_file(self.place(key))
        except (OSError, SafetensorError, ValueError):
            return None

    def place(self, key: str) -> Path:
        """Return the file of a key."""
        assert self.folder is not None
        return self.folder / key[:2] / f"{key[2:]}.safetensors"


def key_of(*parts: Any) -> str:
    """Return the key of what depends on these plain values."""
    return hashlib.sha256(json.dumps([VERSION, *parts]).encode()).hexdigest()


def identity_of(module: nn.Module) -> str:
    """Return a digest of a frozen module: its config, its weights and their precision."""
    digest = hashlib.sha256(str(getattr(module, "config", "")).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class TextCache:
    """Captions as the frozen text encoders see them, each encoded by itself, whatever batch it comes in.

    Those of the data set (`known`) are encoded once; of the others, which shuffling and dropping tags make without end, the
    latest are held, at most `ROOM` bytes of them.
    """

    def __init__(
        self, encode: Callable[[str], Mapping[str, Tensor]], identity: str, cache: Cache, known: Collection[str]
    ) -> None:
        self.encode, self.identity, self.cache, self.known = encode, identity, cache, frozenset(known)
        self.recent: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def states(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return the states of captions, {name: (n, ...)}."""
        each = [self.state(caption) for caption in captions]
        return {name: torch.cat([one[name] for one in each]) for name in each[0]}

    def state(self, caption: str) -> dict[str, Tensor]:
        """Return one caption's states, {name: (1, ...)}."""
        if caption not in self.known:
            return self.passing(caption)
        key = key_of("text", self.identity, caption)
        found = self.cache.find(key)
        if found is None:
            found = {name: tensor.cpu() for name, tensor in self.encode(caption).items()}
            self.cache.keep(key, found)
        return found

    def passing(self, caption: str) -> dict[str, Tensor]:
        """Return the states of a caption that is not the data set's own, and hold them while there is room."""
        if caption not in self.recent:
            self.recent[caption] = {name: tensor.cpu() for name, tensor in self.encode(caption).items()}
            each = sum(tensor.nbytes for tensor in self.recent[caption].values())
            while len(self.recent) > 1 and each * len(self.recent) > ROOM:
                self.recent.popitem(last=False)
        self.recent.move_to_end(caption)
        return self.recent[caption]
