"""What a benchmark run consists of, read from one TOML file.

A plan names the stream of concepts, how many orders and seeds, the training budget that all methods share, what is
measured, the gates, and the methods. Every cell carries a digest of what its value depends on, so a plan that changes
leaves cells of the old one out of the report instead of mixing them in.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from share_diffusion.recipe import read_recipe_file

NOT_IN_DIGEST = "kind orders seeds stop judge table beside weights scales pictures about"
CONCEPTS = Path(__file__).resolve().parents[3] / "configs/concepts"
METHOD_KEYS = set(NOT_IN_DIGEST.split())


@dataclass(frozen=True)
class Training:
    """The budget of one concept, the same for every method."""

    steps: int = 120
    batch: int = 8
    warmup: int = 10
    rate: float = 1e-2  # coefficients
    lora_rate: float = 4e-3  # ordinary LoRAs
    factor_rate: float = 2e-3  # temporary factors
    gradient_batches: int = 8
    rank: int = 8


@dataclass(frozen=True)
class Measures:
    """What is measured of a concept; `judged_after` are the places in the stream where all concepts are drawn."""

    held_out: int = 64
    batch: int = 16
    pictures: int = 16
    sampling_steps: int = 20
    guidance_scale: float = 3.0
    judged_after: tuple[int, ...] = (5, 10)
    curve: tuple[int, ...] = (10, 20, 30, 40, 60, 80)


@dataclass(frozen=True)
class Gates:
    """Limits that make a run valid: judge accuracy of own LoRAs and base, and the least drop of sequential training."""

    own_lora: float = 0.9
    base: float = 0.15
    drop: float = 0.3
    measure: str = "judge"  # or "loss", where too few pictures are drawn to ask the judge


@dataclass(frozen=True)
class Plan:
    """One benchmark: its stream, budget, measures, gates, and methods by name."""

    name: str
    concepts: tuple[str, ...]
    methods: Mapping[str, Mapping[str, Any]]
    orders: int = 1
    seeds: int = 1
    base: str = "tiny"
    targets: str = "attention+ff+conv"  # the layers that every method adapts
    training: Training = field(default_factory=Training)
    measures: Measures = field(default_factory=Measures)
    gates: Gates = field(default_factory=Gates)

    def order(self, number: int) -> tuple[str, ...]:
        """Return the stream in one of its orders; order 0 is as written, the others are fixed permutations."""
        if number == 0:
            return self.concepts
        return tuple(random.Random(number).sample(self.concepts, len(self.concepts)))

    def runs(self, method: str) -> list[tuple[int, int]]:
        """Return the (order, seed) pairs that a method is asked for."""
        asked = self.methods[method]
        orders, seeds = min(asked.get("orders", 1), self.orders), min(asked.get("seeds", self.seeds), self.seeds)
        return [(order, seed) for seed in range(seeds) for order in range(orders)]

    def length(self, method: str) -> int:
        """Return how many concepts of the stream a method goes through."""
        return min(self.methods[method].get("stop", len(self.concepts)), len(self.concepts))

    def digest(self, method: str) -> str:
        """Return eight hexadecimal digits of everything that a method's cells depend on."""
        own = {key: value for key, value in self.methods[method].items() if key not in METHOD_KEYS}
        own["kind"] = self.methods[method]["kind"]
        whole = [self.base, self.targets, self.concepts, vars(self.training), vars(self.measures), own]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:8]


def read_plan(path: Path) -> Plan:
    """Return the plan in a TOML file; raises ValueError with every unknown key."""
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    sections = {"training": Training, "measures": Measures, "gates": Gates}
    unknown = [key for key in values if key not in {entry.name for entry in fields(Plan)}]
    for name, kind in sections.items():
        known = {entry.name for entry in fields(kind)}
        unknown += [f"{name}.{key}" for key in values.get(name, {}) if key not in known]
    if unknown:
        raise ValueError(f"{path}: unknown keys: {', '.join(unknown)}")
    made = {name: kind(**frozen(values.pop(name, {}))) for name, kind in sections.items()}
    return Plan(**frozen(values), **made)


def kind_of(concept: str) -> str:
    """Return whether a concept is a style or a subject, as its file says; empty where there is none."""
    file = CONCEPTS / f"{concept}.toml"
    return read_recipe_file(file)["kind"] if file.exists() else ""


def frozen(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with lists as tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
