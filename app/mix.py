"""The blend as rows of sliders and as written text, kept in step both ways.

A row is one term of the blend, so that a concept which acts differently in two regions has two sliders; its options are
shown beside it and stay as they are when the slider moves.

The page answers late when the machine is busy, so text and sliders may both have changed since they last agreed. The
mixer's value therefore says which text its rows are `of`: a slider counts as moved where it differs from that text, and a
moved slider is put into the text as it stands now, whatever else was typed. Its `clock` counts the moves; it travels to the
server and back, so that the page knows which moves an answer has not seen yet and keeps them (see js/mixer.js).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from share_diffusion.blend import Blend, Method, Term
from share_diffusion.grammar import read_prompt

Mixer = dict[str, Any]
EVEN = "loss-equalised"


def identified(blend: Blend) -> list[tuple[str, Term]]:
    """Return the terms, each with an id that other terms coming and going do not change: which one of its name it is."""
    seen: Counter[str] = Counter()
    pairs = []
    for term in blend.terms:
        pairs.append((f"{seen[term.name]} {term.name}", term))
        seen[term.name] += 1
    return pairs


def mixer_of(written: str, seen: Any = None) -> Mixer:
    """Return the mixer's value {"of", "rows", "clock"} for a written blend.

    `seen` is the mixer's value as the page sent it: sliders that it had moved stay where they are, and its clock is given back.
    Raises ValueError where the blend cannot be read.
    """
    rows, moved = [], moves(seen)
    for key, term in identified(Blend.parse(written)):
        options = "  ".join(
            [*(["blocks=" + ",".join(f"{group}:{factor:g}" for group, factor in term.blocks)] if term.blocks else [])]
            + [str(option) for option in (term.steps, term.region) if option is not None]
        )
        weight = moved.get(key, round(term.weight, 4))
        rows.append({"id": key, "name": term.name, "weight": weight, "note": options})
    clock = seen.get("clock") if isinstance(seen, dict) else None
    return {"of": written, "rows": rows, **({"clock": clock} if isinstance(clock, int) else {})}


def moves(seen: Any) -> dict[str, float]:
    """Return the weights of the sliders that were moved since the mixer's text, by id."""
    try:
        before = {key: round(term.weight, 4) for key, term in identified(Blend.parse(str(seen["of"])))}
        rows = {row["id"]: row["weight"] for row in seen["rows"]}
    except (KeyError, TypeError, ValueError):
        return {}
    return {key: float(weight) for key, weight in rows.items() if key in before and is_moved(weight, before[key])}


def is_moved(weight: Any, before: float) -> bool:
    """Whether a slider stands at a sound weight other than before."""
    sound = isinstance(weight, (int, float)) and not isinstance(weight, bool) and math.isfinite(weight)
    return sound and weight != before


def newest(written: str, seen: Any) -> str:
    """Return the blend that a person sees: the text as it stands, with the sliders that moved since the two agreed."""
    moved = moves(seen)
    try:
        pairs = identified(blend := Blend.parse(written)) if moved else []
    except ValueError:
        return written
    if not any(key in moved for key, _ in pairs):
        return written
    return str(Blend([replace(term, weight=moved.get(key, term.weight)) for key, term in pairs], blend.method))


def agree(written: str, seen: Any) -> bool:
    """Whether the sliders are those of the text."""
    return isinstance(seen, dict) and seen.get("of") == written


def names_of(written: str) -> list[str]:
    """Return the concepts of a written blend, each once; none where it cannot be read."""
    try:
        return list(dict.fromkeys(Blend.parse(written).names))
    except ValueError:
        return []


def with_concept(written: str, name: str, weight: float) -> str:
    """Return the written blend with one more concept."""
    return str(Blend.parse(written).with_weight(name, weight))


def without_concept(written: str, name: str) -> str:
    """Return the written blend without a concept."""
    return str(Blend.parse(written).without(name))


def is_even(blend: Blend) -> bool:
    """Whether a blend's concepts are evened out."""
    return blend.method is not None and blend.method.name == EVEN


def with_evening_turned(written: str) -> str:
    """Return the written blend with its concepts evened out, or summed as they are where they were even."""
    blend = Blend.parse(written)
    return str(Blend(blend.terms, None if is_even(blend) else Method(EVEN)))


def taken_from(prompt: str, written: str) -> tuple[str, str]:
    """Return the prompt without `<share:...>` tags, and the blend with what they said; without tags both as they were."""
    if "<" not in prompt:
        return prompt, written
    text, tagged = read_prompt(prompt)
    if not tagged.terms:
        return prompt, written
    blend = Blend.parse(written)
    kept = [term for term in blend.terms if term.name not in tagged.names]
    return text, str(Blend([*kept, *tagged.terms], blend.method))


def used_masks(written: str, masks: Mapping[str, str] | None) -> dict[str, str]:
    """Return the painted regions that a blend asks for."""
    try:
        wanted = Blend.parse(written).masks
    except ValueError:
        return {}
    return {name: masks[name] for name in wanted if masks and name in masks}
