"""PEFT: a matrix is loaded where `target_modules` names its module, in full or by its end; "all-linear" names every linear.

One folder is one component: `adapter_model.safetensors`, and beside it `adapter_config.json`. A `target_modules` that is a
regular expression is not run here, since one from a stranger may run for ever.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from share_diffusion.export.readers.keys import apart
from share_diffusion.lora.diffusers import json_object
from share_diffusion.lora.file import adapter_config

NAME = "PEFT"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
ALL = "all-linear"
# What narrows the choice of layers further; each has rules of its own.
NARROWER = ("layers_to_transform", "layers_pattern")


def config_of(folder: Path) -> dict[str, Any]:
    """Return the configuration of a PEFT folder; ValueError, naming its file, where it is none."""
    config = json_object(adapter_config(folder / WEIGHTS).get("adapter_config", ""), str(folder / CONFIG))
    problems = [
        f"{key} is {reprlib.repr(config[key])}" for key in ("target_modules", "exclude_modules") if not names(config, key)
    ]
    if problems:
        raise ValueError(f"{folder / CONFIG}: {', '.join(problems)}; expected a list of module names, a text, or null")
    return config


def names(config: dict[str, Any], key: str) -> bool:
    """Return whether a field is what names modules: absent, a text or a list of texts."""
    value = config.get(key)
    return value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))


def unjudged(config: dict[str, Any]) -> str | None:
    """Return why only PEFT itself can tell what a configuration names, or None."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    patterns = [f"target_modules is the pattern {targets!r}"] if isinstance(targets, str) and targets.lower() != ALL else []
    patterns += [f"exclude_modules is the pattern {excluded!r}"] if excluded and isinstance(excluded, str) else []
    patterns += [f"{key} is set" for key in NARROWER if config.get(key) not in (None, [], "")]
    return f"{', '.join(patterns)}: only PEFT itself tells which layers that names" if patterns else None


def lora(key: str, shape: Sequence[int], config: dict[str, Any]) -> str | None:
    """Return why PEFT passes over a key of a LoRA, a tensor of this shape, or None."""
    stem, ending = apart(key)
    module, targets = stem.removeprefix("base_model.model."), config.get("target_modules") or []
    if not ending:
        return "no LoRA matrix by its ending"
    if ends_with(module, config.get("exclude_modules") or []):
        return "exclude_modules names it"
    if isinstance(targets, str):
        return None if len(shape) == 2 else f"{ALL} names no convolution"
    return None if ends_with(module, targets) else "target_modules does not name it"


def ends_with(module: str, targets: Sequence[str]) -> bool:
    """Return whether a module is one of these names, or its path ends with one."""
    return any(module == name or module.endswith(f".{name}") for name in targets)
