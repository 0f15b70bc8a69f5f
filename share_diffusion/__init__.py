"""Share for text-to-image: many concepts in one small file, blended exactly.

    from share_diffusion import Subspace, attach, load_base

    pipeline = load_base("tiny")
    handle = attach(pipeline, Subspace.load("outputs/tiny/subspace.safetensors"))
    handle.set_blend("watercolor:0.8 + robot:0.5")
    pipeline("watercolor painting of a robot on a beach").images[0].save("robot.png")

Names are imported when they are first used, so that `import share_diffusion` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from share_diffusion.attached import attach as attach
    from share_diffusion.base import load_base as load_base
    from share_diffusion.basis import Basis as Basis
    from share_diffusion.basis import Coefficients as Coefficients
    from share_diffusion.blend import Blend as Blend
    from share_diffusion.capacity import Capacity as Capacity
    from share_diffusion.drawing import Sampling as Sampling
    from share_diffusion.drawing import generate as generate
    from share_diffusion.lora import Factors as Factors
    from share_diffusion.lora import LoRA as LoRA
    from share_diffusion.subspace import Subspace as Subspace

__version__ = "0.1.0"

_HOMES = {
    "Basis": "basis",
    "Blend": "blend",
    "Capacity": "capacity",
    "Coefficients": "basis",
    "Factors": "lora",
    "LoRA": "lora",
    "Sampling": "drawing",
    "Subspace": "subspace",
    "attach": "attached",
    "generate": "drawing",
    "load_base": "base",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'share_diffusion' has no attribute {name!r}")
    return getattr(importlib.import_module(f"share_diffusion.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
