"""What was to be reached, and what the paper claims, each beside what was measured here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from stream.scores import Study, present
from stream.transfer import COMPARISONS, gain, pairs
from stream.weights import Found

Lines = Mapping[str, Mapping[str, Any]]


def ratio(lines: Lines, above: str, below: str, key: str) -> float | None:
    """Return one method's value over another's."""
    first, second = lines.get(above, {}).get(key), lines.get(below, {}).get(key)
    return first / second if first and second else None


def targets(study: Study, lines: Lines, weights: Found | None = None, long: Mapping[str, Any] | None = None) -> str:
    """Return the targets of the full run, for the default and for every other mode of Share that was run."""
    out = []
    for name in [name for name in lines if study.plan.methods[name]["kind"] == "share"]:
        ours, own = lines[name], lines.get("own_lora", {})
        gap = None
        if ours["adherence"] is not None and own.get("adherence") is not None:
            gap = own["adherence"] - ours["adherence"]
        rows = [
            ("normalised score", ours["normalised"], ">=", 1.0),
            ("forgetting", ours["forgetting"], "<=", 0.002),
            ("judge, relative to own LoRAs", ours["normalised_judge"], ">=", 0.98),
            ("judge's forgetting", ours["forgetting_judge"], "<=", 0.01),
            ("adherence below the own LoRAs'", gap, "<=", 0.02),
            ("own LoRAs' bytes / whole file", ratio(lines, "own_lora", name, "bytes_total"), ">=", 10.0),
            ("a LoRA's bytes / a further concept's", ratio(lines, "own_lora", name, "bytes_per_concept"), ">=", 20.0),
            ("a LoRA's trainables / a concept's", ratio(lines, "own_lora", name, "trainable"), ">=", 10.0),
            ("steps to 95 % / the budget", part(steps_of(ours), study.plan.training.steps), "<=", 0.5),
            *(others(study, lines) if name == "share" else ()),
        ]
        if name == "share" and weights:
            rows.append(
                ("a merge's loss above the best joint fit's at the same k (4 to 32)", weights.beyond_the_bound, "<=", 0.02)
            )
            rows.append(("stated retention above what is held", weights.overstated, "<=", 1e-6))
        if name == "share" and long:
            rows.append((f"{long['concepts']} concepts: the first ten lose", long["first_ten_lose_at_most"], "<=", 0.01))
            rows.append((f"{long['concepts']} LoRAs' bytes / the file of {long['concepts']}", long["times_smaller"], ">=", 8.0))
        out.append("\n".join([f"### `{name}`", "", "| | measured | target | reached |", "|---|---|---|---|", *map(line, rows)]))
    return "\n\n".join(out)


SINGLE = ("sequential", "joint", "merged", "paper")  # kinds that store no adapter per concept


def others(study: Study, lines: Lines) -> list[tuple[str, float | None, str, float]]:
    """Return how far Share is ahead of the best method without an adapter per concept, and how many methods dominate it.

    A method dominates where it is no worse in loss and in pictures and takes no more bytes in all.
    """
    ours, kinds = lines["share"], {name: study.plan.methods[name]["kind"] for name in lines}
    single = present(lines[name]["normalised"] for name, kind in kinds.items() if kind in SINGLE)
    keys = ("normalised", "normalised_judge")
    comparable = [
        line for name, line in lines.items() if kinds[name] not in ("share", "base") and has(line, keys) and has(ours, keys)
    ]
    better = [
        line
        for line in comparable
        if all(line[key] >= ours[key] for key in keys) and line["bytes_total"] <= ours["bytes_total"]
    ]
    ahead = ours["normalised"] - max(single) if single and ours["normalised"] is not None else None
    return [
        ("ahead of the best without an adapter per concept", ahead, ">=", 0.0),
        ("methods that are no worse in loss and pictures and no larger", float(len(better)) if comparable else None, "<=", 0.0),
    ]


def has(line: Mapping[str, Any], keys: Sequence[str]) -> bool:
    """Return whether a method's line has these and its bytes."""
    return all(line[key] is not None for key in (*keys, "bytes_total"))


def steps_of(line: Mapping[str, Any]) -> float | None:
    """Return the steps to 95 % of a LoRA's gain: infinity where most concepts never get there, None of nothing learned."""
    return math.inf if line["steps_to_95"] is None and line["trainable"] else line["steps_to_95"]


def part(value: float | None, whole: float) -> float | None:
    """Return a share of a whole."""
    return None if value is None else value / whole


def line(row: tuple[str, float | None, str, float]) -> str:
    """Return one target as a line of a table."""
    name, found, sign, limit = row
    if found is None:
        return f"| {name} | not measured | {sign} {limit:g} | no |"
    holds = found >= limit if sign == ">=" else found <= limit
    told = "never" if math.isinf(found) else f"{found:.4g}"
    return f"| {name} | {told} | {sign} {limit:g} | {'yes' if holds else '**no**'} |"


def claims(study: Study, lines: Lines, weights: Found | None = None) -> str:
    """Return the paper's claims with a yes or no and the figure, for its own recipe and for Share here."""
    rows: list[tuple[str, str, str, str]] = []
    for name in ("paper", "paper_tuned", "share"):
        if name not in lines or "own_lora" not in lines:
            continue
        ours = lines[name]
        fewer = ratio(lines, "own_lora", name, "trainable")
        if fewer:
            rows.append(("fewer trainable parameters than a LoRA", name, yes(fewer > 1), f"{fewer:.1f} times"))
        alone = ratio(lines, "own_lora", name, "bytes_per_concept")
        if alone:
            rows.append(("less memory, basis not counted", name, yes(alone > 1), f"{alone:.1f} times"))
        counted = ratio(lines, "own_lora", name, "bytes_total")
        if counted:
            rows.append(
                (f"less memory, basis counted ({study.horizon} concepts)", name, yes(counted > 1), f"{counted:.2f} times")
            )
        if (lost := ours["forgetting"]) is not None:
            rows.append(("almost no forgetting (below .01)", name, yes(lost < 0.01), f"{lost:.4f}"))
        if (score := ours["normalised"]) is not None:
            rows.append(("performance of separate LoRAs (above .98)", name, yes(score > 0.98), f"{score:.3f}"))
        if (correlation := reconstruction(study, name)) is not None:
            claim = "the more of its norm a concept keeps, the more of its score (in place of Figure 4; r above .3)"
            rows.append((claim, name, yes(correlation > 0.3), f"r = {correlation:.2f}"))
        if (pictures := ours["normalised_judge"]) is not None:
            claim = "pictures as good as separate LoRAs' after the whole stream (Figure 3, above .98)"
            rows.append((claim, name, yes(pictures > 0.98), f"{pictures:.3f}"))
        if (steps := ours["steps_to_95"]) is not None and (alone := lines["own_lora"]["steps_to_95"]):
            claim = "quicker than a LoRA to 95 % of its gain"
            rows.append((claim, name, yes(steps < alone), f"{steps} steps, the LoRA {alone}"))
    for ours, null, what, against in COMPARISONS:
        found = gain(pairs(study, ours, null), study.plan.training.steps)
        if found:
            transferred = study.plan.methods[ours].get("start", 0)  # other columns know nothing of earlier concepts
            claim = f"{'forward transfer: ' if transferred else 'not the paper: '}{what} against {against}"
            rows.append((claim, ours, yes(found[1] > 0), f"{found[0]:+.3f}, 95 % {found[1]:+.3f} to {found[2]:+.3f}"))
    if weights and weights.tail is not None:
        claim = "a fit loses exactly its tail energy (Proposition 1, an identity)"
        rows.append((claim, "raw", yes(weights.tail < 1e-6), f"within {weights.tail:.0e} of it"))
    if weights and weights.overlaps:
        counts = sorted(weights.overlaps)
        half, sides = counts[len(counts) // 2 - 1], ("overlap alpha", "overlap beta")
        near = [weights.overlaps[half][side] for side in sides]
        claim = f"the subspace converges (Figures 1 and 5): overlap with the last above .9 after {half} of {counts[-1]}"
        rows.append((claim, "joint", yes(min(near) > 0.9), f"inputs {near[0]:.2f}, outputs {near[1]:.2f}"))
    body = [f"| {claim} | `{name}` | {verdict} | {figure} |" for claim, name, verdict, figure in rows]
    return "\n".join(["| claim | method | holds | figure |", "|---|---|---|---|", *body]) if body else ""


def yes(holds: bool) -> str:
    """Return yes or no."""
    return "yes" if holds else "no"


def reconstruction(study: Study, name: str) -> float | None:
    """Return the correlation over cells of kept norm and kept score, both relative to when the concept was learned."""
    points = []
    for matrix in study.matrices.get(name, {}).values():
        for place, concept in enumerate(matrix.names):
            first = matrix.rows.get((place + 1, concept))
            for after in range(place + 2, len(matrix.names) + 1):
                later = matrix.rows.get((after, concept))
                if first and later and first["norm"] and len(present([study.rho(first), study.rho(later)])) == 2:
                    points.append((later["norm"] / first["norm"], study.rho(later) - study.rho(first)))  # type: ignore[operator]
    if len(points) < 5:
        return None
    across, up = [point[0] for point in points], [point[1] for point in points]
    spread = [sum((value - mean(values)) ** 2 for value in values) ** 0.5 for values in (across, up)]
    if min(spread) < 1e-9:
        return None
    return sum((a - mean(across)) * (b - mean(up)) for a, b in points) / (spread[0] * spread[1])
