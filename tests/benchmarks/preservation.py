"""What preservation is worth: one concept learned beside earlier ones with rising --preserve_weight.

    python tests/benchmarks/preservation.py

A subject is learned into a copy of the shipped file that holds two styles, by train/concept.py, once for each weight. Then:

learned    the judge's share of pictures of the new concept at unseen prompts, and its held-out loss
base       how far it moves the prediction on plain pictures whose captions do not name it, as a part of how far it moves
           the prediction on its own held-out pictures (mean square over mean square; 0: it stays out of the way)
styles     the same beside each earlier style at weight 1, on that style's held-out pictures and captions
style kept the share of pictures at a style's prompts in which the judge sees the style, with the new concept at weight 1
           beside it but not in the words
joint      style x subject: both in the words, the judge sees both

Writes results/preservation.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "train")]

import concept as script  # noqa: E402
from blending import WAYS, joint, labels, prompts, share  # noqa: E402
from stream.plan import Measures, Plan  # noqa: E402
from stream.workbench import Workbench, unseen  # noqa: E402

from share_diffusion.attached import AttachedSubspace, attach  # noqa: E402
from share_diffusion.base import TINY  # noqa: E402
from share_diffusion.data import read_dataset  # noqa: E402
from share_diffusion.drawing import Sampling, generate  # noqa: E402
from share_diffusion.evaluate.gates import unseen_scenes  # noqa: E402
from share_diffusion.learning import Frozen, Materials, prepare  # noqa: E402
from share_diffusion.objective import add_noise  # noqa: E402
from share_diffusion.subspace import Subspace  # noqa: E402
from share_diffusion.world.render import render  # noqa: E402

RESULT = HERE / "results" / "preservation.json"
WEIGHTS = (0.0, 1.0, 10.0)
SAMPLING = Sampling(steps=25, guidance_scale=2.0)


def plain(bench: Workbench, count: int) -> Materials:
    """Return plain pictures of unseen combinations, with their own captions."""
    folder = bench.folder / "plain"
    folder.mkdir(parents=True, exist_ok=True)
    for index, scene in enumerate(unseen_scenes(count, seed=3)):
        render(scene).picture.save(folder / f"{index:03d}.png")
        (folder / f"{index:03d}.txt").write_text(scene.describe(), encoding="utf-8")
    return prepare(bench.pipeline, read_dataset(folder), 64)


def moved(bench: Workbench, handle: AttachedSubspace, without: str, beside: str, data: Materials) -> float:
    """Return the mean squared change of the prediction from one blend to another, at fixed noise."""
    changes = []
    for step in range(3):
        drawn = bench.draw(data, 16, 7, step)
        noisy = add_noise(bench.pipeline, data.latents_of(drawn, bench.device), drawn.noise, drawn.times)
        predicted = []
        for blend in (without, beside):
            handle.set_blend(blend)
            with torch.no_grad():
                predicted.append(Frozen(bench.pipeline)(noisy, drawn.times, data.conditions_of(drawn, bench.device)))
        changes.append(float((predicted[0] - predicted[1]).square().mean()))
    return mean(changes)


def measure(bench: Workbench, file: Path, new: str, styles: list[str], count: int) -> dict[str, Any]:
    """Return what one file shows of the new concept and of the styles beside it."""
    subspace = Subspace.load(file)
    bench.attached.detach()
    own = [caption for _, caption in unseen(new, count, 9_002)]
    with attach(bench.pipeline, subspace) as handle:
        scale = moved(bench, handle, "", new, bench.held_out(new))
        row: dict[str, Any] = {
            "base": round(moved(bench, handle, "", new, plain(bench, 48)) / scale, 4),
            "styles": {
                style: round(moved(bench, handle, style, f"{style} + {new}", bench.held_out(style)) / scale, 4)
                for style in styles
            },
        }
        handle.set_blend(new)
        drawn = generate(bench.pipeline, own, list(range(600, 600 + count)), SAMPLING)
        row["learned"] = share([label == new for label in labels(bench.judge, drawn)["subject"]])
        row["style_kept"] = {}
        for style in styles:
            handle.set_blend(f"{style} + {new}")
            drawn = generate(bench.pipeline, prompts(style, None, count), list(range(700, 700 + count)), SAMPLING)
            row["style_kept"][style] = share([label == style for label in labels(bench.judge, drawn)["style"]])
        found, _ = joint(handle, bench.judge, [(style, new) for style in styles], count, SAMPLING, WAYS["summed"])
        row["joint"] = {name: entry["joint"] for name, entry in found.items()}
    bench.attach()
    row["loss"] = round(bench.loss(subspace.lora(new), new), 5)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--styles", nargs="+", default=["watercolor", "ink"])
    parser.add_argument("--new", default="owl")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--weights", type=float, nargs="+", default=WEIGHTS)
    parser.add_argument("--work", type=Path, default=Path("outputs/benchmarks/preservation"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    held = Subspace.load(TINY.parent / "concepts.safetensors")
    for name in [name for name in held.concepts if name not in arguments.styles]:
        held = held.drop(name)
    bench = Workbench(Plan("preservation", (), {}, measures=Measures(curve=())), work)
    rows = {}
    for weight in arguments.weights:
        file = work / f"{arguments.new}-{weight:g}.safetensors"
        if not file.exists():
            part = work / "learning.safetensors"
            held.save(part, replace=True)
            here = Path.cwd()
            os.chdir(work)
            words = ["--concept", arguments.new, "--subspace", str(part), "--preserve_weight", str(weight), "--no-sheet"]
            status = script.main([*words, "--max_train_steps", str(arguments.steps), "--output_dir", f"out-{weight:g}"])
            os.chdir(here)
            if status:
                raise SystemExit(status)
            shutil.move(part, file)
        rows[f"{weight:g}"] = measure(bench, file, arguments.new, arguments.styles, arguments.pictures)
        print(weight, json.dumps(rows[f"{weight:g}"]), flush=True)
    facts = {"new": arguments.new, "steps": arguments.steps, "pictures": arguments.pictures, "by_weight": rows}
    RESULT.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
