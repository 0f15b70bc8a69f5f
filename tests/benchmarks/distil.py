"""Whether a LoRA from elsewhere can live in a subspace that was made without it, by its weights and by what it does.

    python tests/benchmarks/distil.py

A trainer that shares nothing with this library (foreign.py: diffusers and peft, a seed of its own for each) makes a LoRA
of rank 8 of every concept. Three of them are fitted into bases of k columns; each of the others is then projected onto
those bases, and distilled into them, from latents that the teacher draws and from latents that the base draws. Every
share is of the teacher's effect on the prediction, at noise, prompts and latents that were not trained on; the prompts
are the concept's own captions with unseen scenes. `--work FOLDER` keeps the LoRAs between runs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from foreign import train_foreign
from stream.workbench import ROOT, unseen

from share_diffusion.base import load_base
from share_diffusion.capacity import Capacity
from share_diffusion.distil import Distillation, distil
from share_diffusion.evaluate.gates import unseen_scenes
from share_diffusion.learning import freeze
from share_diffusion.lora import LoRA
from share_diffusion.recipe import read_recipe_file
from share_diffusion.subspace import Subspace
from share_diffusion.world.render import render_folder

RESULT = Path(__file__).parent / "results" / "distil.json"
PICTURES = 24


def foreign(pipeline: Any, name: str, work: Path) -> LoRA:
    """Return a concept's LoRA, trained elsewhere unless it is in the folder already."""
    file = work / "foreign" / name / "pytorch_lora_weights.safetensors"
    if not file.is_file():
        pictures, recipe = work / "pictures" / name, read_recipe_file(ROOT / "configs/concepts" / f"{name}.toml")
        if not pictures.is_dir():
            caption = recipe["data"]["caption"].replace("[trigger]", recipe["trigger"])
            render_folder(recipe["data"]["world"], pictures, PICTURES, 1, caption)
        train_foreign(pipeline, pictures, file.parent, seed=1000 + sum(map(ord, name)))
    return LoRA.read(file)


def prompts_of(name: str) -> list[str]:
    """Return captions of a concept in scenes that nothing was trained on, and as many of scenes without it."""
    return [*(caption for _, caption in unseen(name, 16, 3)), *(scene.describe() for scene in unseen_scenes(16, seed=3))]


def measured(pipeline: Any, subspace: Subspace, name: str, lora: LoRA, settings: Distillation) -> dict[str, Any]:
    """Return one row of the table."""
    started = time.process_time()
    student = distil(pipeline, subspace, lora, prompts_of(name), settings)
    merged = subspace.merge({name: student.lora}, capacity=Capacity(retain=0.9999))
    columns = sum(
        basis.alpha.numel() + basis.beta.numel() - subspace.layers[layer].alpha.numel() - subspace.layers[layer].beta.numel()
        for layer, basis in merged.layers.items()
    )
    numbers = sum(entry.up.numel() + entry.down.numel() for entry in lora.layers.values())
    cost = merged[name].numbers + columns
    return {
        "concept": name,
        "source": settings.source,
        "pseudo_rank": settings.pseudo_rank,
        "weights_projected": round(student.weights, 3),
        "effect_projected": round(student.projected, 3),
        "effect_distilled": round(student.functional, 3),
        "columns": student.columns,
        "numbers": cost,
        "lora_numbers": numbers,
        "bytes_over_lora": round(cost / numbers, 3),
        "cpu_seconds": round(time.process_time() - started),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", nargs="+", default=["blueprint", "watercolor", "thermal"])
    parser.add_argument("--new", nargs="+", default=["neon", "mosaic", "robot"])
    parser.add_argument("--sources", nargs="+", default=["teacher", "base"])
    parser.add_argument("--basis_rank", type=int, default=16)
    parser.add_argument("--pseudo_rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--work", type=Path, help="a folder that keeps pictures and LoRAs")
    parser.add_argument("--result", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = load_base("tiny")
    freeze(pipeline)
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        firsts = {name: foreign(pipeline, name, work) for name in arguments.first}
        subspace = Subspace.fit(firsts, capacity=Capacity(retain=None, rank=arguments.basis_rank))
        rows = []
        for name in arguments.new:
            lora = foreign(pipeline, name, work)
            for source in arguments.sources:
                settings = Distillation(arguments.steps, pseudo_rank=arguments.pseudo_rank, source=source, directions=0)
                rows.append(measured(pipeline, subspace, name, lora, settings))
                print(json.dumps(rows[-1]), flush=True)
    facts = {
        "first": {name: round(concept.retention, 4) for name, concept in subspace.concepts.items()},
        "basis_rank": arguments.basis_rank,
        "steps": arguments.steps,
        "layers": len(subspace.layers),
        "rows": rows,
    }
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
