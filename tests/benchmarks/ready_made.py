"""The ready-made subspace, measured: every concept that the package ships, drawn at unseen prompts and judged.

    python tests/benchmarks/ready_made.py

The file was learned, in this order and with the defaults, by

    python train/sequence.py --concepts watercolor robot blueprint owl neon teapot pixel ink --no-sheet

and is `outputs/tiny/subspace.safetensors` of that run. Its bases only ever gained columns, so that every concept is, to the
bit, what it was when it was learned. Writes results/ready_made.json.
"""

from __future__ import annotations

import json
from pathlib import Path

from first_concepts import RESULTS, accepted

from share_diffusion.base import TINY, load_base
from share_diffusion.describe import describe
from share_diffusion.evaluate.judge import Judge
from share_diffusion.subspace import Subspace

FILE = TINY.parent / "concepts.safetensors"
PICTURES = 48


def main() -> None:
    judge, pipeline, subspace = Judge.load(), load_base("tiny"), Subspace.load(FILE)
    rows = {}
    for name, concept in subspace.concepts.items():
        before, after = (accepted(pipeline, judge, held, name, PICTURES) for held in (None, subspace))
        rows[name] = {"kind": concept.kind, "base": before, "blend": after, "retention": round(concept.retention, 4)}
        print(name, json.dumps(rows[name]), flush=True)
    facts = {"pictures": PICTURES, "concepts": rows, "bytes": describe(subspace, Path(FILE))["bytes"]}
    (RESULTS / "ready_made.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
