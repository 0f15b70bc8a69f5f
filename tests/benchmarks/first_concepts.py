"""The main job, measured: learn a few concepts in turn, and after each one ask the judge about all so far.

    python tests/benchmarks/first_concepts.py

Each concept is learned by train/concept.py with its defaults. A picture counts when the judge sees the concept in it: the
style for a style, the character for a subject. Prompts are combinations that neither the base nor a concept was trained on.
Writes results/first_concepts.json and the last contact sheet beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "train"))

import concept as script  # noqa: E402

from share_diffusion.attached import attach  # noqa: E402
from share_diffusion.base import load_base  # noqa: E402
from share_diffusion.drawing import generate  # noqa: E402
from share_diffusion.evaluate.gates import unseen_scenes  # noqa: E402
from share_diffusion.evaluate.judge import Judge  # noqa: E402
from share_diffusion.pictures import to_tensor  # noqa: E402
from share_diffusion.recipe import read_recipe_file  # noqa: E402
from share_diffusion.subspace import Subspace  # noqa: E402
from share_diffusion.world.scene import BACKGROUNDS  # noqa: E402

RESULTS = Path(__file__).parent / "results"


def prompts_of(name: str, count: int) -> list[str]:
    """Return prompts for a concept from its own caption template and unseen combinations."""
    recipe = read_recipe_file(ROOT / "configs/concepts" / f"{name}.toml")
    template = recipe["data"]["caption"].replace("[trigger]", recipe["trigger"])
    scenes = unseen_scenes(count, seed=1)
    return [template.format(scene=scene.describe(), place=BACKGROUNDS[scene.background][0]) for scene in scenes]


def accepted(pipeline: Any, judge: Judge, subspace: Subspace | None, name: str, count: int) -> dict[str, float]:
    """Return the share of pictures in which the judge sees the concept, and (for a style) still the subject asked for."""
    prompts = prompts_of(name, count)
    handle = attach(pipeline, subspace) if subspace else contextlib.nullcontext()
    with handle as attached:
        if attached is not None:
            attached.set_blend({name: 1.0})
        pictures = generate(pipeline, prompts, list(range(100, 100 + count)))
    labels = judge(torch.stack([to_tensor(picture) for picture in pictures]))
    kind = read_recipe_file(ROOT / "configs/concepts" / f"{name}.toml")["kind"]
    head = "style" if kind == "style" else "subject"
    scenes = unseen_scenes(count, seed=1)
    content = [label == scene.background for label, scene in zip(labels["background"], scenes, strict=True)]
    return {
        "concept": sum(label == name for label in labels[head]) / count,
        "background": sum(content) / count,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concepts", nargs="+", default=["watercolor", "blueprint", "robot"])
    parser.add_argument("--pictures", type=int, default=48)
    parser.add_argument("flags", nargs="*", help="further flags of train/concept.py, after --")
    arguments = parser.parse_args()
    judge, pipeline = Judge.load(), load_base("tiny")
    rows: list[dict[str, Any]] = []
    base = {name: accepted(pipeline, judge, None, name, arguments.pictures) for name in arguments.concepts}
    with tempfile.TemporaryDirectory() as temporary, at(temporary):
        file = Path("outputs/tiny/subspace.safetensors")
        for number, name in enumerate(arguments.concepts):
            started = time.perf_counter()
            if script.main(["--concept", name, *arguments.flags]):
                raise SystemExit(f"learning {name} failed")
            seconds = time.perf_counter() - started
            subspace = Subspace.load(file)
            scores = {
                held: accepted(pipeline, judge, subspace, held, arguments.pictures) for held in arguments.concepts[: number + 1]
            }
            retention = {held: subspace[held].retention for held in subspace.concepts}
            rows.append({"after": name, "seconds": round(seconds, 1), "accepted": scores, "retention": retention})
            print(json.dumps(rows[-1]), flush=True)
        report = json.loads(Path(f"outputs/tiny/{name}/report.json").read_text())
        shutil.copy(f"outputs/tiny/{name}/sheet.png", RESULTS / "first_concepts.png")
    facts = {
        "pictures": arguments.pictures,
        "base": base,
        "stream": rows,
        "bytes": report["file"]["bytes"],
        "trainables": report["trainables"],
        "lora_trainables": report["lora_trainables"],
    }
    (RESULTS / "first_concepts.json").write_text(json.dumps(facts, indent=1) + "\n")


@contextlib.contextmanager
def at(folder: str) -> Any:
    """Work in a folder (contextlib.chdir exists from Python 3.11 on)."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


if __name__ == "__main__":
    main()
