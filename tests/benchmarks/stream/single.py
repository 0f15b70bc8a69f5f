"""Methods that keep a single adapter for all concepts, trained on one after another (or on all at once).

sequential   the LoRA goes on training on the next concept
ewc          the same, held near earlier values where the Fisher information says that they matter
c_lora       a new LoRA beside the sum of the earlier ones, kept off the entries that those changed
replay       the LoRA goes on training, half of every batch being a few kept pictures of earlier concepts
joint        one LoRA on the pictures of all concepts with the steps of all: no continual learning at all
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from share_diffusion.adapt import Adaptation, Learner, LearningPath, make_learner
from share_diffusion.learning import Denoiser, denoising_loss
from share_diffusion.lora import LoRA
from share_diffusion.objective import Draw, batch_indices
from stream.separate import file_bytes, numbers, own_lora
from stream.workbench import Batch, Lesson, Workbench

FISHER_BATCHES = 8


class SequentialLoRA:
    """One LoRA, trained on one concept after another, with or without a guard against forgetting.

    `rate` is that of the second concept and on; the first one is an ordinary LoRA at the plan's rate.
    """

    every_step = True

    def __init__(
        self,
        bench: Workbench,
        seed: int,
        guard: str = "none",
        strength: float = 0.0,
        kept: int = 4,
        rate: float | None = None,
    ) -> None:
        self.bench, self.seed, self.guard, self.strength, self.kept = bench, seed, guard, strength, kept
        self.rate = rate or bench.plan.training.lora_rate
        self.concepts: list[str] = []
        self.lora = LoRA({})
        self.fisher: dict[str, Tensor] = {}

    def learn(self, concept: str) -> Lesson:
        """Go on with the next concept; the first is an ordinary LoRA."""
        if not self.concepts:
            self.lora, lesson = own_lora(self.bench, concept, self.seed)
            learner = self.continued()
        else:
            learner = self.beside() if self.guard == "c_lora" else self.continued()
            training = self.bench.plan.training
            rates = (training.rate, self.rate)
            lesson = self.bench.teach(learner, concept, self.batches(concept), rates, penalty=self.penalty(learner))
            self.lora = learner.lora()
        self.concepts.append(concept)
        if self.guard == "ewc":
            self.add_fisher(learner.to(self.bench.device), concept)
        return lesson

    def batches(self, concept: str) -> Callable[[int], Batch]:
        """Return the batches of the new concept, mixed with kept pictures where the guard is replay."""
        own = self.bench.lessons(concept, self.seed)
        if self.guard != "replay":
            return own
        training, current = self.bench.plan.training, len(self.bench.materials((concept, None)))
        data = self.bench.materials((concept, None), *((earlier, self.kept) for earlier in self.concepts))
        half = training.batch // 2

        def mixed(step: int) -> Batch:
            _, drawn = own(step)
            old = batch_indices(len(data) - current, half, self.seed + 1, step) + current
            return data, Draw(torch.cat([drawn.indices[: training.batch - half], old]), drawn.times, drawn.noise)

        return mixed

    def continued(self) -> Learner:
        """Return a learner whose factors start where the adapter stands."""
        generator = torch.Generator().manual_seed(self.seed)
        paths = {
            path: [LearningPath(factors.down.mT, factors.up, None, True, generator)]
            for path, factors in self.lora.layers.items()
        }
        return Learner(paths, {path: factors.kernel for path, factors in self.lora.layers.items()})

    def beside(self) -> Learner:
        """Return a learner with the sum of the earlier LoRAs frozen and a new one beside it."""
        generator = torch.Generator().manual_seed(self.seed)
        fresh = make_learner(self.bench.modules, {}, Adaptation("lora", rank=self.bench.plan.training.rank), {}, self.seed)
        paths = {}
        for path, (new,) in fresh.by_layer().items():
            past = self.lora.layers[path]
            paths[path] = [LearningPath(past.down.mT.contiguous(), past.up, None, False, generator), new]
        return Learner(paths, fresh.kernels)

    def penalty(self, learner: Learner) -> Callable[[Learner], Tensor] | None:
        """Return the guard's part of the loss, anchored at the state before the new concept."""
        if self.guard == "ewc":
            anchor = {name: parameter.detach().clone() for name, parameter in learner.named_parameters()}
            return lambda learner: (
                self.strength
                * sum(
                    (self.fisher[name].to(parameter) * (parameter - anchor[name].to(parameter)).square()).sum()
                    for name, parameter in learner.named_parameters()
                )
            )  # type: ignore[return-value]
        if self.guard == "c_lora":
            past = {path: factors.dense().flatten(1).abs().to(self.bench.device) for path, factors in self.lora.layers.items()}
            largest = max(float(matrix.max()) for matrix in past.values())
            return lambda learner: (
                self.strength
                * sum(
                    (past[path] / largest * (new.beta @ new.alpha.mT)).square().sum()
                    for path, (_, new) in learner.by_layer().items()
                )
            )  # type: ignore[return-value]
        return None

    def add_fisher(self, learner: Learner, concept: str) -> None:
        """Add the concept's squared gradients, scaled to a mean of 1."""
        model, batches = Denoiser(learner, self.bench.pipeline, self.bench.attached), self.bench.lessons(concept, self.seed)
        squares = {name: torch.zeros_like(parameter) for name, parameter in learner.named_parameters()}
        for index in range(FISHER_BATCHES):
            learner.zero_grad()
            data, drawn = batches(1_500_000_000 + index)
            denoising_loss(model, self.bench.pipeline, data, drawn, self.bench.device).mean().backward()
            for name, parameter in learner.named_parameters():
                if parameter.grad is not None:
                    squares[name] += parameter.grad.square()
        self.bench.attached.set({})
        mean = torch.cat([square.flatten() for square in squares.values()]).mean()
        for name, square in squares.items():
            self.fisher[name] = self.fisher.get(name, 0) + (square / mean).cpu()

    def update(self, concept: str) -> LoRA:
        """Return the one adapter."""
        return self.lora

    def costs(self) -> tuple[int, int, int]:
        """Return what drawing needs; what a guard keeps for further training is not counted."""
        return numbers(self.lora), numbers(self.lora) if len(self.concepts) == 1 else 0, file_bytes(self.lora)

    def save(self, folder: Path) -> None:
        """Write adapter, guard and names."""
        self.lora.write(folder / "adapter.safetensors", dtype=torch.float32)
        save_file({name.replace(".", "|"): fisher.contiguous() for name, fisher in self.fisher.items()}, folder / "fisher.st")
        (folder / "concepts.json").write_text(json.dumps(self.concepts))

    def load(self, folder: Path) -> None:
        """Read adapter, guard and names."""
        self.lora = LoRA.read(folder / "adapter.safetensors")
        self.fisher = {name.replace("|", "."): fisher for name, fisher in load_file(folder / "fisher.st").items()}
        self.concepts = json.loads((folder / "concepts.json").read_text())


class JointLoRA:
    """One LoRA trained on the pictures of all concepts at once, with as many steps as all together would have."""

    every_step = False

    def __init__(self, bench: Workbench, seed: int, rank: int | None = None, rate: float | None = None) -> None:
        training = bench.plan.training
        self.bench, self.seed, self.rank = bench, seed, rank or training.rank
        self.rates = training.rate, rate or training.lora_rate
        self.concepts: list[str] = []
        self.trained: tuple[int, LoRA] = (0, LoRA({}))

    def learn(self, concept: str) -> None:
        """Note the concept; training waits until the adapter is asked for."""
        self.concepts.append(concept)

    def update(self, concept: str) -> LoRA:
        """Return the adapter for all concepts so far, trained where it is not."""
        if self.trained[0] != len(self.concepts):
            data = self.bench.materials(*((name, None) for name in self.concepts))
            training = self.bench.plan.training
            learner = make_learner(self.bench.modules, {}, Adaptation("lora", rank=self.rank), {}, self.seed)
            steps = training.steps * len(self.concepts)

            def batches(step: int) -> Batch:
                return data, self.bench.draw(data, training.batch, self.seed, step)

            self.bench.teach(learner, None, batches, self.rates, steps)
            self.trained = len(self.concepts), learner.lora()
        return self.trained[1]

    def costs(self) -> tuple[int, int, int]:
        """Return what the adapter stores."""
        return numbers(self.trained[1]), 0, file_bytes(self.trained[1])

    def save(self, folder: Path) -> None:
        """Write the names."""
        (folder / "concepts.json").write_text(json.dumps(self.concepts))

    def load(self, folder: Path) -> None:
        """Read the names."""
        self.concepts = json.loads((folder / "concepts.json").read_text())
