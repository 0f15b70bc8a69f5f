"""What a mean score is made of: styles and subjects apart, all gains together, and the headline's interval over concepts.

A style's own LoRA gains several times the loss that a subject's does, so that in a mean of normalised scores, where every
concept counts alike, one that is spoiled for subjects stands far below zero however well it does on styles. Pooled, the
losses are summed before they are divided, and every concept counts by what there is to gain:

    pooled = sum_j (L_base,j - L_j) / sum_j (L_base,j - L_own,j)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from statistics import mean

from stream.cells import Row
from stream.plan import kind_of
from stream.scores import Matrix, Study, distinct, interval, judge, learned, present

KINDS = ("style", "subject")
REFERENCES = ("own_lora", "own_lora_decay")


def breakdown(study: Study, methods: Iterable[str]) -> str:
    """Return what every method's score is made of, means over its streams, as a table."""
    kinds = {name: kind_of(name) for name in study.plan.concepts}
    if not set(KINDS) <= set(kinds.values()):
        return ""
    counts = [sum(kind == wanted for kind in kinds.values()) for wanted in KINDS]
    head = f"| method | when learned | after the last | styles ({counts[0]}) | subjects ({counts[1]}) | pooled |"
    lines = [head, "|---|" + "---|" * 5]
    for name in methods:
        matrices, last = list(study.complete(name).values()), study.horizon
        ends = [[matrix.rows[last, concept] for concept in matrix.names[:last]] for matrix in matrices]
        cells = [mean_of(learned(matrix, last, study.rho) for matrix in matrices)]
        for wanted in (None, *KINDS):
            rows = [row for end in ends for row in end if wanted in (None, kinds[row["concept"]])]
            cells.append(mean_of(study.rho(row) for row in rows))
        cells.append(mean_of(pooled(study, end) for end in ends))
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_of(values: Iterable[float | None]) -> str:
    """Return a mean as a cell, empty of nothing."""
    found = present(values)
    return f"{mean(found):.3f}" if found else ""


def pooled(study: Study, rows: list[Row]) -> float | None:
    """Return the gains of several concepts together, over those of their own LoRAs."""
    own = [study.own.get((row["seed"], row["concept"])) for row in rows]
    if not rows or not all(own):
        return None
    most = sum(row["base_loss"] - reference["loss"] for row, reference in zip(rows, own, strict=True) if reference)
    return sum(row["base_loss"] - row["loss"] for row in rows) / most if most > 0 else None


def headline(study: Study, ours: str = "share") -> str:
    """Return the differences of Share and own LoRAs in loss and pictures, with the interval that drawing concepts gives."""
    rows = []
    for reference in REFERENCES:
        loss, seeds = differences(study, ours, reference, study.rho)
        seen, _ = differences(study, ours, reference, judge)
        if len(loss) > 1:
            rows.append(f"| `{ours}` - `{reference}` | {seeds} | {told(loss)} | {told(seen) if len(seen) > 1 else ''} |")
    if not rows:
        return ""
    about = (
        "Seeds of a concept are averaged first; the interval draws concepts (bootstrap, 95 %). Loss in shares of the own "
        "LoRA's gain, pictures in shares of those drawn:"
    )
    return "\n".join([about, "", "| | seeds | loss | pictures |", "|---|---|---|---|", *rows])


def differences(study: Study, ours: str, reference: str, score: Callable[[Row], float | None]) -> tuple[list[float], int]:
    """Return the difference after the last concept, one number a concept, and over how many seeds."""
    if not {ours, reference} <= set(study.plan.methods):
        return [], 0
    arms = [by_seed(study, name) for name in (ours, reference)]
    seeds = sorted(set(arms[0]) & set(arms[1]))
    gaps: dict[str, list[float]] = defaultdict(list)
    for seed in seeds:
        for name in arms[0][seed].names[: study.horizon]:
            both = present(arm[seed].value(study.horizon, name, score) for arm in arms)
            if len(both) == 2:
                gaps[name].append(both[0] - both[1])
    return [mean(some) for some in gaps.values()], len(seeds)


def by_seed(study: Study, method: str) -> dict[int, Matrix]:
    """Return one stream of every seed, of its first order."""
    found: dict[int, Matrix] = {}
    for order, seed in distinct(study, method):
        found.setdefault(seed, study.complete(method)[order, seed])
    return found


def told(differences: list[float]) -> str:
    """Return a mean difference with its interval."""
    low, high = interval(differences)
    return f"{mean(differences):+.3f} ({low:+.3f} to {high:+.3f})"
