"""Which way of learning a concept is best here: every mode of adaptation on the same concepts, steps and noise.

    python tests/benchmarks/adaptation.py

A subspace is started from a few concepts, then new ones are learned in every mode. The score is the share of an
ordinary LoRA's gain in loss at fixed noise on pictures that were not trained on: 0 is the untouched base, 1 the
concept's own LoRA with the same pictures and steps. Everything runs in one process; the table goes to results/.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from share_diffusion.adapt import Adaptation, Learner, gradient_directions, make_learner
from share_diffusion.attached import Attached, attach
from share_diffusion.base import load_base
from share_diffusion.capacity import Capacity
from share_diffusion.data import read_dataset
from share_diffusion.learning import (
    Denoiser,
    Frozen,
    Materials,
    denoising_loss,
    fixed_noise_loss,
    freeze,
    prepare,
    rate_factor,
)
from share_diffusion.lora import LoRA
from share_diffusion.models.identity import identify
from share_diffusion.models.layers import select, shape_of
from share_diffusion.objective import Draw, draw
from share_diffusion.subspace import Subspace
from share_diffusion.world.render import render_folder

RESULT = Path(__file__).parent / "results" / "adaptation.json"
CPU = torch.device("cpu")
CAPTIONS = {"robot": "a [trigger] {place}", "owl": "a [trigger] {place}"}
WAYS: dict[str, tuple[Adaptation, float]] = {
    "lora r 8, rate 2e-3": (Adaptation("lora", rank=8), 2e-3),
    "lora r 8, rate 4e-3": (Adaptation("lora", rank=8), 4e-3),
    "gradient p 4 phi 4, rate 1e-2": (Adaptation("gradient", 4, 4), 1e-2),
    "gradient p 4 phi 4, rate 2e-2": (Adaptation("gradient", 4, 4), 2e-2),
    "gradient p 4 phi 4, rate 4e-2": (Adaptation("gradient", 4, 4), 4e-2),
    "gradient p 8 phi 8, rate 2e-2": (Adaptation("gradient", 8, 8), 2e-2),
    "coefficients p 4, rate 2e-2": (Adaptation("coefficients", 4), 2e-2),
    "temporary p 4 phi 4, rate 2e-2": (Adaptation("temporary", 4, 4), 2e-2),
    "hybrid p 4 phi 2, rate 2e-2": (Adaptation("hybrid", 4, 2), 2e-2),
}


def materials(pipeline: Any, concept: str, folder: Path, pictures: int, seed: int) -> Materials:
    """Draw a concept's pictures into a folder and encode them."""
    place = folder / f"{concept}-{seed}"
    render_folder(concept, place, pictures, seed, CAPTIONS.get(concept, "[trigger] painting of {scene}"))
    return prepare(pipeline, read_dataset(place, trigger=concept), 64)


def draws(pipeline: Any, data: Materials, count: int, batch: int, seed: int) -> list[Draw]:
    """Return steps' pictures, times and noise."""
    return [draw(pipeline, len(data), batch, tuple(data.latents.shape[1:]), seed, step) for step in range(count)]


def learn(
    pipeline: Any, subspace: Subspace | None, data: Materials, adaptation: Adaptation, rate: float, steps: int, batch: int
) -> tuple[Learner, float]:
    """Learn one concept and return the learner and the seconds it took."""
    modules = select(pipeline)
    bases = dict(subspace.layers) if subspace else {}
    started = time.perf_counter()
    with Attached(pipeline, sorted(modules)) as attached:
        directions: Mapping[str, Any] = {}
        if adaptation.looks_at_gradient:
            looks = draws(pipeline, data, 8, batch, 77)
            frozen = Frozen(pipeline)
            directions = gradient_directions(
                attached,
                bases,
                adaptation.temporary_rank,
                lambda index: denoising_loss(frozen, pipeline, data, looks[index], CPU).mean(),
                8,
                0,
            )
        learner = make_learner(modules, bases, adaptation, directions, 0)
        model = Denoiser(learner, pipeline, attached)
        optimizer = torch.optim.AdamW(learner.parameter_groups(rate, min(rate, 4e-3)), betas=(0.9, 0.99), weight_decay=0.0)
        rates = [group["lr"] for group in optimizer.param_groups]
        for step, drawn in enumerate(draws(pipeline, data, steps, batch, 0)):
            for group, highest in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = highest * rate_factor("cosine", step, steps, 10)
            optimizer.zero_grad()
            denoising_loss(model, pipeline, data, drawn, CPU).mean().backward()
            torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
            optimizer.step()
    return learner, time.perf_counter() - started


def held_out_loss(pipeline: Any, lora: LoRA | None, data: Materials) -> float:
    """Return the loss at fixed noise on unseen pictures, with a concept active or with none."""
    fixed = draws(pipeline, data, 6, 16, 123)
    if lora is None:
        return fixed_noise_loss(Frozen(pipeline), pipeline, data, fixed, CPU)
    with attach(pipeline, Subspace.fit({"c": lora}, capacity=Capacity(retain=1.0))) as handle:
        handle.set_blend("c")
        return fixed_noise_loss(Frozen(pipeline), pipeline, data, fixed, CPU)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", nargs="+", default=["blueprint", "watercolor", "thermal"])
    parser.add_argument("--new", nargs="+", default=["neon", "robot"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--only", nargs="*", help="parts of names of the ways to run")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = load_base("tiny")
    freeze(pipeline)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        firsts = {name: materials(pipeline, name, folder, 24, 1) for name in arguments.first}
        way, rate = Adaptation("gradient", 4, 8), 2e-2
        subspace = Subspace(base=identify(pipeline, "tiny"))
        for name, data in firsts.items():
            learner, _ = learn(pipeline, subspace, data, way, rate, arguments.steps, arguments.batch)
            subspace = subspace.merge({name: learner.lora()})
        for concept in arguments.new:
            data, unseen = (materials(pipeline, concept, folder, count, seed) for count, seed in ((24, 1), (48, 2)))
            base, scale = held_out_loss(pipeline, None, unseen), 0.0
            for name, (adaptation, rate) in WAYS.items():
                if arguments.only and name != next(iter(WAYS)) and not any(part in name for part in arguments.only):
                    continue
                learner, seconds = learn(pipeline, subspace, data, adaptation, rate, arguments.steps, arguments.batch)
                merged = subspace.merge({concept: learner.lora()})
                loss = held_out_loss(pipeline, merged.lora(concept), unseen)
                scale = scale or base - loss
                columns = sum(
                    2 * (after.alpha.numel() + after.beta.numel() - before.alpha.numel() - before.beta.numel())
                    for after, before in ((merged.layers[path], subspace.layers[path]) for path in merged.layers)
                )
                row = {
                    "concept": concept,
                    "way": name,
                    "score": round((base - loss) / scale, 3),
                    "trainables": learner.trainables,
                    "bytes": 2 * merged[concept].numbers + columns,
                    "retention": round(merged[concept].retention, 4),
                    "seconds": round(seconds, 1),
                }
                rows.append(row)
                print(json.dumps(row), flush=True)
    total = sum(sum(shape_of(module)[0]) for module in select(pipeline).values())
    facts = {"steps": arguments.steps, "batch": arguments.batch, "first": arguments.first, "lora_rank_1": total, "rows": rows}
    RESULT.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
