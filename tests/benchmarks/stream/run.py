"""Go through the streams of a plan, cell by cell, and stop and go on wherever one likes.

All methods advance together, one concept at a time, so that whatever has been finished is comparable. The state of every
stream is kept after every concept under the working folder; where that folder is gone, finished cells still count and
only an unfinished stream is learned again from its start.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from share_diffusion.lora import Factors, LoRA
from stream.cells import Table
from stream.methods import Method, make
from stream.plan import METHOD_KEYS, Plan
from stream.workbench import ROOT, Lesson, Workbench


@dataclass(frozen=True)
class Chosen:
    """Which streams of a plan to work on; None is all orders, or all seeds."""

    orders: tuple[int, ...] | None = None
    seeds: tuple[int, ...] | None = None

    def has(self, order: int, seed: int) -> bool:
        """Return whether a stream is among them."""
        return (self.orders is None or order in self.orders) and (self.seeds is None or seed in self.seeds)


ALL = Chosen()


@dataclass
class Stream:
    """One method in one order from one seed."""

    plan: Plan
    bench: Workbench
    table: Table
    name: str
    order: int
    seed: int
    pictures: Path
    at: int = 0
    method: Method | None = field(default=None, repr=False)

    @property
    def settings(self) -> dict[str, Any]:
        """The method's table of the plan."""
        return dict(self.plan.methods[self.name])

    @property
    def folder(self) -> Path:
        """Where states are kept."""
        return self.bench.folder / "states" / f"{self.name}-{self.plan.digest(self.name)}" / f"{self.order}-{self.seed}"

    def wanted(self, after: int) -> list[dict[str, Any]]:
        """Return the keys of the cells to be measured after so many concepts."""
        names = self.plan.order(self.order)[:after]
        if after > self.plan.length(self.name) or not (self.every_step or self.checkpoint(after)):
            return []
        weights = [*self.settings.get("weights", ())] if self.checkpoint(after) else []
        if after == self.plan.length(self.name) and (self.order, self.seed) == (0, 0):
            weights += self.settings.get("scales", ())  # one stream's curve of pictures over the scale
        return [self.key(after, name, 1.0) for name in names] + [
            self.key(after, name, float(weight)) for weight in weights for name in names
        ]

    def checkpoint(self, after: int) -> bool:
        """Whether all concepts are drawn and judged here."""
        return after == self.plan.length(self.name) or after in self.plan.measures.judged_after

    @property
    def every_step(self) -> bool:
        """Whether the method has something to look at after every concept."""
        return self.settings["kind"] not in ("merged", "joint")

    def key(self, after: int, concept: str, weight: float) -> dict[str, Any]:
        """Return a cell's key."""
        own = {"settings": self.plan.digest(self.name), "method": self.name, "order": self.order, "seed": self.seed}
        return {**own, "after": after, "concept": concept, "weight": weight}

    def missing(self, after: int) -> list[dict[str, Any]]:
        """Return the keys of the cells that are not in the table."""
        return [key for key in self.wanted(after) if tuple(key.values()) not in self.table]

    def advance(self, after: int) -> None:
        """Measure what is missing after so many concepts, learning up to there first."""
        missing = self.missing(after)
        if not missing:
            return
        lesson = self.reach(after)
        assert self.method is not None
        learned = self.plan.order(self.order)[after - 1]
        for key in missing:
            row = {**key, **self.measure(key["concept"], key["weight"], after), "learned": learned, "commit": commit()}
            if key["concept"] == learned and key["weight"] == 1.0:
                row |= self.lesson_fields(lesson)
            self.table.add(row)

    def reach(self, after: int) -> Lesson | None:
        """Bring the method to the state after so many concepts; returns what the last one took, where it was learned now."""
        if self.method is None or self.at > after:
            self.method = make(self.bench, self.settings, self.seed, METHOD_KEYS)
            kept = [step for step in range(after + 1) if (self.folder / str(step) / "lesson.json").exists()]
            self.at = max(kept, default=0)
            if self.at:
                self.method.load(self.folder / str(self.at))
        lesson = read_lesson(self.folder / str(self.at)) if self.at else None
        for concept in self.plan.order(self.order)[self.at : after]:
            lesson = self.method.learn(concept)
            self.at += 1
            place = self.folder / str(self.at)
            place.mkdir(parents=True, exist_ok=True)
            self.method.save(place)
            write_lesson(place, lesson)
        return lesson

    def measure(self, concept: str, weight: float, after: int) -> dict[str, Any]:
        """Return what is measured of a concept now."""
        assert self.method is not None
        lora = self.method.update(concept)
        base_loss = self.bench.loss(None, concept)
        if weight == 0.0:
            subspace = getattr(self.method, "subspace", None)
            loss = self.bench.inactive_loss(subspace, concept) if subspace else base_loss
            return {"loss": loss, "base_loss": base_loss}
        active = scaled(lora, weight) if lora and weight != 1.0 else lora
        found: dict[str, Any] = {"loss": self.bench.loss(active, concept), "base_loss": base_loss}
        found["norm"] = active.norm if active else 0.0
        if hasattr(self.method, "retention") and weight == 1.0:
            found["retention"] = self.method.retention(concept)  # type: ignore[attr-defined]
        learned = self.plan.order(self.order)[after - 1]
        if (concept == learned or self.checkpoint(after)) and self.settings.get("judge", True):
            shown = self.settings.get("pictures", False) and (self.order, self.seed, weight) == (0, 0, 1.0)
            place = self.pictures / self.name / f"{after:02d}-{concept}.png" if shown else None
            found |= vars(self.bench.seen(active, concept, place))
        return found

    def lesson_fields(self, lesson: Lesson | None) -> dict[str, Any]:
        """Return the fields of the cell whose concept was just learned."""
        assert self.method is not None
        stored, added, size = self.method.costs()
        fields: dict[str, Any] = {"numbers": stored, "concept_numbers": added, "file_bytes": size}
        fields["merge_seconds"] = getattr(self.method, "merge_seconds", "")
        if lesson is not None:
            curve = " ".join(f"{step}:{loss:.6f}" for step, loss in lesson.curve.items())
            fields |= {"trainable": lesson.trainable, "seconds": round(lesson.seconds, 2), "curve": curve}
        return fields


def scaled(lora: LoRA, weight: float) -> LoRA:
    """Return a LoRA at another weight."""
    return LoRA({path: Factors(weight * entry.up, entry.down, entry.kernel) for path, entry in lora.layers.items()})


def write_lesson(place: Path, lesson: Lesson | None) -> None:
    """Keep what a concept took beside the state after it."""
    facts = None if lesson is None else [lesson.trainable, lesson.seconds, dict(lesson.curve)]
    (place / "lesson.json").write_text(json.dumps(facts))


def read_lesson(place: Path) -> Lesson | None:
    """Return what the concept took whose state is kept here."""
    facts = json.loads((place / "lesson.json").read_text())
    if facts is None:
        return None
    return Lesson(facts[0], facts[1], {int(step): loss for step, loss in facts[2].items()})


@cache
def commit() -> str:
    """Return the commit that the code stands at, with a + where library or benchmark differ from it."""
    code = ("share_diffusion", "tests/benchmarks/stream", "tests/benchmarks/continual.py", "tests/benchmarks/continual.toml")
    try:
        head = subprocess.run(["git", "rev-parse", "--short=8", "HEAD"], capture_output=True, text=True, check=True, cwd=ROOT)
        changed = subprocess.run(["git", "status", "--porcelain", "--", *code], capture_output=True, text=True, cwd=ROOT)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def steps(plan: Plan, methods: list[str], chosen: Chosen = ALL) -> Iterator[tuple[str, int, int, int]]:
    """Yield (method, order, seed, after) in the order of work: seed by seed, order by order, concept by concept."""
    pairs = sorted({pair for name in methods for pair in plan.runs(name)}, key=lambda pair: (pair[1], pair[0]))
    for order, seed in [pair for pair in pairs if chosen.has(*pair)]:
        for after in range(1, len(plan.concepts) + 1):
            for name in methods:
                if (order, seed) in plan.runs(name) and after <= plan.length(name):
                    yield name, order, seed, after


def run(
    plan: Plan,
    bench: Workbench,
    table: Table,
    methods: list[str],
    pictures: Path,
    minutes: float | None,
    chosen: Chosen = ALL,
) -> bool:
    """Work until everything that is asked for is measured or the time is up; returns whether it is."""
    streams: dict[tuple[str, int, int], Stream] = {}
    started, work = time.monotonic(), list(steps(plan, methods, chosen))
    bar = tqdm(work, desc=plan.name, unit="step")
    for name, order, seed, after in bar:
        if minutes is not None and time.monotonic() - started > 60 * minutes:
            bar.close()
            return False
        stream = streams.setdefault((name, order, seed), Stream(plan, bench, table, name, order, seed, pictures))
        bar.set_postfix_str(f"{name} order {order} seed {seed} after {after}")
        stream.advance(after)
    return True
