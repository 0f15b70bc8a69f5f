"""Forward transfer against the null: does a basis of learned columns teach a new concept better than a random one?

Both arms train coefficients alone, at equal p and equal k, on the same pictures and noise, in a basis that does not
change; they differ in where the columns come from. A difference is claimed only with its interval.
"""

from __future__ import annotations

import math
from statistics import mean

from stream.cells import Row
from stream.figures import normalised_curve
from stream.scores import Study, interval

ARMS = ("share_coefficients", "share_random")


def transfer(study: Study) -> str:
    """Return the paired comparison of learned and random columns over the concepts that follow the basis's own."""
    learned, null = (
        (newest(study, name) for name in ARMS if name in study.plan.methods)
        if set(ARMS) <= set(study.plan.methods)
        else ({}, {})
    )
    first = study.plan.methods.get(ARMS[0], {}).get("start", 0)
    shared = [key for key in learned if key in null and learned[key]["after"] > first]
    if len(shared) < 2:
        return ""
    steps = sorted(normalised_curve(study, learned[shared[0]]))[1:]
    lines = ["| after steps | learned columns | random columns | difference | 95 % interval |", "|---|---|---|---|---|"]
    for step in steps:
        pairs = [
            (normalised_curve(study, learned[key]).get(step, math.nan), normalised_curve(study, null[key]).get(step, math.nan))
            for key in shared
        ]
        gaps = [ours - theirs for ours, theirs in pairs]
        low, high = interval(gaps)
        lines.append(
            f"| {step} | {mean(pair[0] for pair in pairs):.3f} | {mean(pair[1] for pair in pairs):.3f} "
            f"| {mean(gaps):+.3f} | {low:+.3f} to {high:+.3f} |"
        )
    return (
        f"Coefficients alone in a frozen basis of equal width, {len(shared)} concepts that came after the basis, share of the "
        "own LoRA's gain (`share_coefficients` against `share_random`):\n\n" + "\n".join(lines)
    )


def newest(study: Study, method: str) -> dict[tuple[int, int, str], Row]:
    """Return a method's cells of concepts just learned that have a curve, by (order, seed, concept)."""
    found = {}
    for (order, seed), matrix in study.matrices.get(method, {}).items():
        for place, name in enumerate(matrix.names):
            row = matrix.rows.get((place + 1, name))
            if row is not None and row["curve"]:
                found[order, seed, name] = row
    return found
