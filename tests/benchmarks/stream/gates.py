"""The gates of a run: where one is broken, or was not measured, the run is invalid whatever its table says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

from stream.scores import Matrix, Study, final, forgetting, judge, learned, present


@dataclass(frozen=True)
class Gate:
    """One condition: what was found (None: not measured), what is asked, and whether it holds."""

    name: str
    found: float | None
    asked: str
    holds: bool


def gates(study: Study) -> list[Gate]:
    """Return every gate of the plan with what was found."""
    rows = [row for row in study.rows if row["method"] != "base"]
    active = [row["norm"] for row in rows if row["weight"] == 1.0 and row["norm"] != ""]
    broken = [row["broken"] for row in study.rows if row["broken"] != ""]
    inactive = [abs(row["loss"] - row["base_loss"]) for row in rows if row["weight"] == 0.0]
    return [
        *(judged_gates(study) if study.plan.gates.measure == "judge" else loss_gates(study)),
        at_least("smallest norm of an update, above", worst(min, active), 1e-6),
        at_most("blank, constant or NaN pictures", float(sum(broken)) if broken else None, 0.0),
        at_most("change of the base's loss at weight 0", worst(max, inactive), 0.0),
    ]


def worst(extreme: Callable[[Sequence[float]], float], values: Sequence[float]) -> float | None:
    """Return the smallest or largest value, NaN where one is none, None of nothing."""
    if any(math.isnan(value) for value in values):
        return math.nan
    return extreme(values) if values else None


def judged_gates(study: Study) -> list[Gate]:
    """Return the gates on what the judge sees, each where the plan has its method."""
    limits, last = study.plan.gates, study.horizon

    def diagonal(matrix: Matrix) -> float | None:
        return learned(matrix, last, judge)

    def lost(matrix: Matrix) -> float | None:
        return forgetting(matrix, last, judge)

    rows = {
        "own_lora": at_least("own LoRA: judge's share", averaged(study, "own_lora", diagonal), limits.own_lora),
        "base": at_most("untouched base: judge's share", averaged(study, "base", diagonal), limits.base),
        "sequential_lora": at_least(
            "sequential LoRA: judge's share forgotten", averaged(study, "sequential_lora", lost), limits.drop
        ),
    }
    return [gate for method, gate in rows.items() if method in study.plan.methods]


def loss_gates(study: Study) -> list[Gate]:
    """Return the gates on the held-out loss, for streams too short to ask the judge."""
    limits, last = study.plan.gates, study.horizon
    gains = [(row["base_loss"] - row["loss"]) / row["base_loss"] for row in study.own.values()]
    return [
        at_least("own LoRA: least share of the base's loss removed", min(gains, default=None), limits.own_lora),
        at_least(
            "sequential LoRA: normalised score forgotten",
            averaged(study, "sequential_lora", lambda one: forgetting(one, last, study.rho)),
            limits.drop,
        ),
        at_least("Share: normalised score", averaged(study, "share", lambda one: final(one, last, study.rho)), 0.5),
        at_most("Share: forgetting", averaged(study, "share", lambda one: forgetting(one, last, study.rho)), 0.002),
    ]


def averaged(study: Study, method: str, measure) -> float | None:
    """Return a measure's mean over a method's streams."""
    values = present(measure(matrix) for matrix in study.complete(method).values())
    return mean(values) if values else None


def at_least(name: str, found: float | None, limit: float) -> Gate:
    """Return a gate that asks for no less than the limit."""
    return Gate(name, found, f">= {limit:g}", found is not None and found >= limit)


def at_most(name: str, found: float | None, limit: float) -> Gate:
    """Return a gate that asks for no more than the limit."""
    return Gate(name, found, f"<= {limit:g}", found is not None and found <= limit)
