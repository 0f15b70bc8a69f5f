"""The blend as rows of sliders and as written text, kept in step both ways.

A row is one term of the blend, so that a concept which acts differently in two regions has two sliders; its options are
shown beside it and stay as they are when the slider moves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from share_diffusion.blend import Blend, Method
from share_diffusion.grammar import read_prompt

Row = dict[str, Any]
EVEN = "loss-equalised"


def rows_of(written: str) -> list[Row]:
    """Return the mixer's rows of a written blend."""
    rows = []
    for index, term in enumerate(Blend.parse(written).terms):
        options = "  ".join(
            [*(["blocks=" + ",".join(f"{group}:{factor:g}" for group, factor in term.blocks)] if term.blocks else [])]
            + [str(option) for option in (term.steps, term.region) if option is not None]
        )
        rows.append({"id": f"{index} {term.name}", "name": term.name, "weight": round(term.weight, 4), "note": options})
    return rows


def with_rows(written: str, rows: Sequence[Row]) -> str:
    """Return the written blend with the weights of the rows."""
    blend = Blend.parse(written)
    weights = {row.get("id"): row.get("weight") for row in rows if isinstance(row, dict)}
    terms = []
    for index, term in enumerate(blend.terms):
        weight = weights.get(f"{index} {term.name}")
        sound = isinstance(weight, (int, float)) and not isinstance(weight, bool) and math.isfinite(weight)
        terms.append(replace(term, weight=float(weight)) if sound and weight is not None else term)
    return str(Blend(terms, blend.method))


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


def newest(written: str, agreed: str, rows: Sequence[Row]) -> str:
    """Return the blend that a person sees: the text where it was edited last, else the text with the sliders' weights."""
    return written if written != agreed else with_rows(written, rows or [])


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
