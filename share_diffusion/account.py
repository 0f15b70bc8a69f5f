"""What LoRAs from elsewhere were and what a subspace keeps of them, after their files have been forgotten."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from share_diffusion.kinship import RowSpaces, energies, group_of, likeness, row_spaces, seed_groups
from share_diffusion.lora import LoRA
from share_diffusion.merge import squared
from share_diffusion.subspace import Subspace


@dataclass
class Account:
    """What is known of the LoRAs that went in, when their files have been forgotten."""

    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    energies: dict[str, dict[str, float]] = field(default_factory=dict)
    spaces: dict[str, RowSpaces] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    family: str = ""  # the kind of base that they are for, as far as their layers tell

    def enter(self, name: str, path: str, lora: LoRA) -> None:
        """Take down what a LoRA was."""
        self.facts[name] = {
            "components": lora.components,
            "rank": max((factors.rank for factors in lora.layers.values()), default=0),
            "norm": lora.norm,
            "numbers": sum(factors.up.numel() + factors.down.numel() for factors in lora.layers.values()),
            "lost": lora.lost,
        }
        shares, spaces = energies(lora), row_spaces(lora)
        twins = [other for other in self.energies if alike(shares, self.energies[other], spaces, self.spaces[other])]
        self.notes += [f"{name} is the same update as {twins[0]}; drop one of the two"] if twins else []
        self.energies[name], self.spaces[name] = shares, spaces
        self.notes += [f"{path}: {note}" for note in lora.notes]
        if lora.lost:
            self.notes.append(f"{path}: converted to plain factors, which hold {1 - lora.lost:.5f} of its energy")


def alike(shares: Mapping[str, float], others: Mapping[str, float], spaces: RowSpaces, other_spaces: RowSpaces) -> bool:
    """Tell whether two updates have the same energies in every layer group, and the same row spaces."""
    if shares.keys() != others.keys() or any(abs(shares[group] - others[group]) > 1e-4 * shares[group] for group in shares):
        return False
    return spaces.keys() == other_spaces.keys() and likeness(spaces, other_spaces) > 0.999


def group_retention(subspace: Subspace, account: Account) -> dict[str, dict[str, float]]:
    """Return the share of every new concept's energy that is held, by layer group."""
    found: dict[str, dict[str, float]] = {}
    for name, original in account.energies.items():
        kept: dict[str, float] = defaultdict(float)
        for layer, entry in subspace[name].coefficients.items():
            kept[group_of(layer)] += float(squared(entry))
        found[name] = {group: min(1.0, kept[group] / energy) if energy else 1.0 for group, energy in original.items()}
    return found


def report(before: Subspace, after: Subspace, account: Account) -> str:
    """Return what goes in, what it keeps and what the others lose, as a page of text."""
    shares = group_retention(after, account)
    groups = sorted({group for share in shares.values() for group in share})
    heads = [f"{group:>6}" for group in groups]
    width = max(len(name) for name in ("concept", *after.concepts))
    lines = [f"{'concept':<{width}}  rank      norm  retention  {'  '.join(heads)}"]
    for name, facts in account.facts.items():
        cells = [
            f"{shares[name][group]:>{len(head)}.4f}" if group in shares[name] else " " * len(head)
            for group, head in zip(groups, heads, strict=True)
        ]
        row = f"{name:<{width}}  {facts['rank']:>4}  {facts['norm']:>8.3g}  {after[name].retention:>9.4f}  {'  '.join(cells)}"
        lines.append(row.rstrip())
    for name, concept in before.concepts.items():
        if name in after.concepts and after[name].retention != concept.retention:
            lines.append(f"{name:<{width}}  held before: retention {concept.retention:.4f} -> {after[name].retention:.4f}")
    return "\n".join([*lines, *component_lines(account), *seed_lines(account), *(f"note: {note}" for note in account.notes)])


def component_lines(account: Account) -> list[str]:
    """Return how many layers of each component the LoRAs have, those that are alike in one line."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name, facts in account.facts.items():
        alike[", ".join(f"{number} in {part}" for part, number in facts["components"].items())].append(name)
    return [f"layers: {count} ({'all' if len(alike) == 1 else ', '.join(names)})" for count, names in alike.items()]


def seed_lines(account: Account) -> list[str]:
    """Return the groups of LoRAs that started from the same random state."""
    return [
        f"same seed: {', '.join(group)}: started from one random state, so their input side is one; that says nothing of "
        "what they learned"
        for group in seed_groups(account.spaces)
    ]
