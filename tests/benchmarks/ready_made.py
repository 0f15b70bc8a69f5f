"""The ready-made subspace, measured: every concept that the package ships, drawn at unseen prompts and judged.

    python tests/benchmarks/ready_made.py

The file was learned with the defaults, each concept in a lesson of its own, as by

    python train/sequence.py --concepts watercolor robot blueprint owl neon teapot pixel ink --no-sheet

and is `outputs/tiny/subspace.safetensors` of that. Its columns were measured on the base and do not change, so that every
concept is, to the bit, what it was when it was learned. Writes results/ready_made.json, and results/ready_made.png: each
concept's own sample prompts at the same seeds, with the untouched base and then with the concept.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from first_concepts import RESULTS, ROOT, accepted
from torch import Tensor

from share_diffusion.attached import attach
from share_diffusion.base import TINY, load_base
from share_diffusion.describe import describe
from share_diffusion.drawing import generate
from share_diffusion.evaluate.gates import sheet
from share_diffusion.evaluate.judge import Judge
from share_diffusion.pictures import to_tensor
from share_diffusion.recipe import read_recipe_file
from share_diffusion.subspace import Subspace

FILE = TINY.parent / "concepts.safetensors"
PICTURES = 48
SHOWN = 4


def shown(pipeline: Any, subspace: Subspace, name: str) -> list[tuple[Tensor, str]]:
    """Return a row of the sheet: pictures and captions, without and with the concept."""
    prompts = list(read_recipe_file(ROOT / "configs/concepts" / f"{name}.toml")["sample"]["prompts"])[:SHOWN]
    seeds = list(range(len(prompts)))
    without = generate(pipeline, prompts, seeds)
    with attach(pipeline, subspace) as handle:
        handle.set_blend({name: 1.0})
        carried = generate(pipeline, prompts, seeds)
    return [(to_tensor(picture), "base") for picture in without] + [(to_tensor(picture), name) for picture in carried]


def main() -> None:
    judge, pipeline, subspace = Judge.load(), load_base("tiny"), Subspace.load(FILE)
    rows, tiles = {}, []
    for name, concept in subspace.concepts.items():
        before, after = (accepted(pipeline, judge, held, name, PICTURES) for held in (None, subspace))
        rows[name] = {"kind": concept.kind, "base": before, "blend": after, "retention": round(concept.retention, 4)}
        tiles += shown(pipeline, subspace, name)
        print(name, json.dumps(rows[name]), flush=True)
    facts = {"pictures": PICTURES, "concepts": rows, "bytes": describe(subspace, Path(FILE))["bytes"]}
    sheet(*map(list, zip(*tiles, strict=True)), lines=1).save(RESULTS / "ready_made.png")
    (RESULTS / "ready_made.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
