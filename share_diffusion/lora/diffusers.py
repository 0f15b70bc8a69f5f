"""The dotted dialects: diffusers in all its spellings since 2023, and PEFT's own folders.

    unet.<path>.lora_A.weight, .lora_B.weight          PEFT inside diffusers (what `save_lora_weights` writes)
    base_model.model.<path>.lora_A.weight              PEFT's `adapter_model.safetensors`
    unet.<path>.to_q.lora.down.weight, .up.weight      diffusers 0.22 to 0.24
    [unet.]<path>.processor.to_q_lora.down.weight      attention processors, before PEFT
    text_encoder.<path>.q_proj.lora_linear_layer.down.weight

Scale: `.alpha` / r where a file has it, else what PEFT's config says, else 1. diffusers keeps that config in the header
under `lora_adapter_metadata`, PEFT in the `adapter_config.json` beside the file (handed in here as `adapter_config`). A
PEFT folder is mostly called by its component, which its keys do not tell (handed in as `adapter_folder`).
"""

from __future__ import annotations

import json
import math
import re
import reprlib
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from share_diffusion.lora.assemble import ENDINGS, Role, Scale, assemble, no_scale
from share_diffusion.lora.factors import Factors
from share_diffusion.lora.kohya import four_dimensional
from share_diffusion.lora.names import COMPONENTS, canonical
from share_diffusion.lora.native import renamed

Config = dict[str, Any]

DOTTED: dict[str, Role] = {
    **{f".{ending}": role for ending, role in ENDINGS.items()},
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
}


def is_dotted(keys: Collection[str]) -> bool:
    """Whether a file is of diffusers or PEFT: some of its keys end as those do."""
    return any(key.endswith(tuple(DOTTED)) for key in keys)


def read_diffusers(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], most: int) -> dict[str, Factors]:
    """The layers of a diffusers file or of a PEFT folder."""
    folder = metadata.get("adapter_folder", "")
    return renamed(assemble(tensors, lambda key: split_dotted(key, folder), scale_of(configs(tensors, metadata)), most))


def split_dotted(key: str, folder: str = "") -> tuple[str, Role] | None:
    """`down_blocks.0.….attn1.processor.to_out_lora.up.weight` -> (`unet.down_blocks.0.….attn1.to_out.0`, `up`)."""
    ending = next((ending for ending in DOTTED if key.endswith(ending)), None)
    layer = None if ending is None else canonical(key.removesuffix(ending), folder)
    return None if ending is None or layer is None else (layer, DOTTED[ending])


def configs(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Config]:
    """The PEFT config of each component that has one."""
    if "adapter_config" in metadata:
        config = json_object(metadata["adapter_config"], "adapter_config.json")
        return {component: checked(config) for component in COMPONENTS}
    if any(key.startswith("base_model.model.") for key in tensors):
        raise ValueError("PEFT keeps the scale in adapter_config.json; put that file beside this one")
    flat = json_object(metadata.get("lora_adapter_metadata") or "{}", "lora_adapter_metadata")
    found: dict[str, Config] = {}
    for key, value in flat.items():
        component, _, field = key.partition(".")
        found.setdefault(component, {})[field] = value
    return {component: checked(config) for component, config in found.items()}


def json_object(text: str, source: str) -> Config:
    """A JSON object out of `source`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{source} is a JSON {type(value).__name__}; expected an object with r and lora_alpha")
    return value


def checked(config: Config) -> Config:
    """The config itself, or a ValueError with all that keeps it from giving a scale."""
    shown = reprlib.repr  # a number may have thousands of digits
    problems = [f"{key} is {shown(config[key])}" for key in ("r", "lora_alpha") if not positive(config.get(key, 8))]
    problems += [f"peft_type is {shown(config['peft_type'])}"] if config.get("peft_type", "LORA") != "LORA" else []
    problems += ["use_dora is set"] if config.get("use_dora") else []
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(("pissa", "olora", "corda")):  # which take their part out of the base's weights
        problems.append(f"init_lora_weights is {start}, which changes the base (save it with PEFT's conversion to LoRA)")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict):
            problems.append(f"{key} is {shown(pattern)}")
            continue
        wrong = [name for name in pattern if not re.fullmatch(r"\^?[\w.\\]+", name) or not positive(pattern[name])]
        problems += [f"{key} has {shown(name)}" for name in wrong]
    if problems:
        expected = "positive numbers, objects with plain module names as patterns, and LoRA without DoRA"
        raise ValueError(f"the PEFT config cannot be read: {', '.join(problems)}; expected {expected}")
    return config


def positive(value: object) -> bool:
    """Whether a JSON value is a number above 0 that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def scale_of(found: Mapping[str, Config]) -> Scale:
    """The scale of a layer by PEFT's rule: alpha / r, or alpha / sqrt(r) when rank-stabilised."""

    def scale(layer: str, rank: int) -> float:
        component, _, module = layer.partition(".")
        if not (config := found.get(component)):
            return no_scale(layer, rank)
        # 8 and 8 are PEFT's own defaults for the two.
        expected = matched(config.get("rank_pattern") or {}, module, config.get("r", 8))
        if expected != rank:
            raise ValueError(f"rank is {rank}, but the PEFT config says {expected}; the two belong to different runs")
        alpha = matched(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", 8))
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    return scale


def matched(pattern: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first pattern that is the module's name or the end of it, as PEFT looks it up."""
    for key, value in pattern.items():
        name = key.removeprefix("^").replace("\\.", ".")
        for spelled in (module, module.removeprefix("text_model.")):
            if spelled == name or (not key.startswith("^") and spelled.endswith(f".{name}")):
                return value
    return default


def spell_diffusers(layers: Mapping[str, Factors], name: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a file for `load_lora_weights`, which takes scale 1 where it finds no alpha."""
    tensors: dict[str, Tensor] = {}
    for layer, factors in layers.items():
        tensors[f"{layer}.lora_B.weight"], tensors[f"{layer}.lora_A.weight"] = four_dimensional(factors)
    metadata = {"format": "pt"}
    if len({factors.rank for factors in layers.values()}) > 1:
        # Without it, diffusers 0.35 gives every layer the alpha of the first one.
        metadata["lora_adapter_metadata"] = json.dumps(adapter_metadata(layers), sort_keys=True)
    return tensors, metadata


def adapter_metadata(layers: Mapping[str, Factors]) -> Config:
    """The PEFT config of every component with scale 1 and each layer's own rank, flat as diffusers stores it."""
    metadata: Config = {}
    for component in {layer.partition(".")[0] for layer in layers}:
        inside = {layer.partition(".")[2]: layers[layer].rank for layer in layers if layer.startswith(f"{component}.")}
        # transformers spells CLIP with or without `text_model.`; the shorter name is the end of both.
        ranks = {module.removeprefix("text_model."): rank for module, rank in inside.items()}
        common = Counter(ranks.values()).most_common(1)[0][0]
        others = {module: rank for module, rank in ranks.items() if rank != common}
        config = {"r": common, "lora_alpha": common, "rank_pattern": others, "alpha_pattern": others}
        config["target_modules"] = sorted(ranks)
        metadata |= {f"{component}.{field}": value for field, value in config.items()}
    return metadata
