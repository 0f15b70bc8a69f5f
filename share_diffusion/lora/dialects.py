"""Every dialect in one tuple: how a file of it is recognised, read, and (where other programs want it) written.

A dialect's `read(tensors, metadata, most)` explains every tensor or raises ValueError with the list of those that it
cannot; `most` is the rank that a conversion from LoHa or LoKr may keep. Here is also told what is no low-rank update at
all, and what a file may hold beside one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from share_diffusion.lora.assemble import MOST, SHOWN, refuse
from share_diffusion.lora.cloneofsimo import is_cloneofsimo, read_cloneofsimo
from share_diffusion.lora.diffusers import is_dotted, read_diffusers, spell_diffusers
from share_diffusion.lora.factors import Factors
from share_diffusion.lora.kohya import is_kohya, read_kohya, spell_kohya
from share_diffusion.lora.processor import spell_processor
from share_diffusion.lora.xlabs import is_xlabs, read_xlabs

Read = Callable[[Mapping[str, Tensor], Mapping[str, str], int], dict[str, Factors]]
Spell = Callable[[Mapping[str, Factors], str, torch.dtype], tuple[dict[str, Tensor], dict[str, str]]]


@dataclass(frozen=True)
class Dialect:
    """One way to spell a LoRA; `recognises` sees a file's keys, `spell` returns tensors and metadata for a file's stem."""

    name: str
    recognises: Callable[[Collection[str]], bool]
    read: Read
    spell: Spell | None = None


# In the order in which they are asked: XLabs' keys end as diffusers' do.
DIALECTS = (
    Dialect("xlabs", is_xlabs, read_xlabs),
    Dialect("kohya", is_kohya, read_kohya, spell_kohya),
    Dialect("cloneofsimo", is_cloneofsimo, read_cloneofsimo),
    Dialect("diffusers", is_dotted, read_diffusers, spell_diffusers),
)
WRITERS = {dialect.name: dialect.spell for dialect in DIALECTS if dialect.spell} | {"diffusers-old": spell_processor}

# What other adaptations do to a weight, told by their keys; reading the rest of such a file would change its meaning.
FOREIGN = {
    "DoRA": (r"\.dora_scale|lora_magnitude_vector", "rescales every column of W0 + dW, which is no low-rank update"),
    "OFT": (r"\.oft_", "turns the base's weights, which is no low-rank update"),
    "IA3": (r"\.ia3_|\.on_input$", "scales activations, which is no low-rank update"),
    "whole-weight difference": (r"\.diff(_b)?$", "has full rank; extract a LoRA from it first"),
    "normalisation layers": (r"\.[wb]_norm$", "are no matrices; train without them"),
}
EMBEDDING = re.compile(r"<.+>|bundle_emb\..+")


def parse(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], most: int = MOST
) -> tuple[dict[str, Factors], tuple[str, ...]]:
    """The layers of a file in whichever dialect its keys are, and notes on what it holds beside them."""
    refuse(foreign(tensors))
    notes, rest = set_aside(tensors)
    for dialect in DIALECTS:
        if dialect.recognises(rest):
            return dialect.read(rest, metadata, most), notes
    shown = ", ".join(sorted(tensors)[:5]) or "none at all"
    raise ValueError(f"no LoRA of a known dialect; its keys: {shown}. Expected those of kohya, diffusers or PEFT")


def foreign(tensors: Mapping[str, Tensor]) -> list[str]:
    """The adaptations in a file that are no low-rank updates, each with its layers."""
    problems = []
    for kind, (mark, reason) in FOREIGN.items():
        if keys := [key for key in sorted(tensors) if re.search(mark, key)]:
            more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
            problems.append(f"{kind} {reason}: {len(keys)} tensors, {', '.join(keys[:SHOWN])}{more}")
    return problems


def set_aside(tensors: Mapping[str, Tensor]) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Notes on the textual-inversion embeddings in a file, and its other tensors."""
    found = [key for key in tensors if EMBEDDING.fullmatch(key)]
    rest = {key: tensor for key, tensor in tensors.items() if key not in found}
    if not found:
        return (), rest
    return (
        f"the file also holds {len(found)} textual-inversion embedding{'s' * (len(found) > 1)} ({', '.join(sorted(found))}), "
        "new words for the tokenizer; they are no update of a layer and stay behind",
    ), rest
