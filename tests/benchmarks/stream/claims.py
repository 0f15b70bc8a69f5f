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


Claim = tuple[str, str, bool, str]  # what is claimed, of what, whether it holds, the figure
Target = tuple[str, float | None, str, float]  # what it is, what was measured, the sign, the limit


def targets(study: Study, lines: Lines, weights: Found | None = None, long: Mapping[str, Any] | None = None) -> str:
    """Return the targets of the full run: of the default one a line, of Share's other ways a line a way."""
    ways = [name for name in lines if study.plan.methods[name]["kind"] == "share"]
    out = []
    if "share" in ways:
        rows = [*each(study, lines, "share"), *others(study, lines), *of_the_file(weights, long)]
        head = ["### `share`", "", "| | measured | target | reached |", "|---|---|---|---|"]
        out.append("\n".join([*head, *map(line, rows)]))
    if more := [name for name in ways if name != "share"]:
        asked = [f"{name} ({sign} {limit:g})" for name, _, sign, limit in each(study, lines, more[0])]
        head = ["### Share's other ways", "", "In bold what misses the target; empty was not measured.", ""]
        head += [f"| | {' | '.join(asked)} |", "|---|" + "---|" * len(asked)]
        out.append("\n".join([*head, *(f"| `{name}` | {' | '.join(map(cell, each(study, lines, name)))} |" for name in more)]))
    return "\n\n".join(out)


def each(study: Study, lines: Lines, name: str) -> list[Target]:
    """Return the targets that any way of Share is held against."""
    ours, own = lines[name], lines.get("own_lora", {})
    gap = None
    if ours["adherence"] is not None and own.get("adherence") is not None:
        gap = own["adherence"] - ours["adherence"]
    return [
        ("normalised score", ours["normalised"], ">=", 1.0),
        ("forgetting", ours["forgetting"], "<=", 0.002),
        ("judge, relative to own LoRAs", ours["normalised_judge"], ">=", 0.98),
        ("judge's forgetting", ours["forgetting_judge"], "<=", 0.01),
        ("adherence below the own LoRAs'", gap, "<=", 0.02),
        ("own LoRAs' bytes / whole file", ratio(lines, "own_lora", name, "bytes_total"), ">=", 10.0),
        ("a LoRA's bytes / a further concept's", ratio(lines, "own_lora", name, "bytes_per_concept"), ">=", 20.0),
        ("a LoRA's trainables / a concept's", ratio(lines, "own_lora", name, "trainable"), ">=", 10.0),
        ("steps to 95 % / the budget", part(steps_of(ours), study.plan.training.steps), "<=", 0.5),
    ]


def of_the_file(weights: Found | None, long: Mapping[str, Any] | None) -> list[Target]:
    """Return the targets of merging and of the long stream, where those were measured."""
    rows: list[Target] = []
    if weights:
        loss = "a merge's loss above the best joint fit's at the same k (4 to 32)"
        rows.append((loss, weights.beyond_the_bound, "<=", 0.02))
        rows.append(("stated retention above what is held", weights.overstated, "<=", 1e-6))
    if long:
        many = long["concepts"]
        rows.append((f"{many} concepts: the first ten lose", long["first_ten_lose_at_most"], "<=", 0.01))
        rows.append((f"{many} LoRAs' bytes / the file of {many}", long["times_smaller"], ">=", 8.0))
    return rows


SINGLE = ("sequential", "joint", "merged", "paper")  # kinds that store no adapter per concept


def others(study: Study, lines: Lines) -> list[Target]:
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


def line(row: Target) -> str:
    """Return one target as a line of a table."""
    name, found, sign, limit = row
    verdict = "no" if found is None else "yes" if holds(row) else "**no**"
    return f"| {name} | {cell(row).strip('*') or 'not measured'} | {sign} {limit:g} | {verdict} |"


def cell(row: Target) -> str:
    """Return what was measured of a target, bold where it was missed, empty where it was not measured."""
    found = row[1]
    if found is None:
        return ""
    told = "never" if math.isinf(found) else f"{found:.4g}"
    return told if holds(row) else f"**{told}**"


def holds(row: Target) -> bool:
    """Return whether a target was measured and is reached."""
    _, found, sign, limit = row
    return found is not None and (found >= limit if sign == ">=" else found <= limit)


RECIPES = {"paper": "the paper's recipe", "paper_tuned": "at its best rate", "share": "Share here"}


def claims(study: Study, lines: Lines, weights: Found | None = None) -> str:
    """Return the paper's claims with a yes or no and the figure, for its own recipe and for Share here."""
    told = {name: of_recipe(study, lines, name) for name in RECIPES if name in lines and "own_lora" in lines}
    tables = []
    if told:
        head = ["| claim | " + " | ".join(f"{RECIPES[name]}, `{name}`" for name in told) + " |", "|---|" + "---|" * len(told)]
        every = dict.fromkeys(claim for found in told.values() for claim in found)
        rows = [f"| {claim} | {' | '.join(found.get(claim, '') for found in told.values())} |" for claim in every]
        tables.append("\n".join([*head, *rows]))
    if more := [*of_transfer(study), *of_weights(weights)]:
        head = ["| claim | of | holds | figure |", "|---|---|---|---|"]
        tables.append(
            "\n".join([*head, *(f"| {claim} | `{name}` | {yes(found)} | {figure} |" for claim, name, found, figure in more)])
        )
    return "\n\n".join(tables)


def of_recipe(study: Study, lines: Lines, name: str) -> dict[str, str]:
    """Return the claims about a recipe, each with yes or no and the figure; what was not measured is left out."""
    ours, own = lines[name], lines["own_lora"]
    fewer, alone, counted = (ratio(lines, "own_lora", name, key) for key in ("trainable", "bytes_per_concept", "bytes_total"))
    kept = reconstruction(study, name)
    rows = [
        ("fewer trainable parameters than a LoRA", fewer, lambda found: found > 1, "{:.1f} times"),
        ("less memory, basis not counted", alone, lambda found: found > 1, "{:.1f} times"),
        (f"less memory, basis counted ({study.horizon} concepts)", counted, lambda found: found > 1, "{:.2f} times"),
        ("almost no forgetting (below .01)", ours["forgetting"], lambda found: found < 0.01, "{:.4f}"),
        ("performance of separate LoRAs (above .98)", ours["normalised"], lambda found: found > 0.98, "{:.3f}"),
        (
            "the more of its norm a concept keeps, the more of its score (in place of Figure 4; r above .3)",
            kept,
            lambda found: found > 0.3,
            "r = {:.2f}",
        ),
        (
            "pictures as good as separate LoRAs' after the whole stream (Figure 3, above .98)",
            ours["normalised_judge"],
            lambda found: found > 0.98,
            "{:.3f}",
        ),
    ]
    told = {claim: f"{yes(holds(found))}, {figure.format(found)}" for claim, found, holds, figure in rows if found is not None}
    if (steps := steps_of(ours)) is not None and (theirs := own["steps_to_95"]):
        figure = f"{'never' if math.isinf(steps) else f'{steps} steps'}, the LoRA {theirs}"
        told["quicker than a LoRA to 95 % of its gain"] = f"{yes(steps < theirs)}, {figure}"
    return told


def of_transfer(study: Study) -> list[Claim]:
    """Return what columns learned from earlier concepts are worth to later ones, against each null."""
    rows: list[Claim] = []
    for ours, null, what, against in COMPARISONS:
        if found := gain(pairs(study, ours, null), study.plan.training.steps):
            transferred = study.plan.methods[ours].get("start", 0)  # other columns know nothing of earlier concepts
            claim = f"{'forward transfer: ' if transferred else 'not the paper: '}{what} against {against}"
            rows.append((claim, ours, found[1] > 0, f"{found[0]:+.3f}, 95 % {found[1]:+.3f} to {found[2]:+.3f}"))
    return rows


def of_weights(weights: Found | None) -> list[Claim]:
    """Return what the paper says of subspaces alone, as far as it was measured."""
    rows: list[Claim] = []
    if weights and weights.tail is not None:
        claim = "a fit loses exactly its tail energy (Proposition 1, an identity)"
        rows.append((claim, "raw", weights.tail < 1e-6, f"within {weights.tail:.0e} of it"))
    if weights and weights.overlaps:
        counts = sorted(weights.overlaps)
        half, sides = counts[len(counts) // 2 - 1], ("overlap alpha", "overlap beta")
        near = [weights.overlaps[half][side] for side in sides]
        claim = f"the subspace converges (Figures 1 and 5): overlap with the last above .9 after {half} of {counts[-1]}"
        rows.append((claim, "joint", min(near) > 0.9, f"inputs {near[0]:.2f}, outputs {near[1]:.2f}"))
    return rows


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
