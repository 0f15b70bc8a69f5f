"""How loud a concept is: at which weight it has half of its effect on its own pictures.

    gain(w) = (L(0) - L(w)) / (L(0) - L(1)),    half weight = a w with gain(w) = 1/2

L(w) is the denoising loss on the concept's training pictures, at fixed times and noise, with the concept at weight w. A
style that repaints everything has half of its effect at a weight of .2, a shy one at .4; in one picture the first drowns
the second. The norm of an update tells nothing of this. Blends use the half weight as `loss-equalised`, by default half of
the way (strength .5): made wholly equal, a loud style is often too weak to be recognised. `tests/benchmarks/blending.py`
compares both with the plain sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from share_diffusion.concept import Concept

HALVINGS = 4
LOUDER = 1.4  # from this ratio on, one concept is likely to drown another


def half_weight(loss: Callable[[float], float], without: float, whole: float) -> float | None:
    """Return the weight at which half of the gain is reached, None where there is no gain.

    `loss` gives the loss at a weight, `without` and `whole` are those at 0 and 1. Four halvings of the interval, then
    linearly within the last one.
    """
    if not whole < without:
        return None
    middle = (without + whole) / 2
    low, high, above, below = 0.0, 1.0, without, whole
    for _ in range(HALVINGS):
        weight = (low + high) / 2
        value = loss(weight)
        if value > middle:
            low, above = weight, value
        else:
            high, below = weight, value
    return round(low + (high - low) * (above - middle) / (above - below), 4)


def evened(concepts: Iterable[Concept], strength: float = 0.5) -> dict[str, float]:
    """Return the factor of each concept's weight that makes all equally loud: (half weight / the largest) ** strength.

    The quietest concept keeps its weight, and so does one alone. Raises ValueError for concepts that were never measured,
    naming all of them.
    """
    held = {concept.name: concept.half_weight for concept in concepts}
    if len(held) == 1:
        return dict.fromkeys(held, 1.0)
    if silent := sorted(name for name, half in held.items() if half is None):
        raise ValueError(
            f"it is not known how loud {', '.join(silent)} is: that is measured when a concept is learned; "
            "write 'norm-equalised', which needs no measurement, or weights of your own"
        )
    known = {name: half for name, half in held.items() if half is not None}
    largest = max(known.values(), default=1.0)
    return {name: (half / largest) ** strength for name, half in known.items()}


def loudest(concepts: Iterable[Concept]) -> tuple[str, str, float] | None:
    """Return (the loudest, the quietest, how many times as loud) of measured concepts where that is worth telling."""
    known = sorted((concept.half_weight, concept.name) for concept in concepts if concept.half_weight is not None)
    if len(known) < 2 or known[-1][0] < LOUDER * known[0][0]:
        return None
    return known[0][1], known[-1][1], known[-1][0] / known[0][0]
