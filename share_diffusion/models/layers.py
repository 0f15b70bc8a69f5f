"""The layers of a pipeline by the names that files give them, and the presets that choose among them.

A layer's path is component, dot, module path as diffusers spells it. CLIP paths always carry `text_model.`, whether or
not the installed transformers does, because every LoRA file does.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from share_diffusion.layer import ShareLayer
from share_diffusion.lora.names import COMPONENTS
from share_diffusion.models import family_of
from share_diffusion.models.family import inner

PRESETS = ("attention", "attention+ff", "attention+ff+conv", "all-linear")


def components(pipeline: Any) -> dict[str, nn.Module]:
    """Return the pipeline's denoiser and text encoders by their names; of compiled ones what was compiled."""
    found = {name: inner(getattr(pipeline, name, None)) for name in COMPONENTS}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


def spell(component: str, module: str) -> str:
    """Return a layer's path from its component and the name that `named_modules()` gives it."""
    if component.startswith("text_encoder") and re.match(r"(encoder\.layers|embeddings|final_layer_norm)\b", module):
        module = f"text_model.{module}"
    return f"{component}.{module}"


def layers(pipeline: Any) -> dict[str, nn.Module]:
    """Return every Linear and Conv2d of the pipeline's adaptable components, by path; wrapped ones as their wrapper."""
    found: dict[str, nn.Module] = {}
    for component, root in components(pipeline).items():
        for name, module in root.named_modules():
            if isinstance(module, ShareLayer) or (isinstance(module, (nn.Linear, nn.Conv2d)) and not name.endswith(".base")):
                found[spell(component, name)] = module
    return found


def parent_of(pipeline: Any, path: str) -> tuple[nn.Module, str]:
    """Return the module that holds a layer, and the layer's attribute name in it."""
    component, _, name = path.partition(".")
    root = components(pipeline)[component]
    if name.startswith("text_model.") and not hasattr(root, "text_model"):
        name = name.removeprefix("text_model.")
    holder, _, attribute = name.rpartition(".")
    return root.get_submodule(holder), attribute


def select(pipeline: Any, targets: str = "attention", text_encoder: bool = True) -> dict[str, nn.Module]:
    """Return the layers that a preset of the base's family or a regular expression chooses.

    Of the presets (`attention`, `attention+ff`, `attention+ff+conv`, `all-linear`) only the third has convolutions, where the
    denoiser has any. A regular expression is searched in the whole path. What cannot influence a picture is left out: it
    would learn nothing, and processes that learn together would wait for its gradient. Raises ValueError for an expression
    that is none or chooses nothing.
    """
    preset, idle = targets in PRESETS, idle_of(pipeline)
    pattern = re.compile(family_of(pipeline).targets()[targets]) if preset else expression(targets)
    kinds = (nn.Linear, nn.Conv2d) if targets == "attention+ff+conv" else nn.Linear
    chosen = {
        path: module
        for path, module in layers(pipeline).items()
        if pattern.search(path)
        and (text_encoder or not path.startswith("text_encoder"))
        and not path.startswith(idle)
        and (not preset or isinstance(getattr(module, "base", module), kinds))
    }
    if not chosen:
        examples = ", ".join(list(layers(pipeline))[:3])
        raise ValueError(f"targets {targets!r} chooses no layer; paths look like {examples}")
    return chosen


def idle_of(pipeline: Any) -> tuple[str, ...]:
    """Return the starts of paths that cannot influence a picture; of a model of no known family nothing is known."""
    try:
        return family_of(pipeline).idle(pipeline)
    except ValueError:
        return ()


def expression(targets: str) -> re.Pattern[str]:
    """Return a regular expression, or raise ValueError with the presets that could have been meant."""
    try:
        return re.compile(targets)
    except re.error as error:
        known = ", ".join(PRESETS)
        raise ValueError(f"targets {targets!r} is neither one of {known} nor a regular expression: {error}") from None


def shape_of(module: nn.Module) -> tuple[tuple[int, int], tuple[int, int] | None]:
    """Return a layer's (out, in) as a matrix, and its kernel where it is a convolution; read off even without weights."""
    base = module.base if isinstance(module, ShareLayer) else module
    if isinstance(base, nn.Conv2d):
        height, width = base.kernel_size
        return (base.out_channels, base.in_channels * height * width), (height, width)
    assert isinstance(base, nn.Linear)
    return (base.out_features, base.in_features), None
