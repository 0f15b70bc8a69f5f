"""How long a merge takes at SDXL's true shapes, and how it depends on the number of concepts held.

    python tests/benchmarks/merge_cost.py

Random LoRAs on all 736 attention projections of SDXL's UNet and two text encoders. Growth is the rule (nothing is cut);
truncation is the paper's merge at a fixed basis rank. Ratios compare runs of one process.
"""

from __future__ import annotations

import json
import resource
import time
from dataclasses import replace
from pathlib import Path

import torch

from share_diffusion.capacity import Capacity
from share_diffusion.lora import Factors, LoRA
from share_diffusion.subspace import Subspace

RESULT = Path(__file__).parent / "results" / "merge_cost.json"
BLOCKS = {"down_blocks.1": (2, 2, 640), "down_blocks.2": (2, 10, 1280), "mid_block": (1, 10, 1280),
          "up_blocks.0": (3, 10, 1280), "up_blocks.1": (3, 2, 640)}  # fmt: skip


def shapes() -> dict[str, tuple[int, int]]:
    """Return (out, in) of every attention projection of SDXL, by path."""
    found = {}
    for block, (attentions, depth, width) in BLOCKS.items():
        for index in range(attentions):
            for level in range(depth):
                root = f"unet.{block}.attentions.{index}.transformer_blocks.{level}"
                for attention, context in (("attn1", width), ("attn2", 2048)):
                    sides = {"to_q": width, "to_k": context, "to_v": context, "to_out.0": width}
                    found |= {f"{root}.{attention}.{name}": (width, side) for name, side in sides.items()}
    for encoder, layers, width in (("text_encoder", 12, 768), ("text_encoder_2", 32, 1280)):
        for level in range(layers):
            root = f"{encoder}.text_model.encoder.layers.{level}.self_attn"
            found |= {f"{root}.{name}": (width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    return found


def random_lora(seed: int, rank: int) -> LoRA:
    """Return a LoRA of normal factors."""
    generator = torch.Generator().manual_seed(seed)
    return LoRA(
        {
            path: Factors(torch.randn(out, rank, generator=generator), torch.randn(rank, width, generator=generator) / width)
            for path, (out, width) in shapes().items()
        }
    )


def timed(subspace: Subspace, lora: LoRA, capacity: Capacity) -> float:
    """Return the seconds of one merge."""
    started = time.perf_counter()
    subspace.merge({"new": lora}, capacity=capacity)
    return time.perf_counter() - started


def holding(subspace: Subspace, count: int) -> Subspace:
    """Return the subspace with copies of its first concept, so that it holds `count`."""
    first = next(iter(subspace.concepts.values()))
    return replace(subspace, concepts={f"c{n}": replace(first, name=f"c{n}") for n in range(count)})


def main() -> None:
    rank, k = 4, 16
    start = Subspace.fit({f"a{n}": random_lora(n, rank) for n in range(2)}, capacity=Capacity(retain=None, rank=k))
    lora, result = random_lora(9, rank), {"layers": len(shapes()), "lora_rank": rank, "threads": torch.get_num_threads()}
    for count in (1, 10, 100):
        held = holding(start, count)
        result[f"growth_{count}_held"] = round(timed(held, lora, Capacity(retain=0.999)), 2)
        result[f"truncation_{count}_held"] = round(timed(held, lora, Capacity(retain=None, rank=k)), 2)
    result["growth_100_over_1"] = round(result["growth_100_held"] / result["growth_1_held"], 2)
    result["truncation_100_over_1"] = round(result["truncation_100_held"] / result["truncation_1_held"], 2)
    result["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
