"""One basis against a random one: does it teach a new concept better?

Both arms train coefficients alone, on the same pictures and noise, in bases that do not change. Columns learned from earlier
concepts, at equal k and p, are forward transfer; columns measured on the base know nothing of other concepts, and differ from
random ones also in how many each layer has. A difference is claimed only with its interval. A lesson counts once, not in
every order, and seeds of one concept are averaged first: they are alike, and the concepts are what is drawn again.
"""

from __future__ import annotations

from collections import defaultdict
from statistics import mean

from stream.cells import Row
from stream.figures import normalised_curve
from stream.scores import Study, interval

COMPARISONS = (
    ("share_coefficients", "share_random", "columns learned from three LoRAs", "as many random ones"),
    ("share_coefficients", "columns_24", "columns learned from three LoRAs", "about as many measured on the base"),
    ("rate_1", "share_seed", "columns measured on the base", "random ones"),  # at equal rate
)
Pairs = list[tuple[str, dict[int, float], dict[int, float]]]  # a concept and the normalised curves of both arms


def pairs(study: Study, ours: str, null: str) -> Pairs:
    """Return the curves of both arms for every (seed, concept) that both learned after the basis was there."""
    if not {ours, null} <= set(study.plan.methods):
        return []
    first = study.plan.methods[ours].get("start", 0)
    arms = [newest(study, name) for name in (ours, null)]
    shared = sorted(key for key in arms[0] if key in arms[1] and arms[0][key]["after"] > first)
    both = [(key[1], *(normalised_curve(study, arm[key]) for arm in arms)) for key in shared]
    return [(name, one, other) for name, one, other in both if one and other]


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
    """Return the mean difference of the arms after so many steps, and its 95 % interval; None of fewer than two concepts."""
    gaps: dict[str, list[float]] = defaultdict(list)
    for name, ours, theirs in both:
        if step in ours and step in theirs:
            gaps[name].append(ours[step] - theirs[step])
    means = [mean(some) for some in gaps.values()]
    return (mean(means), *interval(means)) if len(means) > 1 else None


def transfer(study: Study) -> str:
    """Return the paired comparisons as tables."""
    out = []
    for ours, null, what, against in COMPARISONS:
        both = pairs(study, ours, null)
        if len(both) < 2:
            continue
        seeds = len({seed for seed, _ in newest(study, ours)} & {seed for seed, _ in newest(study, null)})
        lines = [f"| after steps | `{ours}` | `{null}` | difference | 95 % interval |", "|---|---|---|---|---|"]
        for step in sorted(set.intersection(*(set(ours) & set(theirs) for _, ours, theirs in both)))[1:]:
            found = gain(both, step)
            if found:
                means = [mean(pair[arm][step] for pair in both) for arm in (1, 2)]
                lines.append(
                    f"| {step} | {means[0]:.3f} | {means[1]:.3f} | {found[0]:+.3f} | {found[1]:+.3f} to {found[2]:+.3f} |"
                )
        concepts = len({name for name, *_ in both})
        out.append(
            f"Coefficients alone in {what} against {against}: {concepts} concepts, {seeds} seed(s), share of the own "
            "LoRA's gain; the interval draws concepts:\n\n" + "\n".join(lines)
        )
    return "\n\n".join(out)
