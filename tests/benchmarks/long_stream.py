"""Fifty concepts in one file: what happens to the first ten, to the file, and to the time a merge takes.

    python tests/benchmarks/long_stream.py                      # goes on where it stopped
    python tests/benchmarks/long_stream.py --steps 40 --most 20

The stream begins with the ten concepts of the continual benchmark (its lessons of seed 0 are taken where they are there),
goes on with the other styles and subjects of the picture world, and then with subjects drawn in a style. Every concept is
folded into the file that a user would have, through that file. After every tenth one the held-out loss of each of the
first ten is measured again, with the coefficients that the file holds then. Later concepts learn for fewer steps: they are
there to be in the way. Writes results/long_stream.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import torch  # noqa: E402
from stream.plan import METHOD_KEYS, read_plan  # noqa: E402
from stream.separate import file_bytes, own_lora  # noqa: E402
from stream.shared import FILE, ShareStream  # noqa: E402
from stream.workbench import ROOT, Workbench  # noqa: E402

from share_diffusion.data import Dataset, read_dataset  # noqa: E402
from share_diffusion.layer import Update  # noqa: E402
from share_diffusion.recipe import read_recipe_file  # noqa: E402
from share_diffusion.subspace import Subspace  # noqa: E402
from share_diffusion.world.characters import CHARACTERS  # noqa: E402
from share_diffusion.world.render import PLACES, render_blend  # noqa: E402
from share_diffusion.world.scene import BACKGROUNDS  # noqa: E402
from share_diffusion.world.styles import STYLES  # noqa: E402

RESULT = HERE / "results" / "long_stream.json"
PICTURES = 24  # of a subject in a style
FIRST = 10
BETWEEN = " in "  # a subject in a style, as a concept's name


def stream(first: tuple[str, ...], most: int) -> list[str]:
    """Return the concepts in their order."""
    names = [*first, *(name for name in sorted([*STYLES, *CHARACTERS]) if name not in first)]
    names += [f"{subject}{BETWEEN}{style}" for style, subject in product(sorted(STYLES), sorted(CHARACTERS))]
    return names[:most]


class LongBench(Workbench):
    """A workbench that also knows subjects drawn in a style."""

    def dataset(self, concept: str) -> Dataset:
        """Return a concept's training pictures and captions."""
        if BETWEEN not in concept:
            return super().dataset(concept)
        subject, style = concept.split(BETWEEN)
        place = self.folder / "data" / concept.replace(" ", "-")
        if not place.exists():
            part = place.with_suffix(".part")
            part.mkdir(parents=True, exist_ok=True)
            words = read_recipe_file(ROOT / "configs/concepts" / f"{subject}.toml")["data"]["caption"]
            for index in range(PICTURES):
                background = PLACES[subject][index % len(PLACES[subject])]
                render_blend(style, subject, background, 1, index).picture.save(part / f"{index:03d}.png")
                (part / f"{index:03d}.txt").write_text(words.format(place=BACKGROUNDS[background][0]), encoding="utf-8")
            part.rename(place)
        return read_dataset(place, trigger=concept)

    def watch(self, updates: Mapping[str, Sequence[Update]], concept: str) -> float:
        """Return the held-out loss on a few draws; subjects in a style are not looked at."""
        return 0.0 if BETWEEN in concept else super().watch(updates, concept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=50, help="concepts in all")
    parser.add_argument("--steps", type=int, default=40, help="of every concept after the first ten")
    parser.add_argument("--work", type=Path, default=Path("outputs/benchmarks/continual"), help="where lessons are kept")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    plan = read_plan(HERE / "continual.toml")
    names = stream(plan.concepts, arguments.most)
    bench = LongBench(plan, arguments.work / plan.name)
    later = replace(plan, training=replace(plan.training, steps=arguments.steps), measures=replace(plan.measures, curve=()))
    settings = {key: value for key, value in plan.methods["share"].items() if key not in METHOD_KEYS}
    method, rows = ShareStream(bench, 0, **settings), []
    for number, name in enumerate(names, start=1):
        bench.plan = plan if number <= FIRST else later
        method.learn(name)
        row: dict[str, Any] = {"concepts": number, "learned": name, "file_bytes": method.file_bytes}
        row["merge_seconds"] = round(method.merge_seconds, 3)
        bench.plan = plan
        if number >= FIRST and (number % 10 == 0 or number == len(names)):
            row["first_ten"] = {known: measured(bench, method, known) for known in names[:FIRST]}
        rows.append(row)
        print(f"{number} concepts: {row['file_bytes']:,} bytes, merged in {row['merge_seconds']} s", flush=True)
    write(rows, {name: own(bench, name) for name in names[:FIRST]}, arguments.steps)
    print(read_time(bench))


def measured(bench: Workbench, method: ShareStream, concept: str) -> dict[str, float]:
    """Return a concept's held-out loss, measured again and not remembered, and the retention that the file states."""
    lora = method.update(concept)
    return {"loss": bench.fixed_loss(bench.updates(lora), concept), "retention": method.retention(concept)}


def own(bench: Workbench, concept: str) -> dict[str, float]:
    """Return the held-out loss of the base and of the concept's own LoRA, and the LoRA's bytes."""
    lora, _ = own_lora(bench, concept, 0)
    return {"base": bench.loss(None, concept), "own_lora": bench.loss(lora, concept), "bytes": file_bytes(lora)}


def read_time(bench: Workbench) -> str:
    """Return how long reading the file takes."""
    started = time.perf_counter()
    subspace = Subspace.load(bench.folder / f"passing-{os.getpid()}" / FILE, bench.weights)
    return f"{len(subspace.concepts)} concepts are read in {time.perf_counter() - started:.2f} s"


def write(rows: list[dict[str, Any]], loras: dict[str, dict[str, float]], steps: int) -> None:
    """Write the rows and what they come to."""
    points = [row for row in rows if "first_ten" in row]

    def score(row: dict[str, Any], name: str) -> float:
        entry = loras[name]
        return (entry["base"] - row["first_ten"][name]["loss"]) / (entry["base"] - entry["own_lora"])

    lost = {name: score(points[0], name) - score(points[-1], name) for name in loras}
    each = sum(entry["bytes"] for entry in loras.values()) / len(loras)
    facts = {
        "concepts": len(rows),
        "steps_of_later_concepts": steps,
        "first_ten_lose_at_most": round(max(lost.values()), 6),
        "first_ten_score": [round(sum(score(row, name) for name in loras) / len(loras), 4) for row in points],
        "lowest_retention_of_the_first_ten": min(row["first_ten"][name]["retention"] for row in points for name in loras),
        "file_bytes": rows[-1]["file_bytes"],
        "separate_loras_bytes": round(each * len(rows)),
        "times_smaller": round(each * len(rows) / rows[-1]["file_bytes"], 2),
        "merge_seconds_first_last": [rows[0]["merge_seconds"], rows[-1]["merge_seconds"]],
        "rows": [{key: value for key, value in row.items() if key != "first_ten"} for row in rows],
        "first_ten": {str(row["concepts"]): row["first_ten"] for row in points},
    }
    RESULT.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in facts.items() if key not in ("rows", "first_ten")}, indent=1))


if __name__ == "__main__":
    main()
