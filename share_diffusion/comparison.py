"""How two LoRAs, two subspaces, or a LoRA and a subspace are related, in numbers with stable keys.

Updates are compared by the cosine of dW (1 the same direction, 0 unrelated, -1 opposite), whole and by layer group;
bases by the mean squared cosine of their columns, which is the share of one that the other spans.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from share_diffusion.basis import WORK, project
from share_diffusion.kinship import SAME_SEED, alike, cosines, energies, group_of, likeness, row_spaces
from share_diffusion.lora import LoRA
from share_diffusion.subspace import Subspace


def compare(first: LoRA | Subspace, second: LoRA | Subspace) -> dict[str, Any]:
    """Return how two things are related; `what` says which of the three comparisons it is."""
    if isinstance(first, Subspace) and isinstance(second, Subspace):
        return compare_subspaces(first, second)
    if isinstance(first, Subspace):
        assert isinstance(second, LoRA)
        return compare_with_subspace(second, first)
    if isinstance(second, Subspace):
        return compare_with_subspace(first, second)
    return compare_loras(first, second)


def compare_loras(first: LoRA, second: LoRA) -> dict[str, Any]:
    """Return cosines, norms, ranks and the likeness of two LoRAs' input sides."""
    both, common = first.layers.keys() & second.layers.keys(), alike(first, second)
    kin = likeness(row_spaces(first), row_spaces(second))
    return {
        "what": "two updates",
        "cosine": cosines(first, second),
        "norm": [first.norm, second.norm],
        "rank": [max((factors.rank for factors in lora.layers.values()), default=0) for lora in (first, second)],
        "layers": {
            "common": len(common),
            "other_shape": len(both - common),
            "only_first": len(first.layers.keys() - second.layers.keys()),
            "only_second": len(second.layers.keys() - first.layers.keys()),
        },
        "input_likeness": kin,
        "same_seed": kin > SAME_SEED,
    }


def compare_with_subspace(lora: LoRA, subspace: Subspace) -> dict[str, Any]:
    """Return how much of a LoRA the subspace's bases span, and its cosine with every concept."""
    kept: dict[str, float] = defaultdict(float)
    for layer, factors in lora.layers.items():
        if layer in subspace.layers and factors.shape == shape_of(subspace, layer):
            kept[group_of(layer)] += float(project(subspace.layers[layer], factors.up, factors.down).square().sum())
    whole = energies(lora)
    return {
        "what": "an update and a subspace",
        "spanned": {
            "": sum(kept.values()) / sum(whole.values()) if sum(whole.values()) else 1.0,
            **{group: kept[group] / energy if energy else 1.0 for group, energy in whole.items()},
        },
        "concepts": {name: cosines(lora, subspace.lora(name))[""] for name in subspace.concepts},
        "other_shape": sum(
            factors.shape != shape_of(subspace, layer) for layer, factors in lora.layers.items() if layer in subspace.layers
        ),
    }


def compare_subspaces(first: Subspace, second: Subspace) -> dict[str, Any]:
    """Return what two files hold in common: concepts with their cosines, bases with the share that they span."""
    both = [name for name in first.concepts if name in second.concepts]
    return {
        "what": "two subspaces",
        "same_base": first.base.mismatch(second.base) is None,
        "basis_version": [first.basis_version, second.basis_version],
        "numbers": [numbers(first), numbers(second)],
        "other_shape": sum(
            shape_of(first, layer) != shape_of(second, layer) for layer in first.layers.keys() & second.layers.keys()
        ),
        "spanned": {"first_by_second": spanned(first, second), "second_by_first": spanned(second, first)},
        "concepts": {
            name: {
                "cosine": cosines(first.lora(name), second.lora(name)) if first.complete and second.complete else None,
                "norm": [first[name].norm, second[name].norm],
                "retention": [first[name].retention, second[name].retention],
            }
            for name in both
        },
        "only_first": [name for name in first.concepts if name not in second.concepts],
        "only_second": [name for name in second.concepts if name not in first.concepts],
    }


def shape_of(subspace: Subspace, layer: str) -> tuple[int, int]:
    """Return (out, in) of a layer."""
    return subspace.layers[layer].beta.shape[0], subspace.layers[layer].alpha.shape[0]


def numbers(subspace: Subspace) -> int:
    """Return how many numbers a file holds: learned columns and coefficients."""
    fixed = subspace.fixed
    columns = sum(
        basis.alpha.shape[0] * (basis.rank[0] - fixed[layer][0]) + basis.beta.shape[0] * (basis.rank[1] - fixed[layer][1])
        for layer, basis in subspace.layers.items()
    )
    return columns + sum(concept.numbers for concept in subspace.concepts.values())


def spanned(subspace: Subspace, other: Subspace) -> float | None:
    """Return the share of a subspace's columns that the other's bases span, None where nothing is comparable.

    Columns of the base's own weights are not in a file: those of two files are the same where their base and origin are, and
    cannot be compared with any other ones without the base.
    """
    derived = not (subspace.complete and other.complete)
    if derived and (subspace.origin != other.origin or subspace.base.mismatch(other.base)):
        return None
    held = whole = 0.0
    for layer, basis in subspace.layers.items():
        if layer in other.layers and shape_of(subspace, layer) == shape_of(other, layer):
            pairs: tuple[tuple[Tensor, Tensor], ...] = (
                (basis.alpha, other.layers[layer].alpha),
                (basis.beta, other.layers[layer].beta),
            )
            held += sum(float((mine.to(WORK).mT @ theirs.to(WORK)).square().sum()) for mine, theirs in pairs)
            held += sum(subspace.fixed[layer]) * derived
        whole += sum(basis.rank)
    return held / whole if whole else None


def page(facts: Mapping[str, Any], first: str, second: str) -> str:
    """Return the facts as text."""
    if facts["what"] == "two updates":
        layers = facts["layers"]
        lines = [
            f"A {first}: norm {facts['norm'][0]:.4g}, rank {facts['rank'][0]}",
            f"B {second}: norm {facts['norm'][1]:.4g}, rank {facts['rank'][1]}",
            f"layers: {layers['common']} in both, {layers['only_first']} only in A, {layers['only_second']} only in B",
            *foreign(layers["other_shape"]),
            *grouped("cosine", facts["cosine"]),
            f"input sides: likeness {facts['input_likeness']:.2f}"
            + (", started from the same seed" if facts["same_seed"] else ", from different seeds"),
        ]
    elif facts["what"] == "an update and a subspace":
        lines = [*foreign(facts["other_shape"]), *grouped("spanned by the bases", facts["spanned"])]
        lines += [f"cosine with {name}: {value:.4f}" for name, value in facts["concepts"].items()]
    else:
        lines = [
            f"A {first}: {facts['numbers'][0]:,} numbers, basis version {facts['basis_version'][0]}",
            f"B {second}: {facts['numbers'][1]:,} numbers, basis version {facts['basis_version'][1]}",
            "of the same base" if facts["same_base"] else "of different bases",
            *foreign(facts["other_shape"]),
            f"A's bases spanned by B's: {share(facts['spanned']['first_by_second'])}, "
            f"B's by A's: {share(facts['spanned']['second_by_first'])}",
        ]
        for name, entry in facts["concepts"].items():
            cosine = share(entry["cosine"] and entry["cosine"][""])
            lines.append(
                f"{name}: cosine {cosine}, norm {entry['norm'][0]:.4g} and {entry['norm'][1]:.4g}, "
                f"retention {entry['retention'][0]:.4f} and {entry['retention'][1]:.4f}"
            )
        lines += [f"only in A: {', '.join(facts['only_first'])}"] if facts["only_first"] else []
        lines += [f"only in B: {', '.join(facts['only_second'])}"] if facts["only_second"] else []
    return "\n".join(lines)


def foreign(layers: int) -> list[str]:
    """Return, where there are any, that layers of one name differ in shape and are not compared."""
    few = f"{layers} layer{'s' if layers > 1 else ''} of one name"
    return [f"{few} but of different shapes in A and B, not in common: they are for different bases"] if layers else []


def grouped(what: str, values: Mapping[str, float]) -> list[str]:
    """Return a value of the whole and, indented, of each layer group."""
    return [f"{what}: {values['']:.4f}", *(f"  {group:<24} {value:.4f}" for group, value in values.items() if group)]


def share(value: float | None) -> str:
    """Return a share as text."""
    return "not comparable" if value is None else f"{value:.4f}"
