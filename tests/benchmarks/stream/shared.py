"""Methods that keep all concepts in one shared subspace: Share as it is here, and the paper's recipe.

`ShareStream` does what `train/concept.py` does, through a saved file after every concept. `PaperStream` follows arXiv
2602.06043, section 3, with what its authors' code does where the text is silent: raw factors stacked, centred, a fixed
number k of left singular vectors kept, temporary factors alone active while a concept trains.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from share_diffusion.adapt import START, Adaptation, make_learner
from share_diffusion.basis import Basis, Coefficients
from share_diffusion.calibration import measured
from share_diffusion.capacity import Capacity
from share_diffusion.lora import Factors, LoRA
from share_diffusion.packed import stored_bytes
from share_diffusion.subspace import Origin, Subspace
from stream.separate import kept, own_lora
from stream.workbench import Lesson, Workbench

FILE = "subspace.safetensors"
DECAY = 1.0  # of what trains, where a plan names none


class ShareStream:
    """Share: `mode` of adaptation with p = `pseudo_rank` and phi = `temporary_rank`, from a basis of some `origin`.

    The first `start` concepts are learned in `start_mode` instead. `basis_rank` caps the columns of every layer's bases;
    `begin` is the norm of a starting column of coefficients.
    """

    every_step = True

    def __init__(self, bench: Workbench, seed: int, **options: Any) -> None:
        self.bench, self.seed = bench, seed
        self.mode: str = options.pop("mode", "gradient")
        self.start: int = options.pop("start", 0)
        self.start_mode: str = options.pop("start_mode", "lora")
        self.ranks = options.pop("pseudo_rank", 4), options.pop("temporary_rank", 4)
        self.capacity = Capacity(options.pop("retain", 0.999), options.pop("basis_rank", None))
        self.finetune_steps: int = options.pop("finetune", 0)
        self.text_encoder: bool = options.pop("text_encoder", True)
        self.own_seeds: bool = options.pop("own_seeds", False)
        self.rate: float = options.pop("rate", bench.plan.training.rate)
        self.factor_rate: float = options.pop("factor_rate", bench.plan.training.factor_rate)
        self.decay: float = options.pop("decay", DECAY)
        self.begin: float = options.pop("begin", START)
        self.modules = {path: module for path, module in bench.modules.items() if self.text_encoder or path.startswith("unet")}
        origin = options.pop("origin", "adapters")
        derived = Origin(origin, options.pop("derived_rank", 0), seed if origin == "random" else 0)
        if origin == "activations":
            derived = measured(bench.pipeline, self.modules, derived)
        if options:
            raise ValueError(f"unknown settings of a Share stream: {', '.join(options)}")
        self.subspace = Subspace(base=bench.identity, origin=derived).cover(
            {path: bench.shapes[path] for path in self.modules}, bench.weights
        )
        self.added, self.merge_seconds, self.file_bytes = 0, 0.0, 0

    def learn(self, concept: str) -> Lesson:
        """Learn a concept, merge it, and fine-tune it where asked."""
        number, before = len(self.subspace.concepts), stored(self.subspace)
        mode = self.start_mode if number < self.start else self.mode
        seed = self.seed + 1_000 * number if self.own_seeds and mode == "lora" else self.seed
        if mode == "lora" and self.text_encoder:
            lora, lesson = own_lora(self.bench, concept, seed)
        elif mode == "coefficients" and not self.learned_columns():  # then neither order nor earlier concepts have a say
            origin = self.subspace.origin
            basis = f"{origin.kind}-{origin.rank}-{origin.seed}{origin.digest}"
            pace = f"rate{self.rate:g}-decay{self.decay:g}-begin{self.begin:g}"
            way = f"{basis}-p{self.ranks[0]}-{pace}-text{self.text_encoder:d}-seed{seed}"
            lora, lesson = kept(self.bench, way, concept, lambda: self.adapt(concept, mode, seed))
        else:
            lora, lesson = self.adapt(concept, mode, seed)
        started = time.perf_counter()
        self.subspace = self.subspace.merge({concept: lora}, capacity=self.capacity)
        self.merge_seconds = time.perf_counter() - started
        if self.finetune_steps and number:
            self.finetune(concept)
        self.through_file()
        self.added = stored(self.subspace) - before
        return lesson

    def learned_columns(self) -> bool:
        """Whether a basis has columns that neither a seed nor the base's weights give."""
        derived = self.subspace.fixed
        return any(basis.rank != derived[path] for path, basis in self.subspace.layers.items())

    def adapt(self, concept: str, mode: str, seed: int) -> tuple[LoRA, Lesson]:
        """Train a concept in the bases as they are and return it as an ordinary LoRA."""
        training, bases = self.bench.plan.training, dict(self.subspace.layers)
        adaptation = Adaptation(mode, *self.ranks, training.rank, self.begin)
        first = all(min(basis.rank) == 0 for basis in bases.values())
        wanted = adaptation.looks_at_gradient and not (first and mode == "hybrid")
        rank = training.rank if first and mode == "gradient" else self.ranks[1]
        directions = self.bench.directions(concept, bases, rank, seed) if wanted else {}
        learner = make_learner(self.modules, bases, adaptation, directions, seed)
        rates = (self.rate, training.lora_rate if first and not wanted else self.factor_rate)
        lesson = self.bench.teach(learner, concept, self.bench.lessons(concept, seed), rates, decay=self.decay)
        return learner.lora(), lesson

    def finetune(self, concept: str) -> None:
        """Train the newest concept's coefficients alone, in the merged bases."""
        held = self.subspace[concept]
        coefficients = finetuned(
            self.bench, concept, self.subspace.layers, held.coefficients, self.seed, self.finetune_steps, self.rate / 4
        )
        self.subspace = self.subspace.with_coefficients(concept, coefficients)

    def through_file(self) -> None:
        """Write the subspace as a user's file and go on with what the file holds."""
        file = self.bench.folder / f"passing-{os.getpid()}" / FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        self.subspace.save(file, replace=True)
        self.file_bytes = file.stat().st_size
        self.subspace = Subspace.load(file, self.bench.weights)

    def update(self, concept: str) -> LoRA:
        """Return the concept as the subspace holds it."""
        return self.subspace.lora(concept)

    def retention(self, concept: str) -> float:
        """Return the share of the concept's energy that is certainly held."""
        return self.subspace[concept].retention

    def costs(self) -> tuple[int, int, int]:
        """Return all numbers of the file, columns and coefficients of the last concept, and the file's bytes."""
        return stored(self.subspace), self.added, self.file_bytes

    def save(self, folder: Path) -> None:
        """Write the file."""
        self.subspace.save(folder / FILE, replace=True)
        facts = {"added": self.added, "merge_seconds": self.merge_seconds, "file_bytes": self.file_bytes}
        (folder / "facts.json").write_text(json.dumps(facts))

    def load(self, folder: Path) -> None:
        """Read the file."""
        self.subspace = Subspace.load(folder / FILE, self.bench.weights)
        facts = json.loads((folder / "facts.json").read_text())
        self.added, self.merge_seconds, self.file_bytes = facts["added"], facts["merge_seconds"], facts["file_bytes"]


def stored(subspace: Subspace) -> int:
    """Return what a subspace stores, learned columns and every concept's coefficients, in numbers of half precision."""
    fixed = subspace.fixed
    columns = sum(
        basis.alpha.shape[0] * (basis.rank[0] - fixed[path][0]) + basis.beta.shape[0] * (basis.rank[1] - fixed[path][1])
        for path, basis in subspace.layers.items()
    )
    eight_bits = subspace.origin.eight_bits
    columns += subspace.origin.bytes // 2
    return columns + sum(stored_bytes(concept, eight_bits) for concept in subspace.concepts.values()) // 2


def finetuned(
    bench: Workbench,
    concept: str,
    bases: Mapping[str, Basis],
    coefficients: Mapping[str, Coefficients],
    seed: int,
    steps: int,
    rate: float,
) -> dict[str, Coefficients]:
    """Return a concept's coefficients after training them alone in frozen bases."""
    modules = {path: bench.modules[path] for path in coefficients}
    rank = max(entry.pseudo_rank for entry in coefficients.values())
    chosen = {path: bases[path] for path in modules}
    learner = make_learner(modules, chosen, Adaptation("coefficients", rank), {}, seed)
    learner.start_from(coefficients)
    data = bench.lessons(concept, seed)
    bench.teach(learner, None, lambda step: data(3_000_000_000 + step), (rate, rate), steps)
    return learner.coefficients()


class PaperStream:
    """The paper's recipe: r of the first LoRA, k = `basis_rank` fixed, p and phi as given; `centred` as its code does."""

    every_step = True

    def __init__(
        self,
        bench: Workbench,
        seed: int,
        basis_rank: int = 8,
        pseudo_rank: int = 2,
        temporary_rank: int = 2,
        centred: bool = True,
        finetune: int = 0,
        rate: float | None = None,
        decay: float = 0.0,
    ) -> None:
        self.bench, self.seed, self.rank, self.centred, self.finetune_steps = bench, seed, basis_rank, centred, finetune
        self.rate, self.decay = rate or bench.plan.training.factor_rate, decay  # of the temporary factors; of all that trains
        self.adaptation = Adaptation("temporary", pseudo_rank, temporary_rank, bench.plan.training.rank)
        self.bases: dict[str, Basis] = {}
        self.concepts: dict[str, dict[str, Coefficients]] = {}
        self.merge_seconds = 0.0

    def learn(self, concept: str) -> Lesson:
        """Learn the first concept as a LoRA, a further one by temporary factors, and merge."""
        training = self.bench.plan.training
        if not self.concepts:
            lora, lesson = own_lora(self.bench, concept, self.seed)
        else:
            learner = make_learner(self.bench.modules, self.bases, self.adaptation, {}, self.seed)
            rates = (training.rate, self.rate)
            lesson = self.bench.teach(learner, concept, self.bench.lessons(concept, self.seed), rates, decay=self.decay)
            lora = learner.lora()
        started = time.perf_counter()
        self.merge(concept, lora)
        self.merge_seconds = time.perf_counter() - started
        if self.finetune_steps:
            held, rate = self.concepts[concept], training.rate / 4
            self.concepts[concept] = finetuned(self.bench, concept, self.bases, held, self.seed, self.finetune_steps, rate)
        return lesson

    def merge(self, concept: str, lora: LoRA) -> None:
        """Stack every concept's factors, keep the k strongest directions of each side, project every concept again."""
        loras = {name: self.update(name) for name in self.concepts} | {concept: lora}
        self.concepts = {name: {} for name in loras}
        for path in lora.layers:
            ups = {name: held.layers[path].up.double() for name, held in loras.items()}
            downs = {name: held.layers[path].down.mT.double() for name, held in loras.items()}
            beta, alpha = self.directions(list(ups.values())), self.directions(list(downs.values()))
            self.bases[path] = Basis(alpha.float(), beta.float())
            for name in loras:
                entry = Coefficients((alpha.mT @ downs[name]).float(), (beta.mT @ ups[name]).float())
                self.concepts[name][path] = entry

    def directions(self, factors: list[Tensor]) -> Tensor:
        """Return the k strongest left singular vectors of stacked factors, (side, k)."""
        stack = torch.cat(factors, dim=1)
        if self.centred:
            stack = stack - stack.mean(dim=1, keepdim=True)
        return torch.linalg.svd(stack, full_matrices=False)[0][:, : self.rank]

    def update(self, concept: str) -> LoRA:
        """Return the concept as the subspace holds it."""
        layers = {}
        for path, entry in self.concepts[concept].items():
            basis = self.bases[path]
            layers[path] = Factors(basis.beta @ entry.beta, (basis.alpha @ entry.alpha).mT.contiguous())
        return LoRA(layers)

    def costs(self) -> tuple[int, int, int]:
        """Return numbers of bases and coefficients, the coefficients of the last concept, and the bytes of both."""
        shared = sum(basis.alpha.numel() + basis.beta.numel() for basis in self.bases.values())
        each = [sum(entry.alpha.numel() + entry.beta.numel() for entry in held.values()) for held in self.concepts.values()]
        return shared + sum(each), each[-1], 2 * (shared + sum(each))

    def save(self, folder: Path) -> None:
        """Write bases and coefficients."""
        tensors = {}
        for path, basis in self.bases.items():
            tensors |= {f"basis|{path}|alpha": basis.alpha, f"basis|{path}|beta": basis.beta}
            for name, held in self.concepts.items():
                tensors |= {f"{name}|{path}|alpha": held[path].alpha, f"{name}|{path}|beta": held[path].beta}
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / FILE)
        (folder / "concepts.json").write_text(json.dumps([list(self.concepts), self.merge_seconds]))

    def load(self, folder: Path) -> None:
        """Read bases and coefficients."""
        tensors = load_file(folder / FILE)
        names, self.merge_seconds = json.loads((folder / "concepts.json").read_text())
        paths = sorted({key.split("|")[1] for key in tensors})
        self.bases = {path: Basis(tensors[f"basis|{path}|alpha"], tensors[f"basis|{path}|beta"]) for path in paths}
        self.concepts = {
            name: {path: Coefficients(tensors[f"{name}|{path}|alpha"], tensors[f"{name}|{path}|beta"]) for path in paths}
            for name in names
        }
