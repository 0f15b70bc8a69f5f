"""What is drawn with: a weighted sum of concepts, and how people write it.

    watercolor:0.8 + robot:-0.3        a name alone has weight 1; names with other characters go in double quotes

A blend is a linear combination of updates, which in the shared subspace is a linear combination of small cores: exact,
of constant rank and constant cost however many concepts it holds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

NAME = re.compile(r'\s*(?:"(?P<quoted>[^"]+)"|(?P<plain>[^\s:+"](?:[^:+"]*[^\s:+"])?))\s*')
WEIGHT = re.compile(r":\s*(?P<weight>[+-]?(?:[^\s+:]|(?<=[eE])\+(?=\d))*)\s*")
PLAIN = re.compile(r"[^\s:+\"-][^:+\"]*")


@dataclass(frozen=True)
class Blend:
    """Concepts and their weights (any finite real number), in the order written; a weight of 0 is exactly absent."""

    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        wrong = {name: weight for name, weight in self.weights.items() if not math.isfinite(weight)}
        if wrong:
            raise ValueError(f"blend weights must be finite numbers, got {wrong}")

    @classmethod
    def parse(cls, text: str) -> Blend:
        """Read `watercolor:0.8 + robot:0.5`; an empty text is the untouched base.

        Raises ValueError that points at the character where the text stops making sense.
        """
        weights: dict[str, float] = {}
        for start, name, weight in terms(text):
            if name in weights:
                raise ValueError(pointed(text, start, f"concept {name!r} is named twice; give it one weight"))
            weights[name] = weight
        return cls(weights)

    @classmethod
    def of(cls, blend: Blend | str | Mapping[str, float] | None) -> Blend:
        """Return a blend from any of the forms in which one is given; None is the untouched base."""
        if isinstance(blend, Blend):
            return blend
        return cls.parse(blend) if isinstance(blend, str) else cls(dict(blend or {}))

    def __str__(self) -> str:
        written = (name if PLAIN.fullmatch(name) and name == name.strip() else f'"{name}"' for name in self.weights)
        return " + ".join(
            f"{name}:{weight:g}" if float(f"{weight:g}") == weight else f"{name}:{weight!r}"
            for name, weight in zip(written, self.weights.values(), strict=True)
        )


def terms(text: str) -> Iterator[tuple[int, str, float]]:
    """Yield (position, name, weight) of every term of a blend."""
    position = 0
    while text.strip() and position <= len(text):
        match = NAME.match(text, position)
        if match is None:
            start = len(text) - len(text[position:].lstrip())
            raise ValueError(pointed(text, start, "expected a concept, as in 'watercolor:0.8 + robot:0.5'"))
        name, start, weight = (match["quoted"] or match["plain"]).strip(), match.start(match.lastgroup or 0), 1.0
        position = match.end()
        if found := WEIGHT.match(text, position):
            weight = number(text, found.start("weight"), found["weight"], name)
            position = found.end()
        if position < len(text) and text[position] != "+":
            raise ValueError(pointed(text, position, f"expected '+' between {name!r} and the next concept"))
        yield start, name, weight
        position += 1


def number(text: str, position: int, written: str, name: str) -> float:
    """Return a weight as a finite number."""
    try:
        weight = float(written)
    except ValueError:
        raise ValueError(pointed(text, position, f"weight {written!r} of {name!r} is not a number")) from None
    if not math.isfinite(weight):
        raise ValueError(pointed(text, position, f"weight {written!r} of {name!r} is not finite"))
    return weight


def pointed(text: str, position: int, problem: str) -> str:
    """Return a message with the text and a mark under the character it is about."""
    return f"blend: {problem}\n  {text}\n  {' ' * position}^"
