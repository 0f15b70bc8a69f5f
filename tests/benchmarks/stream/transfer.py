"""Forward transfer against the null: does one basis teach a new concept better than a random one?

Both arms train coefficients alone, on the same pictures and noise, in bases that do not change; they differ in where the
columns come from. A difference is claimed only with its interval, over (seed, concept) pairs of one order each: what is
learned in a derived basis is the same in every order, and counting it three times would narrow the interval for nothing.
"""

from __future__ import annotations

import math
from statistics import mean

from stream.cells import Row
from stream.figures import normalised_curve
from stream.scores import Study, interval

COMPARISONS = (
    ("share_coefficients", "share_random", "columns learned from three LoRAs", "as many random ones"),
    ("share", "share_seed", "columns measured on the base", "random ones"),
)
Pairs = list[tuple[dict[int, float], dict[int, float]]]  # normalised curves of both arms


def pairs(study: Study, ours: str, null: str) -> Pairs:
    """Return the curves of both arms for every (seed, concept) that both learned after the basis was there."""
    if not {ours, null} <= set(study.plan.methods):
        return []
    first = study.plan.methods[ours].get("start", 0)
    arms = [newest(study, name) for name in (ours, null)]
    shared = sorted(key for key in arms[0] if key in arms[1] and arms[0][key]["after"] > first)
    both = [tuple(normalised_curve(study, arm[key]) for arm in arms) for key in shared]
    return [(one, other) for one, other in both if one and other]


def newest(study: Study, method: str) -> dict[tuple[int, str], Row]:
    """Return a method's cells of concepts just learned that have a curve, by (seed, concept), of its first order each."""
    found: dict[tuple[int, str], Row] = {}
    for (_, seed), matrix in sorted(study.matrices.get(method, {}).items()):
        for place, name in enumerate(matrix.names):
            row = matrix.rows.get((place + 1, name))
            if row is not None and row["curve"]:
                found.setdefault((seed, name), row)
    return found


def gain(both: Pairs, step: int) -> tuple[float, float, float] | None:
    """Return the mean difference of the arms after so many steps, and its 95 % interval; None of fewer than two pairs."""
    gaps = [ours.get(step, math.nan) - theirs.get(step, math.nan) for ours, theirs in both]
    known = [gap for gap in gaps if not math.isnan(gap)]
    return (mean(known), *interval(known)) if len(known) > 1 else None


def transfer(study: Study) -> str:
    """Return the paired comparisons as tables."""
    out = []
    for ours, null, what, against in COMPARISONS:
        both = pairs(study, ours, null)
        if len(both) < 2:
            continue
        seeds = len({seed for seed, _ in newest(study, ours)} & {seed for seed, _ in newest(study, null)})
        lines = [f"| after steps | `{ours}` | `{null}` | difference | 95 % interval |", "|---|---|---|---|---|"]
        for step in sorted(both[0][0])[1:]:
            found = gain(both, step)
            if found:
                means = [mean(pair[arm].get(step, math.nan) for pair in both) for arm in (0, 1)]
                lines.append(
                    f"| {step} | {means[0]:.3f} | {means[1]:.3f} | {found[0]:+.3f} | {found[1]:+.3f} to {found[2]:+.3f} |"
                )
        out.append(
            f"Coefficients alone in {what} against {against}: {len(both)} pairs of a concept and one of {seeds} seed(s), share "
            "of the own LoRA's gain:\n\n" + "\n".join(lines)
        )
    return "\n\n".join(out)
