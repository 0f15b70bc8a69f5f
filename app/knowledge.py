"""What a subspace knows, as numbers to look at: spectra, overlaps, retention over time, bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from share_diffusion.describe import break_even, describe, lora_bytes
from share_diffusion.models.blocks import block_groups
from share_diffusion.packed import stored_bytes
from share_diffusion.subspace import Subspace

MOST_CONCEPTS = 24  # in a matrix that a person reads
MOST_DIRECTIONS = 48
GROUPS = {"text": "text encoder", "down": "down blocks", "mid": "middle block", "up": "up blocks"}
REPORT_LIMIT = 4 * 2**20  # bytes


@dataclass(frozen=True)
class Knowledge:
    """Everything that the tab shows of one subspace."""

    overlap: dict[str, Any]
    retention: dict[str, Any]
    sizes: pd.DataFrame
    bytes: dict[str, Any]
    spectra: pd.DataFrame
    concepts: list[list[str]]

    @classmethod
    def of(cls, subspace: Subspace, path: Path, reports: Mapping[str, Mapping[str, float]]) -> Knowledge:
        """Return what a subspace and the reports of its learning tell."""
        bars, facts = sizes(subspace, path)
        matrices = overlap_matrix(subspace), retention_matrix(subspace, reports)
        return cls(*matrices, bars, facts, spectra(subspace), concept_rows(subspace))


def shown_names(subspace: Subspace) -> list[str]:
    """Return the concepts that matrices show: of many, the newest."""
    return list(subspace.concepts)[-MOST_CONCEPTS:]


def spectra(subspace: Subspace) -> pd.DataFrame:
    """Return, for every block group, what share of all concepts' energy lies outside the first n directions.

    Singular values of the cores side by side, [C_1 | C_2 | ...] (k', n k), each concept of norm one, mean over layers.
    """
    groups: dict[str, list[torch.Tensor]] = {}
    for layer, names in block_groups(subspace.layers, subspace.base.blocks).items():
        rank = subspace.layers[layer].rank
        some = [subspace[name] for name in shown_names(subspace)]
        cores = [
            concept.coefficients[layer].core(rank) / max(concept.norm, 1e-30)
            for concept in some
            if layer in concept.coefficients
        ]
        if cores:
            energy = torch.linalg.svdvals(torch.cat(cores, 1).double()).square()
            group = names[min(1, len(names) - 1)]
            groups.setdefault(GROUPS.get(group, group), []).append(energy)
    rows = [row for group, energies in groups.items() for row in spectrum_rows(group, energies)]
    return pd.DataFrame(rows, columns=["directions", "energy left", "layers"])


def spectrum_rows(group: str, energies: Sequence[torch.Tensor]) -> list[tuple[int, float, str]]:
    """Return (directions, share of energy left, group) of one group's layers."""
    longest = min(MOST_DIRECTIONS, max(len(energy) for energy in energies))
    total = sum(float(energy.sum()) for energy in energies) or 1.0
    left = [sum(float(energy[count:].sum()) for energy in energies) / total for count in range(longest + 1)]
    return [(count, round(max(share, 0.0), 6), group) for count, share in enumerate(left)]


def overlap_matrix(subspace: Subspace) -> dict[str, Any]:
    """Return the cosines of all pairs of shown concepts, as a heat map."""
    names = shown_names(subspace)
    shown = replace(subspace, concepts={name: subspace[name] for name in names})
    rows = [[round(value, 3) for value in row] for row in shown.overlap().tolist()]
    return {"columns": names, "rows": names, "values": rows, "low": 0.0, "high": 1.0, "digits": 2}


def retention_matrix(subspace: Subspace, reports: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Return every shown concept's retention after each step of learning, as a heat map; None where it is not known."""
    names = shown_names(subspace)
    steps = [name for name in names if name in reports]
    values: list[list[float | None]] = []
    for name in names:
        then = [reports[step].get(name) for step in steps]
        values.append([*then, subspace[name].retention])
    lowest = min((value for row in values for value in row if value is not None), default=1.0)
    low = min(0.99, math.floor(lowest * 100) / 100)
    columns = [*(f"after {step}" for step in steps), "now"]
    return {"columns": columns, "rows": names, "values": values, "low": low, "high": 1.0, "digits": 4}


def report_files(file: Path, lessons: Path) -> list[Path]:
    """Return the reports of training where it writes them: a concept's folder beside the file, or in a lesson of the page."""
    return [*sorted(file.parent.glob("*/report.json")), *sorted(lessons.glob("*/*/*/report.json"))]


def read_reports(paths: Iterable[Path], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the retention of all concepts after each was learned; a report that cannot be read is passed over."""
    found: dict[str, dict[str, float]] = {}
    for path in paths:
        try:
            if path.stat().st_size > REPORT_LIMIT:
                continue
            report = json.loads(path.read_text(encoding="utf-8"))
            after = {str(key): float(value) for key, value in report["retention"]["after"].items()}
            if report["concept"] in names:
                found[report["concept"]] = after
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return found


def sizes(subspace: Subspace, path: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the bytes of the file against separate LoRAs, as bars and as facts."""
    facts = byte_facts(subspace, path)
    coefficients = facts["per_concept_mean"] * len(subspace.concepts)
    rest = max(0.0, facts["total"] - facts["basis"] - coefficients)
    rows = [
        ("this file", facts["basis"] / 1000, "shared basis"),
        ("this file", coefficients / 1000, "concepts"),
        ("this file", rest / 1000, "names and checksum"),
        ("separate LoRAs", facts["as_separate_loras"] / 1000, "concepts"),
    ]
    return pd.DataFrame(rows, columns=["what", "kB", "of it"]), facts


def byte_facts(subspace: Subspace, path: Path) -> dict[str, Any]:
    """Return the sizes that `describe` tells, without its overlaps of all pairs, which ten thousand concepts forbid."""
    facts = dict(describe(replace(subspace, concepts={}), path)["bytes"])
    count = max(1, len(subspace.concepts))
    separate = sum(lora_bytes(subspace, name) for name in subspace.concepts)
    mean = sum(stored_bytes(concept, subspace.origin.eight_bits) for concept in subspace.concepts.values()) / count
    enough = break_even(facts["basis"], separate / count - mean)
    return facts | {"per_concept_mean": mean, "as_separate_loras": separate, "break_even_concepts": enough}


def concept_rows(subspace: Subspace) -> list[list[str]]:
    """Return the newest concepts as rows of a table."""
    return [
        [
            concept.name,
            concept.kind,
            concept.trigger,
            str(concept.pseudo_rank),
            f"{stored_bytes(concept, subspace.origin.eight_bits):,}",
            f"{concept.retention:.4f}",
        ]
        for concept in (subspace[name] for name in shown_names(subspace))
    ]
