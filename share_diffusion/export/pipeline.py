"""A pipeline as a diffusers folder that both old and new readers load.

Two things that transformers 5 writes on its own older programs cannot read: it leaves `text_model.` out of CLIP's tensor
names, so they start with random text encoders or NaN, and it writes `tokenizer.json` alone. Here the names carry their
prefix, which new versions read just the same, and `vocab.json` and `merges.txt` lie beside.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from share_diffusion.export.original.clip import spelled
from share_diffusion.export.stream import entry, write_stream

HIDDEN = {"_name_or_path"}  # paths of the machine that trained it


def write_pipeline(pipeline: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write a pipeline into an existing empty folder, its weights in this precision."""
    pipeline.save_config(folder)
    for name in pipeline.components:
        part = getattr(pipeline, name)
        if isinstance(part, nn.Module):
            write_model(part, folder / name, dtype)
        elif hasattr(part, "save_pretrained"):
            part.save_pretrained(folder / name)
            if hasattr(part, "backend_tokenizer"):
                write_vocabulary(part, folder / name)
    for path in sorted(folder.rglob("*.json")):
        if path.name in ("model_index.json", "config.json", "scheduler_config.json"):
            clean(path)


def write_model(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write one model's configuration and weights."""
    folder.mkdir()
    state = model.state_dict()
    if hasattr(model, "save_config"):
        model.save_config(folder)
        write_stream(folder / "diffusion_pytorch_model.safetensors", entries(state, dtype), {"format": "pt"})
        return
    text = json.loads(model.config.to_json_string())
    # The newer word and the older one for the precision of the weights.
    text |= {"dtype": str(dtype).removeprefix("torch."), "torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(text, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    clip = "clip" in str(text.get("model_type"))
    write_stream(folder / "model.safetensors", entries(spelled(state) if clip else state, dtype), {"format": "pt"})


def entries(state: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return the entries of a model's tensors, each storage once (T5 holds its embedding under two names)."""
    seen: set[tuple[int, int]] = set()
    found = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.numel())
        if place in seen and tensor.device.type != "meta" and tensor.numel():
            continue
        seen.add(place)
        found[name] = entry(tensor, dtype)
    return found


def write_vocabulary(tokenizer: Any, folder: Path) -> None:
    """Write a byte-pair tokenizer's `vocab.json` and `merges.txt` where it did not do so itself."""
    if "BPE" in type(tokenizer.backend_tokenizer.model).__name__ and not (folder / "merges.txt").is_file():
        tokenizer.backend_tokenizer.model.save(str(folder))


def clean(path: Path) -> None:
    """Take out of a configuration what tells of the machine it was made on."""
    config = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in HIDDEN}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")
