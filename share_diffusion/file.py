"""The one file: how a subspace lies in a careful store (`storage.py`), byte for byte.

    <layer>.share_alpha     (in, k)     learned columns of the input basis, float16
    <layer>.share_beta      (out, k')   learned columns of the output basis
    concept.<number>        (n,)        one concept's coefficients in float16 or int8, packed as `packed.py` tells
    scales.<number>         (s,)        bfloat16, beside int8 alone: what the columns of its coefficients are stretched by
    layouts                 (g, layers, 3) int32: rows of alpha, rows of beta and p of every layer; p = 0 is an absent layer
    details                 (bytes,)    JSON list, one entry a concept: facts that nobody needs to list concepts

    principal.*             columns measured on the base (origin `activations`), as `principal.py` tells

Derived columns (a basis of origin `random` or `weights`) are not in the file: they are made again when it is read. With them
and with measured ones new concepts are written in int8. A concept that was read is written as it was, to the bit.
The metadata holds `base`, `origin`, `basis_version`, `layers` as [path, out, in, kernel or null] and `concepts` as a list
of {name, kind, trigger, norm, retention, layout}; so the header alone lists ten thousand concepts. Rows that a concept
does not have, because its layer grew later, are zero.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from share_diffusion import principal, storage
from share_diffusion.basis import Basis
from share_diffusion.concept import Concept
from share_diffusion.packed import Packed, half, layout_of, settled, unit_of
from share_diffusion.subspace import BaseIdentity, Origin, Subspace, Weights

KNOWN = {"base", "origin", "basis_version", "layers", "concepts"}
MOST = 2**32  # numbers of derived columns that a file may ask for, 17 GB: 48 columns a side are 0.5e9 in the largest of bases
Layout = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Listing:
    """What the header of a file tells without its tensors."""

    base: str
    basis_version: str
    generation: int
    concepts: tuple[Mapping[str, Any], ...]


def save(subspace: Subspace, path: str | os.PathLike[str], *, replace: bool = False) -> Subspace:
    """Write a subspace, whole or not at all; see `Subspace.save`."""
    if not subspace.complete:
        raise ValueError(
            "this subspace was loaded without its base's weights, only to be looked at; load it with them to save it"
        )
    subspace = settle(subspace)
    tensors, metadata = pack(subspace)
    target = Path(os.path.realpath(path))
    expected = subspace.generation if subspace.file == target and not replace else None
    generation = storage.write(target, tensors, metadata, expected_generation=expected, replace=replace)
    return changed(subspace, generation=generation, file=target)


def settle(subspace: Subspace) -> Subspace:
    """Return the subspace with all coefficients rounded as the file holds them."""
    concepts = {name: settled(concept, subspace.origin.eight_bits) for name, concept in subspace.concepts.items()}
    return changed(subspace, concepts=concepts)


def load(path: str | os.PathLike[str], weights: Weights | None = None, *, look: bool = False) -> Subspace:
    """Read a subspace file; `look=True` leaves out what only the base's weights could give (see `Subspace.complete`)."""
    metadata, tensors, generation = storage.read(path)
    if "patch" in metadata:
        raise storage.StorageError(
            f"{os.fspath(path)} is a patch; fold it in first: share-diffusion merge FILE {os.fspath(path)}"
        )
    try:
        return changed(unpack(metadata, tensors, generation, weights, look), file=Path(os.path.realpath(path)))
    except (KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        from share_diffusion.memory import is_end  # which knows models, and reading a file does not need them

        if is_end(error):
            raise
        raise storage.StorageError(f"{os.fspath(path)} is not a subspace file: {type(error).__name__} {error}") from error


def listing(path: str | os.PathLike[str]) -> Listing:
    """Return a file's concepts from its header alone."""
    header = storage.read_header(path)
    metadata = header.metadata
    if "concepts" not in metadata:
        raise storage.StorageError(f"{os.fspath(path)} is not a subspace file: it lists no concepts")
    try:
        for entry in metadata["concepts"]:
            check_entry(entry)
        return Listing(metadata["base"]["name"], metadata["basis_version"], header.generation, tuple(metadata["concepts"]))
    except (KeyError, TypeError) as error:
        raise storage.StorageError(f"{os.fspath(path)} is not a subspace file: {type(error).__name__} {error}") from error


def check_entry(entry: Mapping[str, Any]) -> None:
    """Raise TypeError or KeyError where what a header tells of a concept is of another kind than is ever written."""
    texts = {key: entry[key] for key in ("name", "kind", "trigger")}
    numbers = {key: entry[key] for key in ("norm", "retention")}
    wrong = [key for key, value in texts.items() if not isinstance(value, str)]
    wrong += [key for key, value in numbers.items() if isinstance(value, bool) or not isinstance(value, (int, float))]
    wrong += [key for key, value in numbers.items() if key not in wrong and not 0 <= value < math.inf]
    if wrong:
        raise TypeError(f"a concept's {', '.join(wrong)} cannot be read")


def pack(subspace: Subspace) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the metadata of a subspace's file."""
    tensors: dict[str, Tensor] = {}
    subspace, fixed, order = settle(subspace), subspace.fixed, sorted(subspace.layers)
    for layer, basis in subspace.layers.items():
        tensors[f"{layer}.share_alpha"] = half(basis.alpha[:, fixed[layer][0] :], layer)
        tensors[f"{layer}.share_beta"] = half(basis.beta[:, fixed[layer][1] :], layer)
    if subspace.origin.principal is not None:
        tensors |= principal.pack(subspace.origin.principal, order)
    layouts: dict[Layout, int] = {}
    concepts = []
    for number, concept in enumerate(subspace.concepts.values()):
        places = layout_of(concept.coefficients)
        layout = tuple(places.get(layer, (0, 0, 0)) for layer in order)
        entry = {"name": concept.name, "kind": concept.kind, "trigger": concept.trigger}
        norm, retention = float(f"{concept.norm:.6g}"), math.floor(round(concept.retention * 1e6, 3)) / 1e6
        entry |= {"norm": norm, "retention": retention}
        concepts.append({**entry, "layout": layouts.setdefault(layout, len(layouts))})
        held = concept.coefficients
        assert isinstance(held, Packed)
        tensors[f"concept.{number:05d}"] = held.row
        if held.scales is not None:
            tensors[f"scales.{number:05d}"] = held.scales
    tensors["layouts"] = torch.tensor(list(layouts), dtype=torch.int32).reshape(len(layouts), len(order), 3)
    details = json.dumps([dict(concept.details) for concept in subspace.concepts.values()], sort_keys=True)
    tensors["details"] = torch.tensor(list(details.encode()), dtype=torch.uint8)
    shapes = {layer: (basis.beta.shape[0], basis.alpha.shape[0]) for layer, basis in subspace.layers.items()}
    kernels = {layer: list(kernel) for layer, kernel in subspace.kernels.items()}
    return tensors, {
        **subspace.extra,
        "base": subspace.base.facts,
        "origin": subspace.origin.facts,
        "basis_version": subspace.basis_version,
        "layers": [[layer, *shapes[layer], kernels.get(layer)] for layer in order],
        "concepts": concepts,
    }


def unpack(
    metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], generation: int, weights: Weights | None, look: bool
) -> Subspace:
    """Return the subspace that a file's content describes."""
    base = BaseIdentity.of(metadata["base"])
    shapes = {layer: (out, width) for layer, out, width, _ in metadata["layers"]}
    kernels = {layer: (kernel[0], kernel[1]) for layer, _, _, kernel in metadata["layers"] if kernel}
    origin = Origin(**metadata["origin"])
    if origin.kind == "activations":
        origin = changed(origin, principal=principal.unpack(tensors, shapes, kernels))
    widths = ((origin.columns(layer, shape), shape) for layer, shape in shapes.items())
    if (asked := sum(alpha * shape[1] + beta * shape[0] for (alpha, beta), shape in widths)) > MOST:
        raise RuntimeError(f"it asks for {asked:,} numbers of derived columns, and at most {MOST:,} are made")
    look = look and origin.kind == "weights" and weights is None
    layers = {}
    for layer, shape in shapes.items():
        derived = blank(origin, layer, shape) if look else origin.derive(layer, shape, weights)
        layers[layer] = Basis(
            alpha=torch.cat([derived.alpha, tensors[f"{layer}.share_alpha"].float()], dim=1),
            beta=torch.cat([derived.beta, tensors[f"{layer}.share_beta"].float()], dim=1),
        )
    details = json.loads(bytes(tensors["details"].tolist()))
    if not all(isinstance(entry, dict) for entry in details):
        raise TypeError("the details of a concept are no table")
    layouts = [places_of(list(shapes), layout) for layout in tensors["layouts"].tolist()]
    ranks = {layer: basis.rank for layer, basis in layers.items()}
    if any(place[side] > ranks[layer][side] for one in layouts for layer, place in one.items() for side in (0, 1)):
        raise IndexError("a concept has more rows than its basis has columns")
    concepts = {}
    for number, entry in enumerate(metadata["concepts"]):
        check_entry(entry)
        known = {key: entry[key] for key in ("name", "kind", "trigger", "norm", "retention")}
        row, scales = tensors[f"concept.{number:05d}"], tensors.get(f"scales.{number:05d}")
        if (scales is None) == (row.dtype == torch.int8):
            raise TypeError(f"concept {number} is {row.dtype} and has {'no ' * (scales is None)}scales")
        coefficients = Packed(row, scales, unit_of(entry["norm"]), layouts[entry["layout"]])
        concepts[entry["name"]] = Concept(**known, coefficients=coefficients, details=details[number])
    return Subspace(
        base=base,
        origin=origin,
        layers=layers,
        kernels=kernels,
        concepts=concepts,
        generation=generation,
        extra={key: value for key, value in metadata.items() if key not in KNOWN},
        complete=not look,
    )


def blank(origin: Origin, layer: str, shape: tuple[int, int]) -> Basis:
    """Return zeros in place of derived columns."""
    alpha, beta = origin.columns(layer, shape)
    return Basis(torch.zeros(shape[1], alpha), torch.zeros(shape[0], beta))


def places_of(order: Sequence[str], layout: Sequence[Sequence[int]]) -> dict[str, tuple[int, int, int]]:
    """Return (rows of alpha, rows of beta, pseudo-rank) of the layers that a concept changes."""
    if len(layout) != len(order):
        raise IndexError(f"a layout of {len(layout)} layers where there are {len(order)}")
    if any(number < 0 for entry in layout for number in entry):
        raise IndexError("a layout has a negative size")
    return {layer: (alpha, beta, rank) for layer, (alpha, beta, rank) in zip(order, layout, strict=True) if rank}


def drop_concept(path: str | os.PathLike[str], name: str) -> list[str]:
    """Take a concept out of a file and return the names that are left; works without the base's weights."""
    subspace = load(path, look=True)
    smaller = changed(subspace.drop(name), complete=True)  # derived columns are not in the file, so none are needed
    save(smaller, path)
    return list(smaller.concepts)


def rename_concept(path: str | os.PathLike[str], old: str, new: str) -> None:
    """Give a concept of a file another name; works without the base's weights."""
    subspace = load(path, look=True)
    save(changed(subspace.rename(old, new), complete=True), path)
