"""A folder as PEFT keeps an adapter: `adapter_config.json` and `adapter_model.safetensors`, one folder a component.

    PATH/unet/adapter_config.json            PeftModel.from_pretrained(pipeline.unet, "PATH/unet")
    PATH/text_encoder/adapter_config.json    PeftModel.from_pretrained(pipeline.text_encoder, "PATH/text_encoder")

alpha = r everywhere, a layer of another rank standing in `rank_pattern` and `alpha_pattern`, so the scale is 1.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from share_diffusion.lora.factors import Factors
from share_diffusion.lora.file import write_safetensors
from share_diffusion.lora.kohya import four_dimensional
from share_diffusion.lora.lora import LoRA, narrowed

SPELLINGS = ("text_model.", "")


def write_peft(
    lora: LoRA,
    folder: Path,
    dtype: torch.dtype = torch.float16,
    base: str = "",
    modules: Mapping[str, Collection[str]] | None = None,
) -> None:
    """Write a folder for every component of a LoRA into `folder`, which exists.

    `modules` are the names that the components' modules have in the installed libraries: transformers 5.6 dropped
    `text_model.`, and PEFT loads nothing, silently, where a name differs. Without it the names carry `text_model.`.
    """
    for component in lora.components:
        layers = {name.partition(".")[2]: factors for name, factors in lora.layers.items() if name.startswith(f"{component}.")}
        layers = {installed(name, (modules or {}).get(component, ())): factors for name, factors in layers.items()}
        (folder / component).mkdir()
        text = json.dumps(adapter_config_of(layers, base), indent=2, sort_keys=True)
        (folder / component / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
        tensors = narrowed(peft_tensors(layers), dtype)
        write_safetensors(folder / component / "adapter_model.safetensors", tensors, {"format": "pt"})


def installed(module: str, names: Collection[str]) -> str:
    """The spelling of a module path that the installed component knows, or the path itself."""
    short = module.removeprefix("text_model.")
    return next((prefix + short for prefix in SPELLINGS if prefix + short in names), module)


def peft_tensors(layers: Mapping[str, Factors]) -> dict[str, Tensor]:
    """The tensors of `adapter_model.safetensors`."""
    tensors: dict[str, Tensor] = {}
    for module, factors in layers.items():
        up, down = four_dimensional(factors)
        tensors[f"base_model.model.{module}.lora_B.weight"] = up
        tensors[f"base_model.model.{module}.lora_A.weight"] = down
    return tensors


def adapter_config_of(layers: Mapping[str, Factors], base: str) -> dict[str, Any]:
    """The content of `adapter_config.json`."""
    ranks = {module: factors.rank for module, factors in layers.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    # "^" pins a pattern to the whole path: without it PEFT takes the first that some path ends with.
    others = {f"^{module}".replace(".", "\\."): rank for module, rank in ranks.items() if rank != common}
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": common,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }
