"""The LoRA in memory, read from a file of any dialect and written in those that other programs want."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from share_diffusion.lora.assemble import MOST, refuse
from share_diffusion.lora.dialects import WRITERS, parse
from share_diffusion.lora.factors import Factors, is_finite
from share_diffusion.lora.file import adapter_config, locate, read_tensors, write_safetensors
from share_diffusion.lora.names import COMPONENTS

# Metadata that follows from the layers and the dialect.
COMPUTED = {
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "lora_adapter_metadata",
    "adapter_config",
    "adapter_folder",
}
# Metadata of the file that was read, not of what is written now.
OUTDATED = {
    *("format", "ss_network_args", "ss_output_name", "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"),
}

# A cast to half precision costs 2^-11 (float16) or 2^-8 (bfloat16); more than this means out of range.
CAST_LIMIT = 0.01


@dataclass(frozen=True, eq=False)
class LoRA:
    """Low-rank updates of a model, by layer path, and what their file said about them.

    `layers` is kept sorted; `notes` tell what the file held beside them. Raises ValueError for a path whose first word
    is not a component of a pipeline.
    """

    layers: dict[str, Factors]
    metadata: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        homeless = [layer for layer in self.layers if layer.partition(".")[0] not in COMPONENTS]
        refuse([f"{layer}: expected a path that starts with one of {', '.join(COMPONENTS)}" for layer in homeless])
        object.__setattr__(self, "layers", dict(sorted(self.layers.items())))

    def detached(self) -> LoRA:
        """Return the LoRA as plain numbers in main memory, as a `Subspace` holds them; itself where it is so already."""
        plain = {layer: entry.detached() for layer, entry in self.layers.items()}
        return self if all(plain[layer] is entry for layer, entry in self.layers.items()) else replace(self, layers=plain)

    @classmethod
    def read(cls, path: str | os.PathLike[str], most: int = MOST) -> LoRA:
        """Read a file of any known dialect, or the folder that PEFT or diffusers put it in.

        LoHa and LoKr become factors of at most rank `most`; what that leaves out is `lost`. Raises ValueError, naming the
        file, for whatever is not a LoRA in full: nothing is left out silently.
        """
        file = locate(Path(path))
        tensors, metadata = read_tensors(file)
        metadata |= adapter_config(file)
        try:
            layers, notes = parse(tensors, metadata, most)
            return cls(layers, metadata, notes)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    def write(
        self,
        path: str | os.PathLike[str],
        dialect: str = "kohya",
        dtype: torch.dtype = torch.float16,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write a .safetensors file, whole or not at all, in the dialect `kohya` (read everywhere), `diffusers` or
        `diffusers-old` (its names from before PEFT, which ComfyUI reads as well).

        `metadata` is added to the LoRA's own; what describes ranks and scale is always computed from the layers.
        Raises ValueError where values are not finite or do not survive `dtype`.
        """
        file, given = Path(path), dict(metadata or {})
        try:
            refuse(request_problems(file, dialect, dtype, given) + content_problems(self))
            tensors, described = WRITERS[dialect](self.layers, file.stem, dtype)
            tensors = narrowed(tensors, dtype)
        except ValueError as error:
            raise ValueError(f"{file}: not written, {error}") from None
        own = {key: value for key, value in self.metadata.items() if key not in COMPUTED | OUTDATED}
        write_safetensors(file, tensors, own | described | given)

    @property
    def norm(self) -> float:
        """Frobenius norm of all updates together."""
        return math.sqrt(sum(factors.energy for factors in self.layers.values()))

    @property
    def lost(self) -> float:
        """The share of the original updates' energy that reading left out, 0 unless it truncated a LoHa or LoKr."""
        lost = sum(factors.lost for factors in self.layers.values())
        return lost / (lost + self.norm**2) if lost else 0.0

    @property
    def components(self) -> dict[str, int]:
        """How many layers each component of the pipeline has."""
        return dict(Counter(layer.partition(".")[0] for layer in self.layers))


def request_problems(file: Path, dialect: str, dtype: torch.dtype, metadata: Mapping[str, str]) -> list[str]:
    """What is wrong with where and how a LoRA is to be written."""
    problems = [] if dialect in WRITERS else [f"dialect {dialect!r} is unknown; expected one of {', '.join(WRITERS)}"]
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        problems.append(f"dtype {dtype} is not written; expected torch.float16, bfloat16 or float32")
    if file.suffix != ".safetensors":
        problems.append(f"the name {file.name!r} must end in .safetensors")
    if not file.parent.is_dir():
        problems.append(f"{file.parent} is not a folder; create it first")
    problems += [f"metadata {key!r} is computed from the layers; leave it out" for key in metadata if key in COMPUTED]
    return problems + wrong_texts(metadata)


def content_problems(lora: LoRA) -> list[str]:
    """What in a LoRA cannot be written to any file."""
    problems = [] if lora.layers else ["there are no layers; give at least one"]
    broken = [layer for layer, factors in lora.layers.items() if not is_finite(factors)]
    problems += [f"{layer}: holds NaN or infinite values; go back to the last good state" for layer in broken]
    return problems + wrong_texts(lora.metadata)


def wrong_texts(metadata: Mapping[str, str]) -> list[str]:
    """The metadata entries that are not text, all that safetensors can hold."""
    return [f"metadata {key!r} is {value!r}; expected text" for key, value in metadata.items() if type(value) is not str]


def narrowed(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Matrices in the dtype of the file, refused where they leave its range; alphas, being 0-D, stay float32."""
    cast: dict[str, Tensor] = {}
    problems: list[str] = []
    for key, tensor in tensors.items():
        exact = tensor.detach().to("cpu", torch.float32)
        cast[key] = exact.to(dtype if exact.ndim else torch.float32).clone(memory_format=torch.contiguous_format)
        # In float64, where the norm of large float32 values cannot overflow and hide the error.
        if (cast[key].double() - exact.double()).norm() > CAST_LIMIT * exact.double().norm():
            largest, kind = f"{float(exact.abs().max()):.2g}", str(dtype).removeprefix("torch.")
            problems.append(f"{key} (largest value {largest}) is out of {kind}'s range; write dtype=torch.float32")
    refuse(problems)
    return cast
