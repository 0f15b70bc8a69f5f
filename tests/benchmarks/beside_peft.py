"""Steps per second and memory of learning a concept, beside diffusers with peft doing the same work.

    python tests/benchmarks/beside_peft.py

The same pictures, layers (attention of denoiser and text encoder), batch and precision; both keep the latents and encode
the captions in every step, as a text encoder in training needs. Ours learns in each mode through `loop.learning`, the
other side is the loop of the diffusers examples around peft's LoRA layers (foreign.py). Every side runs in a process of
its own, the sides take turns, and a ratio is of two neighbours; memory is the process's highest. Told are the means over
the rounds of the ratios to the other side (below 1: less than diffusers with peft).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean

import torch

from share_diffusion.base import load_base
from share_diffusion.world.render import render_folder

RESULT = Path(__file__).parent / "results" / "beside_peft.json"
SIDES = ("peft", "lora", "coefficients", "gradient")
WARM = 3


def ours(mode: str, pictures: Path, steps: int, batch: int) -> list[float]:
    """Return the seconds of each step of this library's loop."""
    from share_diffusion.adapt import Adaptation
    from share_diffusion.data import read_dataset
    from share_diffusion.learning import denoising_loss
    from share_diffusion.loop import learning, opened
    from share_diffusion.models.identity import identify
    from share_diffusion.picture_set import prepare_pictures
    from share_diffusion.step import draw_step
    from share_diffusion.subspace import Origin, Subspace

    pipeline = load_base("tiny")
    data = prepare_pictures(pipeline, read_dataset(pictures), 64)
    origin = Origin("random", 24, 0) if mode == "coefficients" else Origin("adapters", 0, 0)
    subspace = opened(pipeline, Subspace(base=identify(pipeline, "tiny"), origin=origin), "attention")
    seconds = []
    with learning(pipeline, subspace, data, Adaptation(mode), "attention", batch=batch) as (learner, model):
        optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-3)
        for step in range(steps):
            started = time.perf_counter()
            loss = denoising_loss(model, pipeline, data, draw_step(pipeline, data, batch, 0, step), pipeline.device).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - started)
    return seconds


def theirs(pictures: Path, steps: int, batch: int) -> list[float]:
    """Return the seconds of each step of the loop around peft's layers."""
    from foreign import train_foreign

    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        train_foreign(load_base("tiny"), pictures, Path(folder), 0, steps=steps, batch=batch, timed=seconds.append)
    return seconds


def run_side(side: str, pictures: Path, steps: int, batch: int) -> None:
    """Train in this process and print the median step and the highest memory."""
    torch.set_num_threads(1)
    seconds = (theirs if side == "peft" else lambda *rest: ours(side, *rest))(pictures, steps, batch)
    middle = sorted(seconds[WARM:])[len(seconds[WARM:]) // 2]
    print(json.dumps({"seconds": middle, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--pictures", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        return run_side(arguments.side, arguments.pictures, arguments.steps, arguments.batch)
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / "pictures"
        render_folder("watercolor", pictures, 24, 1, "watercolor painting of {scene}")
        for number in range(arguments.rounds):
            told = {}
            for side in SIDES if number % 2 == 0 else SIDES[::-1]:
                words = [sys.executable, __file__, "--side", side, "--pictures", str(pictures)]
                words += ["--steps", str(arguments.steps), "--batch", str(arguments.batch)]
                done = subprocess.run(words, capture_output=True, text=True, check=True)
                told[side] = json.loads(done.stdout.strip().splitlines()[-1])
                print(f"round {number}: {side} {told[side]}", flush=True)
            rounds.append(told)
    facts = {
        "batch": arguments.batch,
        "steps": arguments.steps,
        "rounds": rounds,
        "time_over_peft": {side: round(mean(r[side]["seconds"] / r["peft"]["seconds"] for r in rounds), 3) for side in SIDES},
        "memory_over_peft": {
            side: round(mean(r[side]["peak_mib"] / r["peft"]["peak_mib"] for r in rounds), 3) for side in SIDES
        },
    }
    RESULT.write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))
    return None


if __name__ == "__main__":
    main()
