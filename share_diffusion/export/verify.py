"""What each program will match of an export, key by key, before anybody is surprised by a LoRA that does nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from share_diffusion.export.family import OTHER, Family, family_of
from share_diffusion.export.readers import READERS
from share_diffusion.export.readers.keys import apart, checkpoint_names, is_stock
from share_diffusion.lora.file import HEADER_LIMIT, file_problem

PIPELINE_WEIGHTS = ("model.safetensors", "diffusion_pytorch_model.safetensors")


@dataclass(frozen=True)
class Verdict:
    """What one program matches of one file: so many of its keys, and the reasons for the rest, the commonest first."""

    file: str
    program: str
    matched: int
    present: int
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        line = f"{self.program:<14} {self.matched:>5} of {self.present} keys"
        return "\n".join([line, *(f"{'':<15} {reason}" for reason in self.reasons)])


def verify(path: Path) -> list[Verdict]:
    """Return each program's verdict on an exported file, pipeline folder, PEFT folder or ComfyUI folder.

    Raises ValueError where there is no export in this place.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if not path.is_dir():
        return file_verdicts(path)
    if (path / "model_index.json").is_file():
        return folder_verdicts(path)
    files = sorted([*path.glob("*.safetensors"), *path.glob("models/*/*.safetensors")])
    components = sorted(path.glob("*/adapter_config.json"))
    if components:
        return [peft_verdict(config.parent) for config in components]
    files = [file for file in files if file.parent.name != "share"]
    if not files:
        raise ValueError(f"{path}: no export that is known; expected a .safetensors file, a pipeline, PEFT or ComfyUI folder")
    return [verdict for file in files for verdict in file_verdicts(file)]


def shapes_of(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Return a safetensors file's shapes by key, and its metadata, from its header alone."""
    if problem := file_problem(path):
        raise ValueError(f"{path}: {problem}")
    with open(path, "rb") as file:
        if int.from_bytes(file.read(8), "little") > HEADER_LIMIT:
            raise ValueError(f"{path}: its header is above the limit of {HEADER_LIMIT} bytes; it is no export")
    try:
        with safe_open(path, "pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None


def file_verdicts(path: Path) -> list[Verdict]:
    """Return each program's verdict on a LoRA or a checkpoint."""
    shapes, _ = shapes_of(path)
    if any(key.endswith(".share_alpha") for key in shapes):
        raise ValueError(f"{path}: this is a subspace file, not an export; `share-diffusion verify` checks it")
    if any(key.startswith("model.diffusion_model.") for key in shapes):
        return [checkpoint_verdict(path, reader, shapes) for reader in READERS]
    if not any(apart(key)[1] for key in shapes):
        raise ValueError(f"{path}: neither a LoRA nor a checkpoint; its keys: {', '.join(sorted(shapes)[:3])}")
    family = lora_family(shapes)
    return [judged(path.name, reader.NAME, {key: reader.lora(key, family) for key in shapes}) for reader in READERS]


def judged(file: str, program: str, found: dict[str, str | None], also: Sequence[str] = ()) -> Verdict:
    """Return a verdict from the reason of every key."""
    reasons = Counter(reason for reason in found.values() if reason)
    told = tuple(f"{count} passed over: {reason}" for reason, count in reasons.most_common())
    return Verdict(file, program, sum(reason is None for reason in found.values()), len(found), (*told, *also))


def lora_family(shapes: dict[str, tuple[int, ...]]) -> Family:
    """Return the family that a LoRA file's own matrices tell."""
    from share_diffusion.lora.diffusers import split_dotted
    from share_diffusion.lora.kohya import split_kohya

    if any("single_blocks" in key or "double_blocks" in key for key in shapes):
        return family_of({"transformer.single_transformer_blocks": (0, 0)})
    sides: dict[str, dict[str, int]] = {}
    for key, shape in shapes.items():
        found = split_kohya(key) if key.startswith("lora_") else split_dotted(key)
        if found and found[1] != "alpha":
            sides.setdefault(found[0], {})[found[1]] = shape[0] if found[1] == "up" else shape[1]
    return family_of({layer: (pair.get("up", 0), pair.get("down", 0)) for layer, pair in sides.items()})


def checkpoint_verdict(path: Path, reader: Any, shapes: dict[str, tuple[int, ...]]) -> Verdict:
    """Return one program's verdict on a single-file checkpoint, absent tensors told as well."""
    family = checkpoint_family(shapes)
    found = {key: reader.checkpoint(key, family) for key in shapes}
    absent = sorted(checkpoint_names(family) - set(shapes)) if is_stock(family) else []
    also = [f"{len(absent)} tensors that it needs are absent, such as {absent[0]}"] if absent else []
    return judged(path.name, reader.NAME, found, also)


def checkpoint_family(shapes: dict[str, tuple[int, ...]]) -> Family:
    """Return the family that a checkpoint's cross-attention tells."""
    prefix = "model.diffusion_model."
    wide = {shape[1] for key, shape in shapes.items() if key.startswith(prefix) and key.endswith("attn2.to_k.weight")}
    first = shapes.get(f"{prefix}input_blocks.0.0.weight", (0,))[0]
    return family_of({"unet.any.attn2.to_k": (320, wide.pop())}) if len(wide) == 1 and first == 320 else OTHER


def folder_verdicts(path: Path) -> list[Verdict]:
    """Return each program's verdict on a pipeline folder; the keys are those of its weights."""
    names = frozenset(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    weights = [path / name for name in sorted(names) if name.endswith(PIPELINE_WEIGHTS)]
    tensors = {file: set(shapes_of(file)[0]) for file in weights}
    clips = [keys for file, keys in tensors.items() if "text_encoder" in file.parent.name and is_clip(keys)]
    prefixed = all(any(key.startswith("text_model.") for key in keys) for keys in clips)
    present = sum(map(len, tensors.values()))
    family = pipeline_family(path)
    verdicts = []
    for reader in READERS:
        problems = reader.folder(names, prefixed, family)
        verdicts.append(Verdict(path.name, reader.NAME, 0 if problems else present, present, tuple(problems)))
    return verdicts


def is_clip(keys: set[str]) -> bool:
    """Return whether these are the tensors of a CLIP text encoder."""
    return any("self_attn.q_proj" in key for key in keys)


def pipeline_family(path: Path) -> Family:
    """Return the family that a pipeline folder's UNet configuration tells."""
    try:
        config = json.loads((path / "unet" / "config.json").read_text(encoding="utf-8"))
        width, first = int(config["cross_attention_dim"]), int(config["block_out_channels"][0])
    except (OSError, ValueError, KeyError, TypeError):
        return OTHER
    return family_of({"unet.any.attn2.to_k": (320, width)}) if first == 320 else OTHER


def peft_verdict(folder: Path) -> Verdict:
    """Return PEFT's verdict on one component's folder: every matrix has a pair, and the configuration its rank."""
    shapes, _ = shapes_of(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    targets = set(config.get("target_modules") or ())
    found = {key: None if peft_module(key) in targets else "target_modules does not name it" for key in shapes}
    return judged(folder.name, "PEFT", found)


def peft_module(key: str) -> str:
    """Return the module that a key of PEFT's file is about."""
    return apart(key)[0].removeprefix("base_model.model.")


def lines(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """Yield what `verify-export` prints: the verdicts under the name of their file."""
    previous = None
    for verdict in verdicts:
        if verdict.file != previous:
            yield verdict.file
        previous = verdict.file
        yield from (f"  {line}" for line in str(verdict).splitlines())
