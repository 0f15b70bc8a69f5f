"""What each program will match of an export, key by key, before anybody is surprised by a LoRA that does nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from share_diffusion.export.family import OTHER, Family, family_of
from share_diffusion.export.readers import READERS, peft
from share_diffusion.export.readers.keys import apart, checkpoint_names, is_stock
from share_diffusion.lora.file import HEADER_LIMIT, file_problem

SHOWN = 20
PIPELINE_WEIGHTS = ("model.safetensors", "diffusion_pytorch_model.safetensors")


@dataclass(frozen=True)
class Verdict:
    """What one program matches of one file: so many of its keys, and the reasons for the rest, the commonest first.

    `program` is empty where no program can be asked about the file; the one reason tells why.
    """

    file: str
    program: str
    matched: int
    present: int
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.program:
            return "\n".join(self.reasons)
        line = f"{self.program:<14} {self.matched:>5} of {self.present} keys"
        return "\n".join([line, *(f"{'':<15} {reason}" for reason in self.reasons)])


def verify(path: Path) -> list[Verdict]:
    """Return each program's verdict on an exported file, a pipeline folder, or every export in a folder.

    A folder may be ComfyUI's, a PEFT adapter's or hold several exports; what else of tensors lies there has a verdict
    without a program. Raises ValueError where there is no export in this place.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if not path.is_dir():
        return file_verdicts(path)
    if (path / "model_index.json").is_file():
        return folder_verdicts(path)
    judged, unknown = [], []
    for place, judge in exports_in(path):
        name = path.resolve().name if place == path else place.relative_to(path).as_posix()
        try:
            judged += [replace(verdict, file=name) for verdict in judge(place)]
        except ValueError as error:
            unknown.append(Verdict(name, "", 0, 0, (str(error).removeprefix(f"{place}: "),)))
    if not judged and not unknown:
        raise ValueError(f"{path}: no export that is known; expected a .safetensors file, a pipeline, PEFT or ComfyUI folder")
    if not judged:
        raise ValueError(none_known(path, unknown))
    return [*judged, *unknown]


def none_known(path: Path, unknown: Sequence[Verdict]) -> str:
    """Return the message for a folder in which nothing can be judged."""
    told = [f"\n  - {verdict.file}: {verdict.reasons[0]}" for verdict in unknown[:SHOWN]]
    more = [f"\n  - and {len(unknown) - SHOWN} more"] if len(unknown) > SHOWN else []
    return f"{path}: {len(unknown)} file{'s' * (len(unknown) > 1)}, none of them an export:{''.join([*told, *more])}"


def exports_in(folder: Path) -> Iterator[tuple[Path, Callable[[Path], list[Verdict]]]]:
    """Yield what in a folder may be an export, with what judges it; two levels down, as `--each` writes PEFT's."""
    for index in sorted(folder.glob("*/model_index.json")):
        yield index.parent, folder_verdicts
    for config in sorted({found for depth in ("", "*/", "*/*/") for found in folder.glob(f"{depth}{peft.CONFIG}")}):
        yield config.parent, peft_verdicts
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("models/*/*.safetensors")]):
        # What the nodes of app/comfyui read, and PEFT's own file beside its configuration.
        if file.parent != folder / "models" / "share" and not (file.parent / peft.CONFIG).is_file():
            yield file, file_verdicts


def shapes_of(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Return a safetensors file's shapes by key, and its metadata, from its header alone."""
    if problem := file_problem(path):
        raise ValueError(f"{path}: {problem}")
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
        if size > HEADER_LIMIT:
            raise ValueError(f"{path}: its header is above the limit of {HEADER_LIMIT} bytes; it is no export")
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
    flat = {key: shape_problem(key, shape) for key, shape in shapes.items()}
    found = ((reader, {key: flat[key] or reader.lora(key, family) for key in shapes}) for reader in READERS)
    return [judged(path.name, reader.NAME, reasons) for reader, reasons in found]


def shape_problem(key: str, shape: tuple[int, ...]) -> str | None:
    """Return why a tensor with the name of a LoRA's matrix is none, or None."""
    ending = apart(key)[1]
    return "no matrix, by its shape" if ending and ending != ".alpha" and len(shape) < 2 else None


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
        if found and found[1] in ("up", "down") and len(shape) > 1:
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
    keys = [shape for key, shape in shapes.items() if key.startswith(prefix) and key.endswith("attn2.to_k.weight")]
    wide = {shape[1] if len(shape) == 2 else 0 for shape in keys}
    first = next(iter(shapes.get(f"{prefix}input_blocks.0.0.weight", ())), 0)
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
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return OTHER
    return family_of({"unet.any.attn2.to_k": (320, width)}) if first == 320 else OTHER


def peft_verdicts(folder: Path) -> list[Verdict]:
    """Return PEFT's verdict on one component's folder, or that only PEFT itself can tell."""
    config = peft.config_of(folder)
    shapes, _ = shapes_of(folder / peft.WEIGHTS)
    if reason := peft.unjudged(config):
        return [Verdict(folder.name, "", 0, len(shapes), (reason,))]
    found = {key: shape_problem(key, shape) or peft.lora(key, shape, config) for key, shape in shapes.items()}
    return [judged(folder.name, peft.NAME, found)]


def lines(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """Yield what `verify-export` prints: the verdicts under the name of their file."""
    previous = None
    for verdict in verdicts:
        if verdict.file != previous:
            yield verdict.file
        previous = verdict.file
        yield from (f"  {line}" for line in str(verdict).splitlines())
