"""Fold patches that were learned elsewhere into a subspace: any number, in any order, with the same result.

    merged = merge_patches(subspace, [read_patch(path) for path in paths])
    merge_files("mine.safetensors", ["a.patch.safetensors", "b.patch.safetensors"])

Patches are sorted by name, two copies of one count as one, what is already held is passed over, and the merge goes in
groups of fixed size: neither the order nor a repeated delivery changes a byte of the file.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from share_diffusion import storage
from share_diffusion.capacity import Capacity
from share_diffusion.file import load
from share_diffusion.patch import Patch, read_patch
from share_diffusion.subspace import Subspace, Weights, refuse

GROUP = 64  # patches merged at once: part of what the result is, so it is no setting


def merge_patches(
    subspace: Subspace,
    patches: Iterable[Patch],
    *,
    capacity: Capacity | None = None,
    weights: Weights | None = None,
    against: Sequence[Subspace] = (),
) -> Subspace:
    """Return the subspace with every patch folded in; the order of the patches does not matter.

    A patch that the subspace does not fit is re-expressed through the first of `against` that it fits. Raises ValueError
    with every patch that fits none, belongs to another base or takes another's name; then nothing is merged.
    """
    taken_in = {concept.details.get("patch") for concept in subspace.concepts.values()}
    unique = {patch.digest: patch for patch in patches}
    waiting = sorted((patch.name, digest) for digest, patch in unique.items() if digest not in taken_in)
    refuse(conflicts(subspace, [unique[digest] for _, digest in waiting]))
    bases = {unique[digest].learned_against: unique[digest] for _, digest in waiting}
    sources = {key: source(patch, (subspace, *against), weights) for key, patch in bases.items()}
    refuse(too_old([unique[digest] for _, digest in waiting if sources[unique[digest].learned_against] is None], subspace))
    merged = subspace
    for start in range(0, len(waiting), GROUP):
        group = [(name, digest, unique[digest]) for name, digest in waiting[start : start + GROUP]]
        loras = {name: patch.lora(sources[patch.learned_against]) for name, _, patch in group}  # type: ignore[arg-type]
        facts = {
            name: {"kind": patch.kind, "trigger": patch.trigger, "details": {**patch.details, "patch": digest}}
            for name, digest, patch in group
        }
        merged = merged.merge(loras, weights=weights, capacity=capacity, about=facts)
    return merged


def conflicts(subspace: Subspace, patches: Sequence[Patch]) -> list[str]:
    """Return which patches belong to another base or want a name that is taken."""
    names = Counter(patch.name.casefold() for patch in patches)
    held = {name.casefold() for name in subspace.concepts}
    problems = [f"two different patches are named {name!r}; rename one" for name, count in names.items() if count > 1]
    problems += [f"patch {name!r}: another concept of this name is held; drop it first" for name in names if name in held]
    mismatches = ((patch.name, subspace.base.mismatch(patch.base)) for patch in patches)
    return problems + [f"patch {name!r}: wrong base: {mismatch}" for name, mismatch in mismatches if mismatch]


def source(patch: Patch, candidates: Iterable[Subspace], weights: Weights | None) -> Subspace | None:
    """Return the first subspace that has the columns that a patch was learned against."""
    shapes = {layer: (extra.beta.shape[0], extra.alpha.shape[0]) for layer, extra in patch.extension.items()}
    for candidate in candidates:
        covered = candidate.cover({layer: (shape, patch.kernels.get(layer)) for layer, shape in shapes.items()}, weights)
        if patch.fits(covered):
            return covered
    return None


def too_old(patches: Sequence[Patch], subspace: Subspace) -> list[str]:
    """Return why patches cannot be folded in as they are, one message for each version they were learned against."""
    names: dict[str, list[str]] = {}
    for patch in patches:
        names.setdefault(patch.version, []).append(repr(patch.name))
    return [
        f"patch {', '.join(some)}: learned against basis version {version}, which the leading columns of this subspace (now "
        f"{subspace.basis_version}) no longer are: a cap or budget has rotated them, or it is another file. Name the file "
        "that was learned against (--against FILE), or learn again"
        for version, some in names.items()
    ]


def merge_files(
    file: str | os.PathLike[str],
    patches: Sequence[str | os.PathLike[str]],
    *,
    capacity: Capacity | None = None,
    weights: Weights | None = None,
    against: Sequence[str | os.PathLike[str]] = (),
    write: bool = True,
) -> Subspace:
    """Fold patch files into a subspace file, made anew where there is none, under its lock; the backup counts as `against`.

    `write=False` tells what would come out and leaves the file as it is.
    """
    read = [read_patch(path) for path in patches]
    refuse([] if read else ["there is no patch to merge; give at least one"])
    with storage.locked(file, needed=write):
        if Path(file).exists():
            subspace = load(file, weights)
        else:
            if read[0].origin.kind == "activations":
                raise ValueError(
                    f"{os.fspath(file)} does not exist, and these patches were learned in columns measured on their base, "
                    "which only a subspace file holds; start from a copy of the file that was learned against"
                )
            subspace = Subspace(base=read[0].base, origin=read[0].origin)
        older = [load(path, weights) for path in against if Path(path).exists()]
        with suppress(storage.StorageError):  # a damaged backup is no reason to refuse a patch that does without
            older += [load(path, weights) for path in [storage.backup_path(file)] if path.exists()]
        merged = merge_patches(subspace, read, capacity=capacity, weights=weights, against=older)
        return merged if merged is subspace or not write else merged.save(file)
