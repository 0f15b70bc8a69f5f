"""Where in a model a layer lies: its block groups, and whether it sees text, the picture or neither.

UNet           down_blocks, conv_in, embeddings: down;  mid_block: mid;  up_blocks, conv_out: up;  `down.1` is one block
transformer    its blocks in order (double ones before single ones), by thirds: early, mid, late;  `mid.20` is one block,
               the 21st of the model, whichever of its blocks are adapted
text encoders  text;  `text.2` is the second
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

BLOCK = re.compile(r"^transformer\.(single_)?(?:transformer_)?blocks\.(\d+)\.")
UNET = ((r"down_blocks\.(\d+)", "down"), (r"mid_block", "mid"), (r"up_blocks\.(\d+)", "up"), (r"conv_(norm_)?out", "up"))
TEXT_SIDE = re.compile(
    r"^text_encoder|^unet\..*\battn2\.to_[kv]$|\badd_[qkv]_proj$|\bto_add_out$|\bff_context\b|context_embedder|caption_projection"
)


def block_groups(paths: Iterable[str], blocks: Sequence[int] = ()) -> dict[str, tuple[str, ...]]:
    """Return every layer's groups, from the widest (`all`) to the narrowest.

    `blocks` is how many double and single blocks the transformer has (`blocks_of` all its layers); where it is not known,
    as of LoRA files that name no base, those up to the last adapted one are taken for all.
    """
    paths = list(paths)
    blocks = tuple(blocks) or blocks_of(paths)
    return {path: ("all", *groups_of(path, blocks)) for path in paths}


def blocks_of(paths: Iterable[str]) -> tuple[int, ...]:
    """Return how many double and single blocks a transformer with these layers has; empty where there are none."""
    found = [block for block in map(block_of, paths) if block is not None]
    ends = [max((number + 1 for single, number in found if single == kind), default=0) for kind in (False, True)]
    return tuple(ends) if found else ()


def block_of(path: str) -> tuple[bool, int] | None:
    """Return (single, number) of the transformer block that a layer lies in."""
    match = BLOCK.match(path)
    return (match[1] is not None, int(match[2])) if match else None


def groups_of(path: str, blocks: Sequence[int]) -> tuple[str, ...]:
    """Return a layer's groups; `blocks` counts the transformer's double and single blocks."""
    component, _, module = path.partition(".")
    if component.startswith("text_encoder"):
        return "text", f"text.{component.removeprefix('text_encoder').removeprefix('_') or 1}"
    if component == "transformer":
        block = block_of(path)
        if block is None:
            return ("late" if re.match(r"(proj|norm)_out", module) else "early",)
        single, number = block
        place, count = number + blocks[0] * single, max(sum(blocks), 1)
        third = ("early", "mid", "late")[min(3 * place // count, 2)]
        return third, f"{third}.{place}"
    for pattern, group in UNET:
        if match := re.match(pattern, module):
            number = match[1] if match.re.groups and "blocks" in pattern else None
            return (group, f"{group}.{number}") if number is not None else (group,)
    return ("down",)


def sees_text(path: str) -> bool:
    """Whether a layer works on words rather than on places of the picture."""
    return TEXT_SIDE.search(path) is not None
