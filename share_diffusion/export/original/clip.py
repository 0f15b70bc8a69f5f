"""The text encoders: CLIP as transformers spells it, or as OpenCLIP does in SD 2.x and for SDXL's second encoder.

OpenCLIP keeps query, key and value in one matrix `in_proj`, the positions as a bare tensor, and the projection
transposed. SD 2.x reads the last layer but one: diffusers leaves the last one out and other programs expect it, so the
file carries a copy there that nobody uses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from share_diffusion.export.stream import Entry, entry

PREFIXLESS = re.compile(r"(encoder\.layers|embeddings|final_layer_norm)\.")
LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
IN_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
OUTSIDE = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
Tensors = Mapping[str, Tensor]


def spelled(state: Tensors) -> dict[str, Tensor]:
    """Return a text encoder's tensors with the `text_model.` that transformers 5.6 dropped and every file carries."""
    named = {f"text_model.{name}" if PREFIXLESS.match(name) else name: tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in named.items() if not name.endswith("position_ids")}


def clip_entries(state: Tensors, dtype: torch.dtype) -> dict[str, Entry]:
    """Return the entries of a CLIP text encoder in transformers' spelling."""
    return {name: entry(tensor, dtype) for name, tensor in spelled(state).items()}


def open_clip_entries(state: Tensors, dtype: torch.dtype, layers: int) -> dict[str, Entry]:
    """Return the entries of a CLIP text encoder in OpenCLIP's spelling, padded to so many layers."""
    named = spelled(state)
    found = {OUTSIDE[name]: entry(tensor, dtype) for name, tensor in named.items() if name in OUTSIDE}
    width = named["text_model.final_layer_norm.weight"].shape[0]
    held = 1 + max(int(match[1]) for match in map(LAYER.fullmatch, named) if match)
    for number in range(max(held, layers)):
        source = f"text_model.encoder.layers.{min(number, held - 1)}"
        for name, one in layer_entries(named, source, dtype).items():
            found[f"transformer.resblocks.{number}.{name}"] = one
    projection = named.get("text_projection.weight")
    # SD 2.x projects nothing; programs that build the whole OpenCLIP want a square matrix there.
    made = torch.eye(width) if projection is None else projection.T
    return found | {"text_projection": entry(made, dtype), "logit_scale": entry(torch.tensor(4.6052), dtype)}


def layer_entries(named: Tensors, source: str, dtype: torch.dtype) -> dict[str, Entry]:
    """Return one layer's entries by their names within the layer."""
    found: dict[str, Entry] = {}
    for part, original in IN_LAYER.items():
        for ending in ("weight", "bias"):
            found[f"{original}.{ending}"] = entry(named[f"{source}.{part}.{ending}"], dtype)
    for ending in ("weight", "bias"):
        three = [named[f"{source}.self_attn.{side}_proj.{ending}"] for side in "qkv"]
        shape = (3 * three[0].shape[0], *three[0].shape[1:])
        found[f"attn.in_proj_{ending}"] = Entry(shape, dtype, lambda three=three: torch.cat(three))
    return found
