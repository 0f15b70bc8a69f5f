"""From cells to numbers: the accuracy matrix R of every stream, and what is read off it.

A concept's loss is normalised as rho = (L_base - L) / (L_base - L_own): 0 is the untouched base, 1 the concept's own LoRA
of the same seed. With R[i, j] the score of concept j after i concepts, T the last step,

    final = mean_j R[T, j]     learned = mean_i R[i, i]     forgetting = mean_{j<T} (max_i R[i, j] - R[T, j])
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import mean, median, stdev

from stream.cells import Row, Table, curve_of
from stream.plan import Plan

HEADLINE = ("own_lora", "share", "sequential_lora", "paper")
Pair = tuple[int, int]  # (order, seed)


@dataclass(frozen=True)
class Matrix:
    """One stream's cells at weight 1, by (after, concept), and which concepts it learned in which order."""

    rows: dict[tuple[int, str], Row]
    names: tuple[str, ...]

    @property
    def reached(self) -> int:
        """How many concepts are learned with every cell of their row finished."""
        places = range(1, len(self.names) + 1)
        return max((after for after in places if all((after, name) in self.rows for name in self.names[:after])), default=0)

    def value(self, after: int, concept: str, score: Callable[[Row], float | None]) -> float | None:
        """Return R[after, concept], None where it was not measured."""
        row = self.rows.get((after, concept))
        return None if row is None else score(row)


@dataclass(frozen=True)
class Study:
    """All cells of a plan, as matrices by method and (order, seed)."""

    plan: Plan
    rows: list[Row]
    matrices: dict[str, dict[Pair, Matrix]]
    own: dict[tuple[int, str], Row] = field(default_factory=dict)  # (seed, concept) -> the own LoRA's cell

    @property
    def horizon(self) -> int:
        """After how many concepts methods are compared: the last checkpoint that all headline methods have reached."""
        most = [max((one.reached for one in self.matrices.get(name, {}).values()), default=0) for name in self.headline]
        common = min(most, default=0)
        checkpoints = [*self.plan.measures.judged_after, len(self.plan.concepts)]
        return max((after for after in checkpoints if after <= common), default=common)

    @property
    def headline(self) -> list[str]:
        """The headline methods that the plan has."""
        return [name for name in HEADLINE if name in self.plan.methods]

    def complete(self, method: str) -> dict[Pair, Matrix]:
        """Return a method's streams that have reached the horizon."""
        return {pair: one for pair, one in self.matrices.get(method, {}).items() if one.reached >= self.horizon > 0}

    def rho(self, row: Row) -> float | None:
        """Return a cell's normalised loss."""
        own = self.own.get((row["seed"], row["concept"])) or self.own.get((0, row["concept"]))
        gain = row["base_loss"] - own["loss"] if own else 0.0
        return (row["base_loss"] - row["loss"]) / gain if gain > 0 else None


def study(plan: Plan, table: Table) -> Study:
    """Return the cells that belong to the plan as it is now."""
    rows = table.select({plan.digest(method) for method in plan.methods})
    rows = [row for row in rows if row["method"] in plan.methods and row["settings"] == plan.digest(row["method"])]
    matrices: dict[str, dict[Pair, Matrix]] = defaultdict(dict)
    for method in plan.methods:
        for order, seed in plan.runs(method):
            key = method, order, seed, 1.0
            mine = [row for row in rows if (row["method"], row["order"], row["seed"], row["weight"]) == key]
            if mine:
                cells = {(row["after"], row["concept"]): row for row in mine}
                matrices[method][order, seed] = Matrix(cells, plan.order(order)[: plan.length(method)])
    mine = [row for row in rows if row["method"] == "own_lora" and row["concept"] == row["learned"] and row["weight"] == 1.0]
    own = {(row["seed"], row["concept"]): row for row in mine}
    return Study(plan, rows, dict(matrices), own)


def judge(row: Row) -> float | None:
    """Return the judge's share of a cell, None where nothing was drawn."""
    return None if row["judge"] == "" else row["judge"]


def present(values: Iterable[float | None]) -> list[float]:
    """Return the values that were measured."""
    return [value for value in values if value is not None]


def final(matrix: Matrix, last: int, score: Callable[[Row], float | None]) -> float | None:
    """Return the mean of the last row."""
    values = present(matrix.value(last, name, score) for name in matrix.names[:last])
    return mean(values) if len(values) == last else None


def learned(matrix: Matrix, last: int, score: Callable[[Row], float | None]) -> float | None:
    """Return the mean of the diagonal."""
    values = present(matrix.value(place + 1, name, score) for place, name in enumerate(matrix.names[:last]))
    return mean(values) if len(values) == last else None


def forgetting(matrix: Matrix, last: int, score: Callable[[Row], float | None]) -> float | None:
    """Return how much of each concept's best score is gone after the last one."""
    lost = []
    for place, name in enumerate(matrix.names[: last - 1]):
        seen = present(matrix.value(after, name, score) for after in range(place + 1, last + 1))
        end = matrix.value(last, name, score)
        if end is None or len(seen) < 2:
            return None
        lost.append(max(seen) - end)
    return mean(lost) if lost else None


def steps_to(row: Row, own: Row | None, share: float = 0.95) -> float:
    """Return the first watched step with this share of the own LoRA's gain; infinity where there is none."""
    if own is None or not row["curve"] or not own["curve"]:
        return math.nan
    curve, target = curve_of(row), curve_of(own)
    wanted = curve[0] - share * (target[0] - target[max(target)])
    return min((step for step, loss in curve.items() if step and loss <= wanted), default=math.inf)


def lessons(study: Study, method: str, first: int = 2) -> list[Row]:
    """Return the cells of concepts just learned, from the `first` place on, up to the horizon."""
    found: list[Row | None] = []
    for matrix in study.complete(method).values():
        last = min(study.horizon, len(matrix.names))
        found += [matrix.rows.get((after, matrix.names[after - 1])) for after in range(first, last + 1)]
    return [row for row in found if row is not None and row["numbers"] != ""]


def facts(study: Study, method: str) -> dict[str, float | int | None]:
    """Return a method's line of the summary, means over its streams."""
    last, matrices = study.horizon, list(study.complete(method).values())

    def over(measure: Callable[[Matrix], float | None], digits: int = 4) -> float | None:
        values = present(measure(matrix) for matrix in matrices)
        return round(mean(values), digits) if values else None

    judged = list(relative_judge(study, method).values())
    ends = [matrix.rows[last, matrix.names[last - 1]] for matrix in matrices]
    taught = lessons(study, method)
    watched = [row for row in taught if row["curve"] and study.plan.methods[method]["kind"] != "merged"]  # else the LoRAs'
    steps = [steps_to(row, study.own.get((row["seed"], row["concept"]))) for row in watched]
    quick = median(steps) if steps and not any(math.isnan(step) for step in steps) else None
    return {
        "normalised": over(lambda matrix: final(matrix, last, study.rho)),
        "normalised_judge": round(mean(judged), 4) if judged else None,
        "forgetting": over(lambda matrix: forgetting(matrix, last, study.rho), 5),
        "forgetting_judge": over(lambda matrix: forgetting(matrix, last, judge)),
        "adherence": over(lambda matrix: final(matrix, last, adherence)),
        "bytes_per_concept": whole(2 * row["concept_numbers"] for row in taught),
        "bytes_total": whole(row["file_bytes"] for row in ends if row["file_bytes"] != ""),
        "trainable": whole(row["trainable"] for row in taught if row["trainable"] != ""),
        "steps_to_95": None if quick is None or math.isinf(quick) else int(quick),
    }


def relative_judge(study: Study, method: str) -> dict[Pair, float]:
    """Return the judge's share after the last concept over the own LoRAs' of the same seed, by (order, seed)."""
    own = {seed: final(matrix, study.horizon, judge) for (_, seed), matrix in study.complete("own_lora").items()}
    found = {}
    for (order, seed), matrix in study.complete(method).items():
        shown, reference = final(matrix, study.horizon, judge), own.get(seed)
        if shown is not None and reference:
            found[order, seed] = shown / reference
    return found


def distinct(study: Study, method: str) -> list[Pair]:
    """Return one (order, seed) for every outcome of a method: where bases never change, orders of a seed are one."""
    found: dict[tuple[int, tuple[float, ...]], Pair] = {}
    for (order, seed), matrix in sorted(study.complete(method).items()):
        losses = tuple(matrix.rows[study.horizon, name]["loss"] for name in sorted(matrix.names[: study.horizon]))
        found.setdefault((seed, losses), (order, seed))
    return list(found.values())


def adherence(row: Row) -> float | None:
    """Return the share of attributes that are as asked, None where nothing was drawn."""
    return None if row["adherence"] == "" else row["adherence"]


def whole(values: Iterable[float]) -> int | None:
    """Return the mean as a whole number, None of nothing."""
    found = list(values)
    return round(mean(found)) if found else None


def deviation(values: Sequence[float]) -> float | None:
    """Return the standard deviation, None of fewer than two."""
    return stdev(values) if len(values) > 1 else None


def interval(differences: Sequence[float], draws: int = 10_000) -> tuple[float, float]:
    """Return the bootstrap 95 % interval of a mean."""
    generator = random.Random(0)
    means = sorted(mean(generator.choices(differences, k=len(differences))) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws)]
