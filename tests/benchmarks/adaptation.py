"""Which way of learning one concept is the default: layers, basis and rates side by side, from an empty subspace.

    python tests/benchmarks/adaptation.py                             # what is not in the table yet, in as many sittings
    python tests/benchmarks/adaptation.py --concepts owl --ways 'LoRA r 1'

Every way learns the same pictures in the same steps with the same noise. Told are the held-out loss as a part of what a
LoRA of rank 8 gains on the same layers ("score": 0 is the untouched base, 1 that LoRA), the share of pictures at unseen
prompts in which the judge sees the concept, how many numbers train, and the bytes that the file grows by, columns and
all: coefficients in a basis of no bytes in 8 bits, the rest in half precision. Every finished line is kept in
results/adaptation.csv and never measured twice; to run on two cores start the command twice with different concepts. One
seed: differences of .01 in score or of .1 for the judge are noise. Coefficients learn with the default's weight decay; lines
whose way ends in "no decay" are from before it, with starting columns of norm 1; they are in the file, not in the table.
"""

from __future__ import annotations

import argparse
import csv
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from stream.plan import Measures, Plan, Training  # noqa: E402
from stream.workbench import Workbench  # noqa: E402

from share_diffusion.adapt import Adaptation, make_learner  # noqa: E402
from share_diffusion.calibration import measured  # noqa: E402
from share_diffusion.optimizers import decay_for  # noqa: E402
from share_diffusion.packed import stored_bytes  # noqa: E402
from share_diffusion.subspace import Origin, Subspace  # noqa: E402

RESULT = HERE / "results" / "adaptation.csv"
CONCEPTS = ("owl", "watercolor", "pixel")
NARROW, WIDE = "attention+ff", "attention+ff+conv"
FIELDS = ("concept", "way", "targets", "loss", "base_loss", "judge", "adherence", "trainable", "bytes", "seconds", "curve")
PLAN = Plan(
    "adaptation",
    CONCEPTS,
    {},
    training=Training(steps=200),
    measures=Measures(pictures=32, sampling_steps=20, guidance_scale=2.0, curve=(10, 20, 40, 60, 80, 100, 140)),
)


@dataclass(frozen=True)
class Way:
    """One way of learning: what trains, in which layers and bases, at which rate of the coefficients."""

    name: str
    targets: str
    adaptation: Adaptation
    origin: Origin = field(default_factory=Origin)
    rate: float = 1e-2


def random(rank: int, p: int, targets: str = WIDE, rate: float = 1e-2, kind: str = "random") -> Way:
    """Return the way of coefficients in columns that are there from the start."""
    told = "" if rate == 1e-2 else f", rate {rate:g}"
    return Way(f"{kind} k {rank} p {p}{told}", targets, Adaptation("coefficients", p), Origin(kind, rank), rate)


WAYS = (
    Way("LoRA r 8", NARROW, Adaptation("lora", rank=8)),
    Way("LoRA r 8", WIDE, Adaptation("lora", rank=8)),
    random(48, 4, kind="activations"),
    random(48, 2, kind="activations"),
    random(48, 4),
    random(48, 2, rate=2e-2),
    Way("gradient k 8 p 4", NARROW, Adaptation("gradient", 4, 8), rate=2e-2),
    Way("LoRA r 1", WIDE, Adaptation("lora", rank=1)),
    random(64, 1),
    random(48, 4, NARROW),
    random(48, 4, rate=5e-3),
    random(48, 4, rate=2e-2),
    random(48, 4, kind="weights"),
    random(96, 1),
    random(24, 4),
    Way("gradient k 8 p 4", WIDE, Adaptation("gradient", 4, 8), rate=2e-2),
    Way("LoRA r 1", NARROW, Adaptation("lora", rank=1)),
)


def learn(bench: Workbench, way: Way, concept: str) -> dict[str, Any]:
    """Learn a concept in one way and return the measured line."""
    origin = measured(bench.pipeline, bench.modules, way.origin) if way.origin.kind == "activations" else way.origin
    empty = Subspace(base=bench.identity, origin=origin).cover(bench.shapes, bench.weights)
    directions = bench.directions(concept, {}, way.adaptation.temporary_rank, 0) if way.adaptation.looks_at_gradient else {}
    learner = make_learner(bench.modules, dict(empty.layers), way.adaptation, directions, 0)
    rates = way.rate, bench.plan.training.lora_rate
    decay = 0.0 if way.adaptation.mode == "lora" else decay_for(way.rate, bench.plan.training.steps)
    lesson = bench.teach(learner, concept, bench.lessons(concept, 0), rates, decay=decay)
    lora = learner.lora()
    seen, size = bench.seen(lora, concept), 2 * lesson.trainable
    if way.adaptation.looks_at_gradient:
        size += 2 * sum(basis.alpha.numel() + basis.beta.numel() for basis in directions.values())
    if way.origin.eight_bits:
        size = stored_bytes(empty.merge({concept: lora})[concept], True)
    return {
        "concept": concept,
        "way": way.name,
        "targets": way.targets,
        "loss": round(bench.loss(lora, concept), 5),
        "base_loss": round(bench.loss(None, concept), 5),
        "judge": seen.judge,
        "adherence": round(seen.adherence, 3),
        "trainable": lesson.trainable,
        "bytes": size,
        "seconds": round(lesson.seconds),
        "curve": " ".join(f"{step}:{loss:.4f}" for step, loss in lesson.curve.items()),
    }


def held() -> list[dict[str, str]]:
    """Return the lines that are there already."""
    if not RESULT.exists():
        return []
    with RESULT.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def keep(row: dict[str, Any]) -> None:
    """Append one line."""
    new = not RESULT.exists()
    with RESULT.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def table(rows: list[dict[str, str]]) -> str:
    """Return the lines as a table: a way a row, score and judge of every concept, in the order of the ways."""
    at = {(row["concept"], row["way"], row["targets"]): row for row in rows}
    lines = [f"| layers | way | trains | bytes | {' | '.join(CONCEPTS)} |", "|" + "---|" * (4 + len(CONCEPTS))]
    for way in WAYS:
        found = [at.get((concept, way.name, way.targets)) for concept in CONCEPTS]
        some = next((row for row in found if row), None)
        if some is None:
            continue
        cells = []
        for concept, row in zip(CONCEPTS, found, strict=True):
            own = at.get((concept, "LoRA r 8", way.targets))
            if row is None or own is None:
                cells.append("-")
                continue
            gain = float(row["base_loss"]) - float(row["loss"])
            score = gain / (float(own["base_loss"]) - float(own["loss"]))
            cells.append(f"{score:.2f} / {float(row['judge']):.2f}")
        lines.append(
            f"| {way.targets} | {way.name} | {int(some['trainable']):,} | {int(some['bytes']):,} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", nargs="+", default=CONCEPTS, choices=CONCEPTS)
    parser.add_argument("--ways", nargs="+", help="parts of the names of the ways to run (default: all)")
    parser.add_argument("--work", type=Path, default=Path("outputs/benchmarks/adaptation"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    benches: dict[str, Workbench] = {}
    for way in WAYS:
        if arguments.ways and not any(part in way.name for part in arguments.ways):
            continue
        for concept in arguments.concepts:
            if any((row["concept"], row["way"], row["targets"]) == (concept, way.name, way.targets) for row in held()):
                continue
            if way.targets not in benches:
                folder = arguments.work / way.targets.replace("+", "-") / "-".join(arguments.concepts)
                benches[way.targets] = Workbench(replace(PLAN, targets=way.targets), folder)
            row = learn(benches[way.targets], way, concept)
            keep(row)
            print(f"{concept}, {way.targets}, {way.name}: loss {row['loss']}, judge {row['judge']}", flush=True)
    print(table(held()))


if __name__ == "__main__":
    main()
