"""What is drawn with: a weighted sum of concepts, each where and when it is wanted.

    watercolor:0.8 + robot:-0.3[blocks=down,mid][steps=0.2..1][region=left] | ties density=0.5

A blend is a linear combination of updates, which in the shared subspace is a linear combination of small cores: exact,
of constant rank and constant cost however many concepts it holds. How it is written is told in `grammar.py`, which reads
it; what is printed here reads as the same blend, to the last bit.
"""

from __future__ import annotations

import itertools
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

GROUPS = ("all", "text", "down", "mid", "up", "early", "late")
PLAIN = re.compile(r"[^\s:+\"\[\]|<>-][^:+\"\[\]|<>]*")
WORD = re.compile(r"\w[\w-]*")
PLACES = {
    "left": (0.0, 0.0, 0.5, 1.0),
    "right": (0.5, 0.0, 1.0, 1.0),
    "top": (0.0, 0.0, 1.0, 0.5),
    "bottom": (0.0, 0.5, 1.0, 1.0),
}
METHODS: dict[str, dict[str, float]] = {  # name -> its options and their defaults
    "linear": {},
    "ties": {"density": 0.5},
    "dare": {"drop": 0.5, "seed": 0},
    "tsv": {},
    "norm-equalised": {},
    "loss-equalised": {"strength": 0.5},
}


@dataclass(frozen=True)
class Steps:
    """When a concept acts: from `start` to `end` of the denoising (0 to 1), faded in over `rise` and out over `fall`."""

    start: float = 0.0
    end: float = 1.0
    rise: float = 0.0
    fall: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(f"steps are {self.start:g}..{self.end:g}; they run from 0 to 1, the start before the end")
        if not (self.rise >= 0 and self.fall >= 0 and self.rise + self.fall <= (self.end - self.start) * (1 + 1e-9)):
            raise ValueError(f"ramp is {self.rise:g},{self.fall:g}; both are 0 or more and fit between start and end")

    def at(self, progress: float) -> float:
        """Return the factor of the weight at a point of the denoising; a step counts at its middle."""
        if not (self.start <= progress < self.end or progress == self.end == 1):
            return 0.0
        rising = (progress - self.start) / self.rise if self.rise else 1.0
        falling = (self.end - progress) / self.fall if self.fall else 1.0
        return min(1.0, rising, falling)

    @property
    def mean(self) -> float:
        """The factor's mean over the whole denoising."""
        return self.end - self.start - (self.rise + self.fall) / 2

    def integral(self, start: float, end: float) -> float:
        """The factor's integral over a part of the denoising: of straight pieces, each by its middle."""
        bends = (self.start, self.start + self.rise, self.end - self.fall, self.end)
        points = [start, *(bend for bend in sorted(bends) if start < bend < end), end]
        return sum((right - left) * self.at((left + right) / 2) for left, right in itertools.pairwise(points))

    def __str__(self) -> str:
        ramp = written(self.rise) if self.rise == self.fall else f"{written(self.rise)},{written(self.fall)}"
        return f"steps={written(self.start)}..{written(self.end)}" + (f" ramp={ramp}" if self.rise or self.fall else "")


@dataclass(frozen=True)
class Region:
    """Where a concept acts: a box (x0, y0, x1, y1) in fractions of the picture, or a mask by its name.

    `soft` is the width of the edge as a fraction of the picture; from `start` to `end` of the denoising the region holds,
    before and after it the concept acts everywhere.
    """

    box: tuple[float, float, float, float] | None = None
    mask: str | None = None
    soft: float = 0.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if (self.box is None) == (self.mask is None):
            raise ValueError("a region is either a box or a mask")
        if self.box is not None:
            left, top, right, bottom = self.box
            if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
                raise ValueError(
                    f"region is {','.join(map(written, self.box))}; a box is left,top,right,bottom, each 0 to 1, in that order"
                )
        if self.mask is not None and not WORD.fullmatch(self.mask):
            raise ValueError(f"mask name {self.mask!r} is letters, digits, '_' and '-'")
        if not 0 <= self.soft <= 1:
            raise ValueError(f"soft is {self.soft:g}; it is 0 to 1, a fraction of the picture")
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(f"during is {self.start:g}..{self.end:g}; it runs from 0 to 1, the start before the end")

    def __str__(self) -> str:
        named = next((name for name, box in PLACES.items() if box == self.box), None)
        place = f"@{self.mask}" if self.mask else named or ",".join(map(written, self.box or ()))
        soft = f" soft={written(self.soft)}" if self.soft else ""
        during = f" during={written(self.start)}..{written(self.end)}" if (self.start, self.end) != (0, 1) else ""
        return f"region={place}{soft}{during}"


@dataclass(frozen=True)
class Term:
    """One concept in a blend: its weight, the factor of each block group it acts in, when and where it acts (None: always)."""

    name: str
    weight: float = 1.0
    blocks: tuple[tuple[str, float], ...] | None = None
    steps: Steps | None = None
    region: Region | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", unicodedata.normalize("NFC", self.name))
        if not self.name.strip() or self.name != self.name.strip() or '"' in self.name:
            raise ValueError(f"concept name {self.name!r} is empty, has spaces at an end or holds a double quote")
        for group, factor in self.blocks or ():
            if not is_group(group) or not math.isfinite(factor):
                raise ValueError(f"blocks: {group}:{factor} is not a block group and a finite factor")
        groups = [group for group, _ in self.blocks or ()]
        if self.blocks is not None and (not groups or len(set(groups)) < len(groups)):
            raise ValueError("blocks name at least one block group, and each of them once")

    @property
    def options(self) -> tuple[object, ...]:
        """What tells this term from another one of the same concept."""
        return self.blocks, self.steps, self.region

    def factor(self, groups: Iterable[str]) -> float:
        """Return the factor for a layer that is in these block groups, from the widest to the narrowest."""
        if self.blocks is None:
            return 1.0
        factors = dict(self.blocks)
        return next((factors[group] for group in reversed(list(groups)) if group in factors), 0.0)

    def __str__(self) -> str:
        name = self.name if PLAIN.fullmatch(self.name) else f'"{self.name}"'
        parts = (f"{group}:{written(factor)}" if factor != 1 else group for group, factor in self.blocks or ())
        options = ["blocks=" + ",".join(parts)] if self.blocks else []
        options += [str(option) for option in (self.steps, self.region) if option is not None]
        return f"{name}:{written(self.weight)}" + "".join(f"[{option}]" for option in options)


@dataclass(frozen=True)
class Method:
    """How the cores of a blend become one: a name of `METHODS` and a value for each of its options."""

    name: str
    options: tuple[tuple[str, float], ...] = ()

    LIMITS: ClassVar[Mapping[str, tuple[float, float]]] = {
        "density": (0.01, 1),
        "drop": (0, 0.99),
        "seed": (0, 2**31 - 1),
        "strength": (0, 1),
    }

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise ValueError(f"method is {self.name!r}; it is one of {', '.join(METHODS)}")
        given, known = dict(self.options), METHODS[self.name]
        if wrong := [key for key in given if key not in known]:
            raise ValueError(f"{self.name} knows no {', '.join(wrong)}; its options: {', '.join(known) or 'none'}")
        for key, value in given.items():
            low, high = self.LIMITS[key]
            if not low <= value <= high or (key == "seed" and value != int(value)):
                raise ValueError(f"{key} of {self.name} is {value:g}; it is {low:g} to {high:g}")
        object.__setattr__(self, "options", tuple((known | given).items()))

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{key}={written(value)}" for key, value in self.options)])


@dataclass(frozen=True, init=False)
class Blend:
    """Terms in the order written, and how they are merged (None: summed); a weight of 0 is exactly absent."""

    terms: tuple[Term, ...]
    method: Method | None = None

    def __init__(self, terms: Mapping[str, float] | Sequence[Term] = (), method: Method | None = None) -> None:
        made = tuple(Term(*item) for item in terms.items()) if isinstance(terms, Mapping) else tuple(terms)
        if wrong := {term.name: term.weight for term in made if not math.isfinite(term.weight)}:
            raise ValueError(f"blend weights must be finite numbers, got {wrong}")
        keys = [(term.name, term.options) for term in made]
        if twice := sorted({key[0] for key in keys if keys.count(key) > 1}):
            raise ValueError(
                f"{', '.join(map(repr, twice))} stands twice in the blend with the same options; give it one weight"
            )
        object.__setattr__(self, "terms", made)
        object.__setattr__(self, "method", method if made and method and method.name != "linear" else None)

    @classmethod
    def parse(cls, text: str) -> Blend:
        """Read a written blend; an empty text is the untouched base.

        Raises ValueError that points at the character where the text stops making sense.
        """
        from share_diffusion.grammar import read_blend

        return read_blend(text)

    @classmethod
    def of(cls, blend: Blend | str | Mapping[str, float] | None) -> Blend:
        """Return a blend from any of the forms in which one is given; None is the untouched base."""
        if isinstance(blend, Blend):
            return blend
        if isinstance(blend, str):
            return cls.parse(blend)
        known = isinstance(blend, Mapping) and all(isinstance(weight, (int, float)) for weight in blend.values())
        if blend is not None and not known:
            raise ValueError(f"blend is {blend!r}; it is text as 'watercolor:0.8 + robot', or weights as {{'watercolor': 0.8}}")
        return cls(dict(blend or {}))

    @classmethod
    def between(cls, one: Blend, other: Blend, share: float) -> Blend:
        """Return (1 - share) * one + share * other, term by term; the method is that of the first that has one."""
        weights = {(term.name, term.options): [term, 0.0] for term in (*one.terms, *other.terms)}
        for blend, part in ((one, 1 - share), (other, share)):
            for term in blend.terms:
                weights[term.name, term.options][1] += part * term.weight
        return cls([replace(term, weight=weight) for term, weight in weights.values()], one.method or other.method)

    @property
    def weights(self) -> dict[str, float]:
        """Every concept's weight, its terms summed: all there is to a plain blend."""
        weights: dict[str, float] = {}
        for term in self.terms:
            weights[term.name] = weights[term.name] + term.weight if term.name in weights else term.weight
        return weights

    @property
    def plain(self) -> bool:
        """Whether `weights` says everything: no options, no method."""
        return self.method is None and all(term.options == (None, None, None) for term in self.terms)

    @property
    def names(self) -> list[str]:
        """The concepts, in order."""
        return list(self.weights)

    @property
    def masks(self) -> list[str]:
        """The names of the masks that the regions ask for."""
        return sorted({term.region.mask for term in self.terms if term.region and term.region.mask})

    def with_weight(self, name: str, weight: float) -> Blend:
        """Return the blend with a concept's weight set in all of its terms, or the concept added at the end."""
        name = unicodedata.normalize("NFC", name)
        terms = [replace(term, weight=weight) if term.name == name else term for term in self.terms]
        return Blend(terms if name in self.names else [*terms, Term(name, weight)], self.method)

    def without(self, name: str) -> Blend:
        """Return the blend without a concept."""
        name = unicodedata.normalize("NFC", name)
        return Blend([term for term in self.terms if term.name != name], self.method)

    def with_method(self, name: str | None, **options: float) -> Blend:
        """Return the blend merged in another way; None sums."""
        return Blend(self.terms, Method(name, tuple(options.items())) if name else None)

    def __str__(self) -> str:
        return " + ".join(map(str, self.terms)) + (f" | {self.method}" if self.method else "")


def is_group(text: str) -> bool:
    """Whether a text can name a block group: `down`, `down.1`, `text.2`."""
    name, dot, number = text.partition(".")
    return name in GROUPS and (not dot or (number.isascii() and number.isdigit()))


def written(value: float) -> str:
    """Return the shortest text that reads as the same number."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))
