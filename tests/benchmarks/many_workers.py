"""A thousand machines and ten thousand concepts: does one file take in what they learn apart from each other?

    python tests/benchmarks/many_workers.py

Every round, 1,000 workers learn a concept each against a basis version that they know and send a patch; the patches of
the round are folded in, in a random order. Learning is replaced by drawing: a concept is a random update of rank 4 on two
layers of `tiny`'s shapes, 97 % of its energy in 24 directions a side that all concepts share and the rest in its own. Of
the workers, 70 % know the newest version, 20 % the one before and 10 % one that is three rounds old. In `growth` the file
gains columns until it has 99 % of every concept; in `capped` (3,000 concepts) it may have 32 a side and is rotated again
and again, so that old patches must be re-expressed through the version they were learned against. Retention is measured
against the drawn updates themselves. Times are CPU seconds.
"""

from __future__ import annotations

import json
import random
import resource
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from share_diffusion.asynchronous import merge_patches
from share_diffusion.capacity import Capacity
from share_diffusion.describe import BYTES
from share_diffusion.file import listing, load
from share_diffusion.lora import Factors, LoRA
from share_diffusion.patch import make_patch, read_patch, write_patch
from share_diffusion.subspace import Subspace

RESULT = Path(__file__).parent / "results" / "many_workers.json"
SHAPES = {"unet.q": (128, 128), "unet.k": (64, 128)}
PLANS = {"growth": (10_000, Capacity(retain=0.99)), "capped": (3_000, Capacity(retain=None, rank=32))}
SHARED, RANK, OWN = 24, 4, 0.03
WORKERS = 1000


@dataclass
class World:
    """What all concepts share: directions (side, SHARED) of every layer, columns of fixed decaying strength."""

    sides: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        strength = 0.9 ** torch.arange(SHARED)
        for layer, (out, width) in SHAPES.items():
            pair = [torch.linalg.qr(torch.randn(side, SHARED, generator=generator))[0] * strength for side in (out, width)]
            self.sides[layer] = pair[0], pair[1]

    def concept(self, seed: int) -> LoRA:
        """Return the update of one concept."""
        generator = torch.Generator().manual_seed(seed + 1)
        layers = {}
        for layer, sides in self.sides.items():
            up, down = (self.side(shared, generator) for shared in sides)
            layers[layer] = Factors(up, down.mT)
        return LoRA(layers, {})

    def side(self, shared: Tensor, generator: torch.Generator) -> Tensor:
        """Return one factor (side, RANK): mostly shared directions, a little of its own."""
        inside = shared @ torch.randn(SHARED, RANK, generator=generator)
        own = torch.randn(shared.shape[0], RANK, generator=generator)
        return inside / inside.norm() * (1 - OWN / 2) ** 0.5 + own / own.norm() * (OWN / 2) ** 0.5


def true_retention(subspace: Subspace, name: str, lora: LoRA) -> float:
    """Return 1 - ||dW - held||^2 / ||dW||^2 against the update as it was drawn."""
    held = subspace.lora(name)
    error = 0.0
    for layer, factors in lora.layers.items():
        both = held.layers.get(layer)
        error += float((factors.dense() - (both.dense() if both else 0)).square().sum())
    return 1 - error / lora.norm**2


def simulate(concepts: int, capacity: Capacity, folder: Path) -> dict[str, Any]:
    """Run the rounds and return what they cost and kept."""
    world, versions, rounds, order = World(), [Subspace()], [], random.Random(0)
    patch_bytes = 0
    for first in range(0, concepts, WORKERS):
        started, patches, stale = time.process_time(), [], 0
        for number in range(first, first + WORKERS):
            age = order.choices((1, 2, 4), (70, 20, 10))[0]
            known = versions[max(len(versions) - age, 0)]
            stale += known is not versions[-1]
            patches.append(make_patch(known, f"c{number:05d}", world.concept(number)))
        write_patch(patches[0], folder / f"{first}.patch.safetensors")
        patch_bytes = (folder / f"{first}.patch.safetensors").stat().st_size
        patches[0] = read_patch(folder / f"{first}.patch.safetensors")
        order.shuffle(patches)
        learned = time.process_time()
        merged = merge_patches(versions[-1], patches, capacity=capacity, against=versions[-2:-6:-1])
        done = time.process_time()
        file = folder / f"{first}.safetensors"
        merged.save(file, replace=True)
        versions.append(load(file))
        saved = time.process_time()
        names = order.sample(list(merged.concepts), 50)
        kept = [true_retention(versions[-1], name, world.concept(int(name[1:]))) for name in names]
        rounds.append(
            {
                "concepts": len(merged.concepts),
                "stale_patches": stale,
                "making_patches_s": round(learned - started, 2),
                "merge_s": round(done - learned, 2),
                "save_and_load_s": round(saved - done, 2),
                "columns": [max(basis.rank) for basis in merged.layers.values()],
                "patch_bytes": patch_bytes,
                "file_bytes": file.stat().st_size,
                "true_retention_mean": round(sum(kept) / len(kept), 4),
                "true_retention_worst": round(min(kept), 4),
                "stored_retention_worst": round(min(concept.retention for concept in merged.concepts.values()), 4),
            }
        )
        print(json.dumps(rounds[-1]), flush=True)
    started = time.process_time()
    listing(file)
    lora_bytes = BYTES * RANK * sum(map(sum, SHAPES.values()))
    return {"rounds": rounds, "listing_s": round(time.process_time() - started, 3), "as_separate_loras": concepts * lora_bytes}


def main() -> None:
    result: dict[str, Any] = {"workers": WORKERS, "layers": SHAPES, "rank": RANK, "threads": torch.get_num_threads()}
    for name, (concepts, capacity) in PLANS.items():
        print(name, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            result[name] = simulate(concepts, capacity, Path(folder))
    result["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
