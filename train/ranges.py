"""What the numbers of a script's settings may be: each rule in the words that its message says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

Rule = tuple[str, Callable[[Any], bool], tuple[str, ...]]  # what it is, whether it is that, the settings it is for

MOST = 10**9  # of whatever is counted; draws that look at a gradient are numbered from there
SEEDS = 2**63 - 1  # torch takes no larger seed
COUNT = f"1 to {MOST:,}"
WHOLE = f"0 to {MOST:,}"


def is_count(value: int) -> bool:
    """Tell whether a number is one of things that there must be."""
    return 1 <= value <= MOST


def out_of_range(settings: Any, rules: Sequence[Rule]) -> list[str]:
    """Return every number that no rule of its own allows, with its value and its limits; None is off and always allowed."""
    return [
        f"--{name} is {spelled(value)}; it is {words}"
        for words, allowed, names in rules
        for name in names
        if (value := getattr(settings, name)) is not None and not (is_finite(value) and allowed(value))
    ]


def is_finite(value: float) -> bool:
    """Tell whether a number is neither NaN nor infinite; whole numbers of any size are."""
    return isinstance(value, int) or math.isfinite(value)


def spelled(value: float) -> str:
    """Return a number as people write it."""
    return str(value) if isinstance(value, int) else f"{value:g}"
