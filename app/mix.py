"""The blend as rows of sliders and as written text, kept in step both ways."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from share_diffusion.blend import Blend

STEP = 0.05
Row = dict[str, Any]


def rows_of(written: str) -> list[Row]:
    """Return the mixer's rows of a written blend."""
    return [{"name": name, "weight": round(weight, 4)} for name, weight in Blend.parse(written).weights.items()]


def with_rows(written: str, rows: Sequence[Row]) -> str:
    """Return the written blend with the weights of the rows."""
    weights = dict(Blend.parse(written).weights)
    for row in rows:
        name, weight = row.get("name"), row.get("weight")
        if name in weights and isinstance(weight, (int, float)) and not isinstance(weight, bool):
            weights[name] = float(weight)
    return str(Blend(weights))


def with_concept(written: str, name: str, weight: float) -> str:
    """Return the written blend with one more concept."""
    return str(Blend({**Blend.parse(written).weights, name: weight}))


def without_concept(written: str, name: str) -> str:
    """Return the written blend without a concept."""
    return str(Blend({key: weight for key, weight in Blend.parse(written).weights.items() if key != name}))


def newest(written: str, agreed: str, rows: Sequence[Row]) -> str:
    """Return the blend that a person sees: the text where it was edited last, else the text with the sliders' weights."""
    return written if written != agreed else with_rows(written, rows or [])
