"""LoRA files from elsewhere on their way into a subspace: what each is called, what it keeps, and in what order.

Files are read one at a time. Where all of them together are small they are fitted jointly; else each is folded in and
forgotten before the next is read, so that memory holds one file and the bases, however many files there are. Where that
truncated concepts, every file is read once more and its concept told in the final bases, so that nothing adds up.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from share_diffusion.account import Account
from share_diffusion.basis import Basis, Coefficients, factor_core, project
from share_diffusion.capacity import Capacity
from share_diffusion.concept import KINDS, check_name
from share_diffusion.lora import LoRA
from share_diffusion.merge import squared
from share_diffusion.subspace import Subspace, Weights, normal

SETTLED = 0.999  # a concept that certainly keeps this much stays as it was folded in
JOINT_LIMIT = 256 * 2**20  # bytes of files that are fitted in one go
PLAIN_STEMS = ("pytorch_lora_weights", "adapter_model", "pytorch_model", "lora", "model")
TOLD = ("modelspec.title", "modelspec.author", "modelspec.license", "modelspec.usage_hint", "ss_base_model_version")
# Width of the text that a UNet's cross-attention reads, and what has it.
CONTEXTS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}


@dataclass(frozen=True)
class Source:
    """A LoRA file and the concept it is to become."""

    name: str
    path: Path
    kind: str = "style"
    trigger: str = ""


def sources(
    paths: Sequence[str], names: Sequence[str] = (), kinds: Sequence[str] = (), triggers: Sequence[str] = ()
) -> list[Source]:
    """Return the files with their names: from `NAME=PATH`, else from the file's stem.

    `kinds` and `triggers` are `NAME=VALUE`, or one value for all; a trigger is otherwise what the file or its sidecar
    says. Raises ValueError with all problems at once.
    """
    problems: list[str] = []
    given = {path: name for name, path in (parted(entry, "--name", problems) for entry in names)}
    chosen = {Path(path): given.get(path) for path in [*paths, *(path for path in given if path not in paths)]}
    named = [(name or default_name(path), path) for path, name in chosen.items()]
    problems += [f"{path} is given twice; once is enough" for path in dict.fromkeys(paths) if list(paths).count(path) > 1]
    problems += name_problems(named)
    kind_of = values(kinds, [name for name, _ in named], "--kind", problems)
    trigger_of = values(triggers, [name for name, _ in named], "--trigger", problems)
    wrong = [f"{kind!r} of {name!r}" for name, kind in kind_of.items() if kind not in KINDS]
    problems += [f"--kind {entry} is not one of {', '.join(KINDS)}" for entry in wrong]
    problems += [] if named else ["no LoRA is given; name at least one file"]
    if problems:
        raise ValueError("; ".join(dict.fromkeys(problems)))
    return [
        Source(normal(name), path, kind_of.get(name, "style"), trigger_of.get(name, sidecar_trigger(path)))
        for name, path in named
    ]


def parted(entry: str, flag: str, problems: list[str]) -> tuple[str, str]:
    """Return the two sides of `NAME=VALUE`."""
    name, sign, value = entry.partition("=")
    if not (name and sign and value):
        problems.append(f"{flag} {entry!r} is not NAME=VALUE")
    return name, value


def values(entries: Sequence[str], names: Sequence[str], flag: str, problems: list[str]) -> dict[str, str]:
    """Return what `NAME=VALUE` entries say of each name; a bare value is said of all."""
    found: dict[str, str] = {}
    for entry in entries:
        name, value = parted(entry, flag, problems) if "=" in entry else ("", entry)
        if name and name not in names:
            problems.append(f"{flag} {entry!r} is of no concept here; they are {', '.join(names)}")
        found |= {name: value} if name else {every: value for every in names if every not in found}
    return found


def default_name(path: Path) -> str:
    """Return a file's stem, or its folder's name where every trainer calls its file the same."""
    plain = path.is_dir() or path.stem in PLAIN_STEMS or path.suffix == ""
    return (path if path.is_dir() else path.parent).resolve().name if plain else path.stem


def name_problems(named: Sequence[tuple[str, Path]]) -> list[str]:
    """Return what is wrong with the names, and which files would get the same one."""
    problems, taken = [], defaultdict(list)
    for name, path in named:
        try:
            taken[check_name(name).casefold()].append(path)
        except ValueError as error:
            problems.append(f"{path}: {error}; give it a name with --name NAME={path}")
    for folded, files in taken.items():
        if len(files) > 1:
            listed = ", ".join(map(str, files))
            problems.append(f"{listed} would all be called {folded!r}; name them apart with --name OTHER={files[1]}")
    return problems


def sidecar_trigger(path: Path) -> str:
    """Return the trigger that a sidecar JSON (as A1111 keeps) has for a LoRA file, or nothing."""
    try:
        told = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ""
    trigger = told.get("activation text", "") if isinstance(told, dict) else ""
    return trigger.strip() if isinstance(trigger, str) else ""


def about(source: Source, lora: LoRA) -> dict[str, Any]:
    """Return a concept's kind, trigger and details from the command's flags and the file's metadata."""
    told = {key: lora.metadata[key] for key in TOLD if lora.metadata.get(key)}
    details = {"source": source.path.name, **({"metadata": told} if told else {})}
    if licence := told.get("modelspec.license"):
        details["license"] = licence  # an export carries it on
    return {
        "kind": source.kind,
        "trigger": source.trigger or lora.metadata.get("modelspec.trigger_phrase", ""),
        "details": details,
    }


def read_all(subspace: Subspace, found: Sequence[Source], account: Account) -> Iterator[tuple[Source, LoRA]]:
    """Yield the LoRAs one at a time, refusing the first that is for another kind of base than what was before it."""
    account.family = family_of({layer: shape_of(basis) for layer, basis in subspace.layers.items()})
    for source in found:
        lora = LoRA.read(source.path)
        told = family_of({layer: factors.shape for layer, factors in lora.layers.items()})
        if told and account.family and told != account.family:
            raise ValueError(f"{source.path} is for {told}, what was before it for {account.family}; a subspace has one base")
        account.family = account.family or told
        account.enter(source.name, str(source.path), lora)
        yield source, lora


def take_in(
    subspace: Subspace,
    found: Sequence[Source],
    capacity: Capacity,
    *,
    weights: Weights | None = None,
    pseudo_rank: int | None = None,
    progress: Callable[[int, int], None] = lambda done, whole: None,
) -> tuple[Subspace, Account]:
    """Return the subspace with all the files folded in, and the account of them; names already held are refused first."""
    refuse_taken(subspace, found)
    account = Account()
    joint = sum(size_of(source.path) for source in found) <= JOINT_LIMIT
    waiting: dict[str, LoRA] = {}
    facts: dict[str, dict[str, Any]] = {}
    for number, (source, lora) in enumerate(read_all(subspace, found, account), 1):
        waiting[source.name], facts[source.name] = lora, about(source, lora)
        if not joint or number == len(found):
            subspace = subspace.merge(waiting, weights=weights, capacity=capacity, pseudo_rank=pseudo_rank, about=facts)
            waiting, facts = {}, {}
        progress(number, len(found))
    if not joint:
        lossy = [source for source in found if subspace[source.name].retention < SETTLED]
        subspace = settled(subspace, lossy, pseudo_rank)
    return subspace, account


def settled(subspace: Subspace, found: Sequence[Source], pseudo_rank: int | None = None) -> Subspace:
    """Return the subspace with these concepts expressed in its bases anew, each from its own file, read once more.

    What many truncations left of a concept, and the bound of what they lost, give way to the best that the final bases
    hold of it and to that share itself: retention = sum ||beta.T dW alpha||^2 / ||dW||^2, cut to rank p.
    """
    concepts = dict(subspace.concepts)
    for source in found:
        lora, held = LoRA.read(source.path), subspace[source.name]
        coefficients = {}
        for layer, factors in lora.layers.items():
            core = project(subspace.layers[layer], factors.up, factors.down)
            if min(core.shape) == 0:
                continue
            entry = factor_core(core, min(pseudo_rank or factors.rank, factors.rank, *core.shape))
            coefficients[layer] = Coefficients(entry.alpha.float(), entry.beta.float())
        kept = sum(float(squared(entry)) for entry in coefficients.values())
        retention = min(1.0, kept / held.norm**2) if held.norm else 1.0
        concepts[held.name] = replace(held, coefficients=coefficients, retention=retention)
    return replace(subspace, concepts=concepts)


def refuse_taken(subspace: Subspace, found: Sequence[Source]) -> None:
    """Raise ValueError for the names that the subspace holds already."""
    held = {name.casefold() for name in subspace.concepts}
    if taken := [source.name for source in found if source.name.casefold() in held]:
        raise ValueError(
            f"{', '.join(taken)}: already in the file; drop or rename the old one, or give the new one another name with --name"
        )


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of the files in a folder; 0 where there is none, which reading will tell."""
    if path.is_dir():
        return sum(entry.stat().st_size for entry in path.iterdir() if entry.is_file())
    return path.stat().st_size if path.is_file() else 0


def shape_of(basis: Basis) -> tuple[int, int]:
    """Return (out, in) of a basis's layer."""
    return basis.beta.shape[0], basis.alpha.shape[0]


def family_of(shapes: Mapping[str, tuple[int, int]]) -> str:
    """Return what kind of base has layers of these names and shapes (out, in), as far as they tell, or nothing."""
    for layer, (_, width) in shapes.items():
        if layer.startswith("transformer.single_transformer_blocks"):
            return "FLUX"
        if layer.startswith("unet.") and layer.endswith("attn2.to_k"):
            return CONTEXTS.get(width, f"a UNet that reads text of width {width}")
    return ""
