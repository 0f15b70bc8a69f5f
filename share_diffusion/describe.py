"""What a subspace file holds and costs, as `show` prints it; the keys of `describe` are stable.

Sizes are honest in both directions: `per_concept_mean` is what one concept's coefficients cost, `basis` what all share,
and `as_separate_loras` counts the same concepts as LoRA files of the same rank in half precision, as such files are kept.
`break_even_concepts` is the number of such concepts from which the file is the smaller one.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from share_diffusion.overlap import MOST
from share_diffusion.packed import stored_bytes
from share_diffusion.subspace import Subspace

BYTES = 2  # of a number in half precision


def break_even(basis: int, saved: float) -> int | None:
    """Return from how many concepts on a basis of so many bytes pays, at so many bytes saved a concept; None: never."""
    return max(1, math.ceil(basis / saved)) if saved > 0 else None


def describe(subspace: Subspace, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return everything that `show --json` prints; with more than 256 concepts there is no overlap matrix."""
    fixed = subspace.fixed
    ranks = [max(basis.rank) for basis in subspace.layers.values()] or [0]
    basis = BYTES * sum(
        entry.alpha.shape[0] * (entry.rank[0] - fixed[layer][0]) + entry.beta.shape[0] * (entry.rank[1] - fixed[layer][1])
        for layer, entry in subspace.layers.items()
    )
    basis += subspace.origin.bytes
    concepts = [
        {
            "name": concept.name,
            "kind": concept.kind,
            "trigger": concept.trigger,
            "pseudo_rank": concept.pseudo_rank,
            "retention": concept.retention,
            "functional_retention": concept.details.get("functional_retention"),
            "bytes": stored_bytes(concept, subspace.origin.eight_bits),
        }
        for concept in subspace.concepts.values()
    ]
    loras = [lora_bytes(subspace, name) for name in subspace.concepts]
    mean = sum(entry["bytes"] for entry in concepts) / len(concepts) if concepts else 0
    saved = sum(loras) / len(loras) - mean if loras else 0
    return {
        "format_version": 1,
        "base": subspace.base.name,
        "basis_version": subspace.basis_version,
        "layers": len(subspace.layers),
        "basis_rank": {"min": min(ranks), "max": max(ranks), "mean": round(sum(ranks) / len(ranks), 2)},
        "basis_origin": subspace.origin.kind,
        "bytes": {
            "basis": basis,
            "per_concept_mean": round(mean, 1),
            "total": Path(path).stat().st_size,
            "as_separate_loras": sum(loras),
            "break_even_concepts": break_even(basis, saved),
        },
        "concepts": concepts,
        "overlap": [[round(value, 4) for value in row] for row in subspace.overlap().tolist()] if len(concepts) <= MOST else [],
    }


def lora_bytes(subspace: Subspace, name: str) -> int:
    """Return the bytes of a concept as a LoRA file of its own rank, in half precision."""
    shapes = {layer: (basis.alpha.shape[0], basis.beta.shape[0]) for layer, basis in subspace.layers.items()}
    entries = subspace[name].coefficients.items()
    return BYTES * sum(sum(shapes[layer]) * entry.pseudo_rank for layer, entry in entries)


def table(facts: dict[str, Any]) -> str:
    """Return the facts as a page of text."""
    sizes, rank = facts["bytes"], facts["basis_rank"]
    lines = [
        f"base {facts['base'] or 'unknown'}, basis version {facts['basis_version']} (origin: {facts['basis_origin']})",
        f"{facts['layers']} layers, basis rank {rank['min']} to {rank['max']}, mean {rank['mean']}",
        "",
    ]
    width = max([len("concept"), *(len(entry["name"]) for entry in facts["concepts"])])
    distilled = any(entry["functional_retention"] is not None for entry in facts["concepts"])
    lines.append(
        f"{'concept':<{width}}  {'kind':<7}  {'trigger':<16}  rank  retention      bytes{'  effect' if distilled else ''}"
    )
    for entry in facts["concepts"]:
        lines.append(
            f"{entry['name']:<{width}}  {entry['kind']:<7}  {entry['trigger']:<16}  {entry['pseudo_rank']:>4}"
            f"  {entry['retention']:>9.4f}  {entry['bytes']:>9,}{effect(entry['functional_retention'])}"
        )
    many = sizes["break_even_concepts"]
    smaller = "the first concept" if many == 1 else f"{many} concepts"
    lines += [
        "",
        f"shared basis         {sizes['basis']:>12,} bytes",
        f"a further concept    {sizes['per_concept_mean']:>12,.0f} bytes, plus the columns it adds to the basis",
        f"whole file           {sizes['total']:>12,} bytes",
        f"as separate LoRAs    {sizes['as_separate_loras']:>12,} bytes (same ranks, half precision)",
        f"smaller than those   {'from ' + smaller + ' on' if many else 'never at this size'}",
    ]
    if 1 < len(facts["concepts"]) <= 24:
        lines += ["", "overlap (cosine of the concepts' updates)", *overlap_lines(facts, width)]
    return "\n".join(lines)


def effect(functional: float | None) -> str:
    """Return what a distilled concept keeps of its LoRA's effect, as the end of its line."""
    return "" if functional is None else f"  {functional:>6.3f}"


def overlap_lines(facts: dict[str, Any], width: int) -> list[str]:
    """Return the overlap matrix as text, its columns numbered as its rows."""
    names = [entry["name"] for entry in facts["concepts"]]
    head = " " * (width + 5) + " ".join(f"{number + 1:>5}" for number in range(len(names)))
    rows = zip(names, facts["overlap"], strict=True)
    return [
        head,
        *(
            f"{number + 1:>3} {name:<{width}} " + " ".join(f"{value:>5.2f}" for value in row)
            for number, (name, row) in enumerate(rows)
        ),
    ]
