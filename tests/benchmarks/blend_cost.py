"""What blending costs: setting a blend, and the forward with many concepts or many regions, as ratios within one run.

    python tests/benchmarks/blend_cost.py

Setting is measured on `tiny` and at SDXL's true shapes (736 layers without weights, basis rank 16), with eight concepts;
the forward on `tiny`'s denoiser with guidance, batch 2 x 4, in bases of rank 16 and in the columns that a new file starts
from (up to 459 a side), and on two transformer blocks of SDXL's (width 640, 32 x 32 places). Times are the process's own
seconds on one thread, the least of several rounds that take turns.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from merge_cost import shapes
from torch import nn

from share_diffusion.attached import AttachedSubspace, attach
from share_diffusion.base import load_base
from share_diffusion.calibration import measured
from share_diffusion.capacity import Capacity
from share_diffusion.lora import Factors, LoRA
from share_diffusion.models.identity import identify
from share_diffusion.models.layers import select, shape_of
from share_diffusion.subspace import Origin, Subspace

RESULT = Path(__file__).parent / "results" / "blend_cost.json"
CONCEPTS, RANK, BASIS_RANK = 8, 4, 16
SIXTEEN = [(column / 4, row / 4, (column + 1) / 4, (row + 1) / 4) for row in range(4) for column in range(4)]


def subspace_of(sizes: dict[str, tuple[int, int]]) -> Subspace:
    """Return a subspace of random concepts on layers of shape (out, in)."""
    generator = torch.Generator().manual_seed(0)

    def lora() -> LoRA:
        pairs = {path: ((out, RANK), (RANK, width)) for path, (out, width) in sizes.items()}
        return LoRA(
            {path: Factors(*(0.05 * torch.randn(*size, generator=generator) for size in both)) for path, both in pairs.items()}
        )

    capacity = Capacity(retain=None, rank=BASIS_RANK)
    return Subspace.fit({f"c{number}": lora() for number in range(CONCEPTS)}, capacity=capacity)


def in_measured_columns(pipeline: Any) -> Subspace:
    """Return a subspace of random concepts in the columns that a new file of `tiny` starts from."""
    modules, generator = select(pipeline, "attention+ff+conv"), torch.Generator().manual_seed(0)
    shapes = {path: shape_of(module) for path, module in modules.items()}
    origin = measured(pipeline, modules, Origin("activations", 48))
    empty = Subspace(base=identify(pipeline, "tiny"), origin=origin).cover(shapes)

    def lora() -> LoRA:
        layers = {}
        for path, basis in empty.layers.items():
            alpha, beta = (0.05 * torch.randn(columns, RANK, generator=generator) for columns in basis.rank)
            layers[path] = Factors(basis.beta @ beta, (basis.alpha @ alpha).mT.contiguous(), empty.kernels.get(path))
        return LoRA(layers)

    return empty.merge({f"c{number}": lora() for number in range(CONCEPTS)})


def empty_model(sizes: dict[str, tuple[int, int]]) -> Any:
    """Return what looks like a pipeline with linear layers of these shapes, without weights."""
    components: dict[str, nn.Module] = {}
    for path, (out, width) in sizes.items():
        component, *parts = path.split(".")
        holder = components.setdefault(component, nn.Module())
        for part in parts[:-1]:
            if part not in holder._modules:
                holder.add_module(part, nn.Module())
            holder = holder._modules[part]  # type: ignore[assignment]
        holder.add_module(parts[-1], nn.Linear(width, out, bias=False, device="meta"))
    return SimpleNamespace(**components)


def blend(concepts: int, regions: bool = False) -> str:
    """Return a blend of so many concepts, or of sixteen regions."""
    if regions:
        boxes = [",".join(map(str, box)) for box in SIXTEEN]
        return " + ".join(f"c{number % concepts}:0.5[region={box} soft=0.1]" for number, box in enumerate(boxes))
    return " + ".join(f"c{number}:0.{number + 1}" for number in range(concepts))


def least(actions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return each action's least process time in seconds over rounds in which all take turns."""
    best = dict.fromkeys(actions, float("inf"))
    for _ in range(rounds):
        for name, action in actions.items():
            started = time.process_time()
            action()
            best[name] = min(best[name], time.process_time() - started)
    return best


def setting(handle: AttachedSubspace) -> dict[str, float]:
    """Return milliseconds of the first blend of eight concepts, of a moved slider, and of one concept."""
    started = time.process_time()
    handle.set_blend(blend(CONCEPTS))
    first = time.process_time() - started
    times = least({"eight": lambda: handle.set_blend(blend(CONCEPTS)), "one": lambda: handle.set_blend(blend(1))}, 9)
    return {
        "layers": len(handle.layers),
        "first_use_of_eight_concepts_ms": round(1e3 * first, 2),
        "eight_concepts_ms": round(1e3 * times["eight"], 2),
        "one_concept_ms": round(1e3 * times["one"], 2),
    }


def forward(handle: AttachedSubspace, run: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Return the forward's cost: seconds with one concept, and the ratios to it."""
    names = {"base": "", "one": blend(1), "eight": blend(CONCEPTS), "regions": blend(CONCEPTS, regions=True)}

    def timed() -> dict[str, float]:
        best = dict.fromkeys(names, float("inf"))
        for _ in range(rounds):
            for name, text in names.items():
                handle.set_blend(text)
                run()  # masks are made at the first call
                best[name] = min(best[name], least({name: run}, 2)[name])
        return best

    with torch.no_grad():
        best = timed()
    return {
        "one_concept_ms": round(1e3 * best["one"], 2),
        "one_over_base": round(best["one"] / best["base"], 3),
        "eight_over_one": round(best["eight"] / best["one"], 3),
        "sixteen_regions_over_eight": round(best["regions"] / best["eight"], 3),
    }


def tiny_forward(measured_columns: bool = False) -> tuple[AttachedSubspace, Callable[[], Any]]:
    """Return a subspace on `tiny` and a call of its denoiser."""
    pipeline = load_base("tiny")
    sizes = {path: shape_of(module)[0] for path, module in select(pipeline).items()}
    handle = attach(pipeline, in_measured_columns(pipeline) if measured_columns else subspace_of(sizes))
    sample, states = torch.randn(8, 8, 16, 16), torch.randn(8, 32, pipeline.unet.config.cross_attention_dim)
    return handle, lambda: pipeline.unet(sample, torch.tensor(500), states)


def large_forward() -> tuple[AttachedSubspace, Callable[[], Any]]:
    """Return a subspace on two of SDXL's transformer blocks and a call of them."""
    from diffusers.models.attention import BasicTransformerBlock

    class Blocks(nn.Module):
        """Blocks that are called as a UNet is."""

        def __init__(self) -> None:
            super().__init__()
            options = {"num_attention_heads": 10, "attention_head_dim": 64, "cross_attention_dim": 2048}
            self.up_blocks = nn.ModuleList(BasicTransformerBlock(640, **options) for _ in range(2))

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
            tokens = sample.flatten(2).mT
            for one in self.up_blocks:
                tokens = one(tokens, encoder_hidden_states=encoder_hidden_states)
            return tokens

    pipeline = SimpleNamespace(unet=Blocks().eval())
    sizes = {path: shape_of(module)[0] for path, module in select(pipeline, r"attn\d\.to_").items()}
    handle = attach(pipeline, subspace_of(sizes))
    sample, states = torch.randn(2, 640, 32, 32), torch.randn(2, 77, 2048)
    return handle, lambda: pipeline.unet(sample, torch.tensor(500), states)


def main() -> None:
    torch.manual_seed(0)
    result: dict[str, Any] = {"threads": torch.get_num_threads()}
    handle, run = tiny_forward()
    result["set_tiny"] = setting(handle)
    result["forward_tiny"] = forward(handle, run, 12)
    handle, run = tiny_forward(measured_columns=True)
    result["set_tiny_measured"] = setting(handle)
    result["forward_tiny_measured"] = forward(handle, run, 12)
    handle, run = large_forward()
    result["forward_sdxl_blocks"] = forward(handle, run, 4)
    sizes = shapes()
    result["set_sdxl"] = setting(attach(empty_model(sizes), subspace_of(sizes)))
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
