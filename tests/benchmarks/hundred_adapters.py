"""A library of a hundred LoRAs of SDXL's true shapes and mixed ranks, folded in one file at a time.

    python tests/benchmarks/hundred_adapters.py

The files are made up: in every layer a concept has half of its directions from a pool that all of them draw on (what
real adapters of one base have in common) and half of its own, with falling singular values; norms differ a hundredfold,
ranks go from 4 to 64. Random matrices would share nothing, and a hundred of them fit no small file. What is measured is
the streaming: seconds a file, the most memory held beyond what making the files took, and what is left of the worst concept
in the end, when every file has been read once more and told in the final bases.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
from merge_cost import shapes

from share_diffusion import intake
from share_diffusion.capacity import Capacity, parse_bytes
from share_diffusion.describe import describe
from share_diffusion.intake import Source, take_in
from share_diffusion.lora import Factors, LoRA
from share_diffusion.subspace import Subspace

RESULT = Path(__file__).parent / "results" / "hundred_adapters.json"
RANKS = (4, 8, 16, 32, 64)
POOL = 24  # directions a side and layer that the concepts have in common


def made_up(seed: int, rank: int, layers: dict[str, tuple[int, int]]) -> LoRA:
    """Return a LoRA whose directions are half the pool's, half its own, with singular values 1 / (1 + i)."""
    own = torch.Generator().manual_seed(seed)
    made = {}
    for number, (layer, (out, into)) in enumerate(layers.items()):
        pool = torch.Generator().manual_seed(10**9 + number)
        sides = []
        for side in (out, into):
            common = torch.randn(side, POOL, generator=pool) / side**0.5
            mixed = common @ torch.randn(POOL, rank, generator=own) / POOL**0.5
            sides.append(mixed + 0.3 * torch.randn(side, rank, generator=own) / side**0.5)
        values = 1 / (1 + torch.arange(rank)) * 10 ** (2 * (seed % 7) / 6)
        made[layer] = Factors(sides[0] * values, sides[1].mT)
    return LoRA(made)


def peak() -> int:
    """Return the most memory this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--basis_rank", type=int, default=48)
    parser.add_argument("--budget", help="instead of a basis rank")
    parser.add_argument("--pseudo_rank", type=int, default=8)
    parser.add_argument("--layers", type=int, help="only so many of SDXL's 736 attention projections, evenly chosen")
    parser.add_argument("--result", type=Path, default=RESULT)
    arguments = parser.parse_args()
    every = shapes()
    names = list(every)
    count = arguments.layers or len(names)
    layers = {name: every[name] for name in (names[number * len(names) // count] for number in range(count))}
    capacity = Capacity(
        0.999, None if arguments.budget else arguments.basis_rank, parse_bytes(arguments.budget) if arguments.budget else None
    )
    ranks = [RANKS[number % len(RANKS)] for number in range(arguments.adapters)]
    intake.JOINT_LIMIT = 0  # one at a time from the first file on, as a folder of large files is
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for number, rank in enumerate(ranks):
            found.append(Source(f"a{number:03d}", Path(folder) / f"a{number:03d}.safetensors"))
            made_up(number, rank, layers).write(found[-1].path)
        largest, before = max(source.path.stat().st_size for source in found), peak()
        marks = [time.process_time()]

        def told(done: int, whole: int) -> None:
            marks.append(time.process_time())
            print(f"{done} of {whole}: {marks[-1] - marks[-2]:.1f} CPU s", flush=True)

        merged, _ = take_in(Subspace(), found, capacity, pseudo_rank=arguments.pseudo_rank, progress=told)
        settling = time.process_time() - marks[-1]
        seconds = [later - sooner for sooner, later in pairwise(marks)]
        merged.save(Path(folder) / "library.safetensors")
        sizes = describe_sizes(merged, Path(folder) / "library.safetensors")
    retentions = sorted(concept.retention for concept in merged.concepts.values())
    facts = {
        "adapters": len(ranks),
        "layers": len(layers),
        "ranks": sorted(set(ranks)),
        "basis_rank": capacity.rank,
        "budget": capacity.budget,
        "pseudo_rank": arguments.pseudo_rank,
        "cpu_seconds": {
            "first": round(seconds[0], 2),
            "last": round(seconds[-1], 2),
            "all": round(sum(seconds)),
            "read_again": round(settling),
        },
        "peak_mib": peak(),
        "peak_above_start_mib": peak() - before,
        "largest_file_mib": round(largest / 2**20, 1),
        "bytes": sizes,
        "retention": {"worst": round(retentions[0], 4), "median": round(retentions[len(retentions) // 2], 4)},
    }
    arguments.result.write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


def describe_sizes(subspace: Subspace, file: Path) -> dict[str, int]:
    """Return the sizes that `show` tells."""
    return describe(subspace, file)["bytes"]


if __name__ == "__main__":
    main()
