"""Samplers by the names people know, each built from the base's own schedule."""

from __future__ import annotations

from typing import Any

CLASSES = {
    "DDIM": "DDIMScheduler",
    "Euler": "EulerDiscreteScheduler",
    "Euler a": "EulerAncestralDiscreteScheduler",
    "DPM++ 2M": "DPMSolverMultistepScheduler",
    "UniPC": "UniPCMultistepScheduler",
    "Heun": "HeunDiscreteScheduler",
}


def samplers_of(scheduler: Any) -> dict[str, Any]:
    """Return the samplers that fit a base's scheduler, its own first; other families of schedule have only their own."""
    import diffusers

    own = type(scheduler).__name__
    found = {name: scheduler for name, kind in CLASSES.items() if kind == own} or {own.removesuffix("Scheduler"): scheduler}
    compatible = {kind.__name__ for kind in getattr(scheduler, "compatibles", [])}
    for name, kind in CLASSES.items():
        if kind in compatible and kind != own:
            found[name] = getattr(diffusers, kind).from_config(scheduler.config)
    return found
