"""What a person asks to be drawn, checked in full before anything is computed.

Values arrive from a form, from a program or out of a picture's metadata: none of the three is trusted. `Wish.of` lists
every problem at once; `restored` keeps what is sound in a picture's settings and says what it left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from app.masks import read_mask
from share_diffusion.blend import Blend

MOST_WEIGHT = 10.0
MOST_TERMS = 64
MOST_SEED = 2**53 - 1  # the largest integer that a browser holds exactly


@dataclass(frozen=True)
class Limits:
    """What may be asked for: the base's own side in pixels decides the largest picture."""

    side: int
    samplers: tuple[str, ...]
    steps: int = 150
    guidance_scale: float = 30.0
    count: int = 16
    text: int = 10_000

    @property
    def most_side(self) -> int:
        """The largest side of a picture in pixels."""
        return 4 * self.side


@dataclass(frozen=True)
class Wish:
    """One drawing: `count` pictures at seeds `seed`, `seed + 1`, ...; `blend` as people write it."""

    prompt: str = ""
    blend: str = ""
    negative_prompt: str = ""
    seed: int = 0
    count: int = 1
    steps: int = 25
    guidance_scale: float = 3.0
    sampler: str = "DDIM"
    width: int = 64
    height: int = 64
    masks: Mapping[str, str] = field(default_factory=dict)  # painted regions by name, each a small picture (see masks.py)

    @classmethod
    def of(cls, values: Mapping[str, Any], limits: Limits, known: Sequence[str] | None = None) -> Wish:
        """Return the wish that the values make, or raise ValueError with everything that is wrong with them."""
        clean, problems = checked(values, limits)
        blend, wrong = checked_blend(str(clean.get("blend", "")), known, tuple(clean.get("masks", ())))
        if problems + wrong:
            raise ValueError("; ".join(problems + wrong))
        return cls(**{**clean, "blend": blend})

    def changed(self, **values: Any) -> Wish:
        """Return the wish with some values replaced."""
        return replace(self, **values)

    def each(self) -> list[Wish]:
        """Return one wish for every picture of this one."""
        return [self.changed(seed=self.seed + index, count=1) for index in range(self.count)]

    @property
    def values(self) -> dict[str, Any]:
        """The wish as plain values, by field."""
        return asdict(self)


FIELDS = tuple(entry.name for entry in fields(Wish))
TEXTS = ("prompt", "negative_prompt", "blend")


def checked(values: Mapping[str, Any], limits: Limits) -> tuple[dict[str, Any], list[str]]:
    """Return the sound values and a list of what is wrong with the others."""
    clean: dict[str, Any] = {}
    problems: list[str] = []
    for name in FIELDS:
        if name not in values or values[name] is None:
            continue
        try:
            clean[name] = checked_value(name, values[name], limits)
        except ValueError as error:
            problems.append(str(error))
    return clean, problems


def checked_value(name: str, value: Any, limits: Limits) -> Any:
    """Return one value in its type and range, or raise ValueError that tells the range."""
    if name in TEXTS:
        return checked_text(name, value, limits)
    if name == "masks":
        return checked_masks(value)
    if name == "sampler":
        if value not in limits.samplers:
            raise ValueError(f"sampler is {str(value)[:40]!r}; it is one of {', '.join(limits.samplers)}")
        return value
    if name == "guidance_scale":
        return number(name, value, 0.0, limits.guidance_scale)
    ranges = {
        "seed": (0, MOST_SEED),
        "count": (1, limits.count),
        "steps": (1, limits.steps),
        "width": (16, limits.most_side),
        "height": (16, limits.most_side),
    }
    least, most = ranges[name]
    side = name in ("width", "height")
    whole = number(name, value, least, most, "a multiple of 16 from " if side else "")
    if whole != int(whole):
        raise ValueError(f"{name} is {value}; it is a whole number")
    if side and int(whole) % 16:
        raise ValueError(f"{name} is {int(whole)}; it is a multiple of 16 from {least:g} to {most:,.0f}")
    return int(whole)


def checked_text(name: str, value: Any, limits: Limits) -> str:
    """Return a text that can be read and written, or raise ValueError."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {type(value).__name__}; it is text")
    if len(value) > limits.text:
        raise ValueError(f"{name} has {len(value):,} characters; at most {limits.text:,} are read")
    if "\0" in value:
        raise ValueError(f"{name} holds a NUL character; take it out")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half a character at place {error.start + 1}; take it out") from None
    return value


def number(name: str, value: Any, least: float, most: float, note: str = "") -> float:
    """Return a finite number in its range, or raise ValueError; `note` says what else it is."""
    try:
        found = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found) or not least <= found <= most:
        raise ValueError(f"{name} is {str(value)[:40]}; it is {note}{least:g} to {most:,.0f}")
    return found


def checked_blend(text: str, known: Sequence[str] | None, masks: Sequence[str] = ()) -> tuple[str, list[str]]:
    """Return a blend as it is written, and what is wrong with it."""
    try:
        blend = Blend.parse(text)
    except ValueError as error:
        return "", [str(error)]
    problems = [
        f"weight {term.weight:g} of {term.name!r} is beyond {MOST_WEIGHT:g} in size"
        for term in blend.terms
        if abs(term.weight) > MOST_WEIGHT
    ]
    if len(blend.terms) > MOST_TERMS:
        problems.append(f"the blend has {len(blend.terms)} terms; at most {MOST_TERMS} are drawn")
    if absent := [name for name in blend.masks if name not in masks]:
        problems.append(f"region @{absent[0]} has not been painted; paint it under Regions, or give a box")
    if known is not None and (unknown := [name for name in blend.weights if name not in set(known)]):
        problems.append(f"unknown concept {', '.join(map(repr, unknown))}; this subspace holds {some(known)}")
    return str(blend), problems


def checked_masks(value: Any) -> dict[str, str]:
    """Return painted regions by name, or raise ValueError where one is not a small picture."""
    if not isinstance(value, Mapping) or len(value) > MOST_TERMS:
        raise ValueError("masks are a few pictures by name")
    for name, picture in value.items():
        if not isinstance(name, str) or not isinstance(picture, str):
            raise ValueError("masks are a few pictures by name")
        read_mask(picture)
    return dict(value)


def some(names: Sequence[str]) -> str:
    """Return names for a message, the first few of many."""
    return (", ".join(names[:12]) + (f" and {len(names) - 12:,} more" if len(names) > 12 else "")) or "no concept yet"


def restored(
    settings: Mapping[str, Any], now: Wish, limits: Limits, known: Sequence[str], base: str = ""
) -> tuple[Wish, list[str]]:
    """Return the wish that a picture's settings describe, and notes on what could not be taken over.

    A picture that names no sampler was drawn with the base's own. `base` is the one that is loaded here.
    """
    clean, notes = checked(settings, limits)
    if "steps" in settings and "sampler" not in settings:
        clean["sampler"] = limits.samplers[0]
    drawn_with = settings.get("base")
    if base and isinstance(drawn_with, str) and drawn_with and drawn_with != base:
        notes.append(f"it was drawn with the base {drawn_with[:60]!r}, not {base!r}: the picture will be another one")
    written = str(clean.pop("blend", ""))
    try:
        blend = Blend.parse(written)
    except ValueError:
        blend, notes = Blend(), [*notes, "its blend cannot be read"]
    held, masks = set(known), set(clean.get("masks", ()))
    if absent := [name for name in blend.names if name not in held]:
        notes.append(f"not in this subspace, left out: {some(absent)}")
    if unpainted := [name for name in blend.masks if name not in masks]:
        notes.append(f"regions that were not kept, left out: {some(unpainted)}")
    terms = [term for term in blend.terms if term.name in held and not (term.region and term.region.mask in unpainted)]
    clean["blend"] = str(Blend(terms, blend.method))
    return replace(now, **{**clean, "count": 1}), notes
