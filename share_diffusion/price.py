"""What a subspace's file will take, told before it is written: what a budget counts.

    bytes = measured columns + 2 x learned columns + every concept's coefficients + layouts and details + header

Where columns are there from the start, new coefficients take one byte and a scale of two bytes a column, else two bytes
(`packed.py`); one that was read from a file and is not rotated keeps its own packing. The header is spelled as the file
spells it, with the widest numbers that can stand in it; of what only a file knows, the most that is usual is assumed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch

from share_diffusion.basis import Basis
from share_diffusion.capacity import Widths
from share_diffusion.concept import Concept
from share_diffusion.container import Header, TensorInfo, encode
from share_diffusion.packed import SCALE_BYTES, Packed, layout_of

HALF = torch.float16.itemsize
LAYOUT = 3 * torch.int32.itemsize  # bytes of one layer in a layout
FEW = 10**6 - 1  # bytes of a small file: in a larger one places have more digits
USUAL = 512  # bytes of a new concept's trigger, prompts and source, where they are not told
BASE = {"name": "x" * 64, "architecture": "x" * 16, "weights": [-1.2345e-05] * 32, "blocks": [99, 99]}
ORIGIN = {"kind": "activations", "rank": 10**4, "seed": 2**63, "digest": "x" * 16}
Sides = Mapping[str, tuple[int, int]]
Ranks = Mapping[str, Mapping[str, int]]  # new concept -> layer -> rank


def pricing(
    layers: Mapping[str, Basis],
    fixed: Sides,
    held: Mapping[str, Concept],
    ranks: Ranks,
    rotated: set[str],
    about: Mapping[str, Mapping[str, Any]] | None = None,
    most: int = FEW,
) -> Callable[[Widths], int]:
    """Return the function from widths to the file's bytes, measured columns left out, where some layers are rotated.

    `about` is what the file will tell of the new concepts, `most` the bytes that it will not exceed. A held concept keeps
    its rows in a layer that only grows, and has the layer's new width where it is rotated.
    """
    eight_bits = any(any(columns) for columns in fixed.values())
    beside = told(layers, fixed, held, ranks, about or {}, max(most, FEW))
    turned = dict.fromkeys(rotated, 0)  # layer -> the ranks of all held concepts that are rotated in it
    for concept in held.values():
        places, own = layout_of(concept.coefficients), eight_bits
        if isinstance(concept.coefficients, Packed) and not rotated & places.keys():
            own = concept.coefficients.scales is not None
        for layer, (alpha, beta, rank) in places.items():
            if layer in rotated:
                turned[layer] += rank
            else:
                beside += coefficient_bytes((alpha + beta) * rank, rank, own)

    def cost(widths: Widths) -> int:
        total = beside
        for layer, (alpha, beta) in widths.items():
            derived = fixed.get(layer, (0, 0))
            basis = layers[layer]
            total += HALF * (alpha - derived[0]) * basis.alpha.shape[0] + HALF * (beta - derived[1]) * basis.beta.shape[0]
            if layer in turned:
                total += coefficient_bytes((alpha + beta) * turned[layer], turned[layer], eight_bits)
            for new in ranks.values():
                rank = min(new.get(layer, 0), alpha, beta)
                total += coefficient_bytes((alpha + beta) * rank, rank, eight_bits)
        return total

    return cost


def coefficient_bytes(numbers: int, rank: int, eight_bits: bool) -> int:
    """Return the bytes of one layer's coefficients of a rank, scales included."""
    return numbers + 2 * rank * SCALE_BYTES if eight_bits else HALF * numbers


def told(
    layers: Mapping[str, Basis],
    fixed: Sides,
    held: Mapping[str, Concept],
    ranks: Ranks,
    about: Mapping[str, Mapping[str, Any]],
    most: int,
) -> int:
    """Return the bytes of the header, the layouts and the details with the new concepts in them."""
    facts = [(concept.name, concept.kind, concept.trigger, dict(concept.details)) for concept in held.values()]
    for name in ranks:
        known = about.get(name, {"details": {"": "x" * USUAL}})
        facts.append((name, "subject", known.get("trigger", ""), dict(known.get("details", {}))))
    layouts = len({tuple(sorted(layout_of(concept.coefficients).items())) for concept in held.values()}) + len(ranks)
    details = len(json.dumps([fact[3] for fact in facts], sort_keys=True).encode())
    return header_bytes(layers, fixed, facts, most) + layouts * LAYOUT * len(layers) + details


def header_bytes(
    layers: Mapping[str, Basis], fixed: Sides, facts: list[tuple[str, str, str, dict[str, Any]]], most: int
) -> int:
    """Return the bytes of the header, the numbers in it as wide as they may become in a file of `most` bytes."""

    def info(*shape: int) -> TensorInfo:
        return TensorInfo(torch.float16, shape, (most, most))

    infos = {}
    for layer, basis in layers.items():
        infos[f"{layer}.share_alpha"] = info(basis.alpha.shape[0], basis.alpha.shape[0])
        infos[f"{layer}.share_beta"] = info(basis.beta.shape[0], basis.beta.shape[0])
    infos |= {f"{kind}.{number:05d}": info(most) for number in range(len(facts)) for kind in ("concept", "scales")}
    infos |= dict.fromkeys(["layouts", "details"], info(10**4, 10**3, 3))
    if any(any(columns) for columns in fixed.values()):
        infos |= dict.fromkeys(["principal.numbers", "principal.pairs", "principal.sizes"], info(most))
    number = {"norm": -1.23456e-05, "retention": 0.123456, "layout": 10**4}
    metadata = {
        "base": BASE,
        "origin": ORIGIN,
        "basis_version": "x" * 12,
        "layers": [[layer, basis.beta.shape[0], basis.alpha.shape[0], [1, 1]] for layer, basis in layers.items()],
        "concepts": [{"name": name, "kind": kind, "trigger": trigger, **number} for name, kind, trigger, _ in facts],
    }
    return len(encode(Header(metadata, infos, 10**4, f"sha256:{'x' * 64}")))


def least_bytes(
    layers: Mapping[str, Basis], fixed: Sides, held: Mapping[str, Concept], name: str, ranks: Mapping[str, int], most: int
) -> int:
    """Return what the file takes at least, measured columns left out, when a concept of these ranks has been merged into it.

    No learned column stands in the layers that the concept changes.
    """
    widths = {layer: fixed[layer] if layer in ranks else basis.rank for layer, basis in layers.items()}
    return pricing(layers, fixed, held, {name: ranks}, set(ranks), most=most)(widths)
