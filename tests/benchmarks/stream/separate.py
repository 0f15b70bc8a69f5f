"""Methods that start from one ordinary LoRA per concept: kept apart, compressed, or merged into one.

The LoRAs are trained once per (concept, seed, rank) and kept as half-precision files; every method that works on
finished LoRAs reuses the same ones, and so does every stream whose first concept is an ordinary LoRA.

    up (out, r), down (r, in); dW = up @ down (out, in) is formed here, because the base is small
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from share_diffusion.adapt import Adaptation, make_learner
from share_diffusion.basis import thin_svd
from share_diffusion.lora import Factors, LoRA
from stream.workbench import Lesson, Workbench

DENSITY = 0.2  # share of an update's entries that TIES keeps (its authors' value)
DROP = 0.5  # share of entries that DARE drops
NOTHING = 1e-8  # of a layer's largest singular value: directions below are rounding

Updates = dict[str, Tensor]  # by layer (concepts, out, in), in double precision; merged (out, in)


def own_lora(
    bench: Workbench, concept: str, seed: int, rank: int | None = None, rate: float | None = None, decay: float = 0.0
) -> tuple[LoRA, Lesson]:
    """Return a concept's own LoRA and what it took, trained where there is none yet."""
    training = bench.plan.training
    rank, rate = rank or training.rank, rate or training.lora_rate

    def train() -> tuple[LoRA, Lesson]:
        learner = make_learner(bench.modules, {}, Adaptation("lora", rank=rank), {}, seed)
        lesson = bench.teach(learner, concept, bench.lessons(concept, seed), (training.rate, rate), decay=decay)
        return learner.lora(), lesson

    told = f"-decay{decay:g}" if decay else ""
    return kept(bench, f"lora-rate{rate:g}{told}-rank{rank}-seed{seed}", concept, train, torch.float16)


def kept(
    bench: Workbench, way: str, concept: str, train: Callable[[], tuple[LoRA, Lesson]], dtype: torch.dtype = torch.float32
) -> tuple[LoRA, Lesson]:
    """Return what a lesson gave that depends on nothing but its concept and `way`, learned where there is none yet."""
    training = bench.plan.training
    mark = f"{bench.plan.targets}-{training.steps}x{training.batch}-{way}"
    file = bench.folder / "loras" / mark / f"{concept}.safetensors"
    if not file.with_suffix(".json").exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        lora, lesson = train()
        lora.write(file, dtype=dtype)
        file.with_suffix(".json").write_text(json.dumps(asdict(lesson)))
    facts = json.loads(file.with_suffix(".json").read_text())
    curve = {int(step): loss for step, loss in facts["curve"].items()}
    return LoRA.read(file), Lesson(facts["trainable"], facts["seconds"], curve)


def numbers(lora: LoRA) -> int:
    """Return how many numbers a LoRA stores."""
    return sum(factors.up.numel() + factors.down.numel() for factors in lora.layers.values())


def file_bytes(lora: LoRA) -> int:
    """Return the size of a LoRA as a half-precision file, names included."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "lora.safetensors"
        lora.write(file)
        return file.stat().st_size


class UntouchedBase:
    """The base as it is: what every concept looks like before anything is learned."""

    every_step = True

    def __init__(self, bench: Workbench, seed: int) -> None:
        self.concepts: list[str] = []

    def learn(self, concept: str) -> None:
        """Learn nothing."""

    def update(self, concept: str) -> None:
        """Return that nothing is active."""

    def costs(self) -> tuple[int, int, int]:
        """Return that nothing is stored."""
        return 0, 0, 0

    def save(self, folder: Path) -> None:
        """Write nothing."""

    def load(self, folder: Path) -> None:
        """Read nothing."""


class OwnLoRA:
    """One LoRA per concept, kept apart: no forgetting by construction, and the most bytes."""

    every_step = True

    def __init__(
        self, bench: Workbench, seed: int, rank: int | None = None, rate: float | None = None, decay: float = 0.0
    ) -> None:
        self.bench, self.seed, self.rank, self.rate, self.decay = bench, seed, rank, rate, decay
        self.loras: dict[str, LoRA] = {}

    def learn(self, concept: str) -> Lesson:
        """Train the concept's LoRA."""
        self.loras[concept], lesson = own_lora(self.bench, concept, self.seed, self.rank, self.rate, self.decay)
        return lesson

    def update(self, concept: str) -> LoRA:
        """Return the concept's own LoRA."""
        return self.loras[concept]

    def costs(self) -> tuple[int, int, int]:
        """Return what all LoRAs store."""
        each = [numbers(lora) for lora in self.loras.values()]
        return sum(each), each[-1], sum(file_bytes(lora) for lora in self.loras.values())

    def save(self, folder: Path) -> None:
        """Write the names; the LoRAs are kept already."""
        (folder / "concepts.json").write_text(json.dumps(list(self.loras)))

    def load(self, folder: Path) -> None:
        """Read the LoRAs."""
        for concept in json.loads((folder / "concepts.json").read_text()):
            self.learn(concept)


class CompressedLoRA(OwnLoRA):
    """Own LoRAs made small after training: a truncated SVD to `keep` ranks, then `bits` bits per number."""

    def __init__(self, bench: Workbench, seed: int, keep: int | None = None, bits: int = 16, **training: Any) -> None:
        super().__init__(bench, seed, **training)
        self.keep, self.bits = keep, bits

    def learn(self, concept: str) -> Lesson:
        """Compress the concept's LoRA."""
        lesson = super().learn(concept)
        layers = {path: self.compressed(factors) for path, factors in self.loras[concept].layers.items()}
        self.loras[concept] = LoRA(layers)
        return lesson

    def compressed(self, factors: Factors) -> Factors:
        """Return one layer's factors, truncated and rounded."""
        left, values, right = thin_svd(factors.up, factors.down)
        root = values[: self.keep].sqrt()
        up, down = left[:, : self.keep] * root, (right[:, : self.keep] * root).mT
        if self.bits < 16:
            up, down = rounded(up, 0, self.bits), rounded(down, 1, self.bits)
        return Factors(up.float().contiguous(), down.float().contiguous(), factors.kernel)

    def costs(self) -> tuple[int, int, int]:
        """Return what all LoRAs store, in units of half-precision numbers; scales of rounded columns are counted."""
        each = []
        for lora in self.loras.values():
            scales = sum(2 * factors.rank for factors in lora.layers.values()) if self.bits < 16 else 0
            each.append(numbers(lora) * self.bits // 16 + scales)
        return sum(each), each[-1], 2 * sum(each)


def rounded(matrix: Tensor, side: int, bits: int) -> Tensor:
    """Return a matrix rounded to signed integers of so many bits, with one scale per rank."""
    most = 2 ** (bits - 1) - 1
    scale = matrix.abs().amax(side, keepdim=True).clamp_min(1e-12) / most
    return (matrix / scale).round() * scale


class MergedLoRA(OwnLoRA):
    """Separate LoRAs merged into one update for all concepts; its scale is the best of those `tried`, multiples of the mean.

    The best is the one with the largest mean over the concepts of (L_base - L) / (L_base - L_own), as the score, but on
    the training pictures.
    """

    every_step = False

    def __init__(self, bench: Workbench, seed: int, way: str = "average", tried: Sequence[float] = (0.3, 1.0, 3.0)) -> None:
        super().__init__(bench, seed)
        self.way, self.tried, self.merged = way, tuple(tried), (0, LoRA({}))

    def update(self, concept: str) -> LoRA:
        """Return the one update for all."""
        if self.merged[0] != len(self.loras):
            self.merged = len(self.loras), self.tuned()
        return self.merged[1]

    def tuned(self) -> LoRA:
        """Return the merge at the best scale."""
        merged, lost = WAYS[self.way](self.updates(), self.seed), self.bench.training_loss
        bounds = {name: (lost(None, name), lost(lora, name)) for name, lora in self.loras.items()}

        def gain(lora: LoRA) -> float:
            return sum((base - lost(lora, name)) / (base - own) for name, (base, own) in bounds.items())

        return max((self.as_lora(merged, scale) for scale in self.tried), key=gain)

    def updates(self) -> Updates:
        """Return the LoRAs as dense updates; a convolution's as a matrix."""
        loras = self.loras.values()
        return {path: torch.stack([product(lora.layers[path]) for lora in loras]) for path in self.bench.shapes}

    def as_lora(self, merged: Updates, scale: float) -> LoRA:
        """Return dense updates as a LoRA of full rank."""
        return LoRA({path: full_rank(scale * matrix.float(), self.bench.shapes[path][1]) for path, matrix in merged.items()})

    def costs(self) -> tuple[int, int, int]:
        """Return what the merge stores: dense matrices, or factors where its rank is the LoRAs' together and they are less."""
        sizes, loras = [shape for shape, _ in self.bench.shapes.values()], self.loras.values()
        ranks = [sum(lora.layers[path].rank for lora in loras) for path in self.bench.shapes]
        narrow = self.way in LOW_RANK
        total = sum(
            min(out * width, rank * (out + width)) if narrow else out * width
            for (out, width), rank in zip(sizes, ranks, strict=True)
        )
        return total, 0, 2 * total


def product(factors: Factors) -> Tensor:
    """Return up @ down (out, in) in double precision, in which its rank can be told."""
    return factors.up.double() @ factors.down.double()


def full_rank(matrix: Tensor, kernel: tuple[int, int] | None) -> Factors:
    """Return a dense update (out, in) as factors of its smaller side's rank."""
    out, width = matrix.shape
    return Factors(torch.eye(out), matrix, kernel) if out <= width else Factors(matrix, torch.eye(width), kernel)


def average(updates: Updates, seed: int) -> Updates:
    """Return the mean of the updates (task arithmetic, up to the scale)."""
    return {path: stack.mean(0) for path, stack in updates.items()}


def ties(updates: Updates, seed: int) -> Updates:
    """Trim every update to its largest entries, elect a sign per entry, and average what agrees (arXiv 2306.01708).

    An entry is large or not among all layers of its update, as in the authors' code.
    """
    sizes = torch.cat([stack.abs().flatten(1) for stack in updates.values()], dim=1)
    least = sizes.topk(max(1, int(DENSITY * sizes.shape[1])), dim=1).values[:, -1]
    return {path: elected(torch.where(stack.abs() >= least[:, None, None], stack, 0)) for path, stack in updates.items()}


def elected(kept: Tensor) -> Tensor:
    """Return the mean of the entries (concepts, out, in) that have the sign of their sum; 0 is no entry."""
    agree = kept * kept.sum(0).sign() > 0
    return (kept * agree).sum(0) / agree.sum(0).clamp_min(1)


def dare(updates: Updates, seed: int) -> Updates:
    """Drop entries at random, rescale the rest, then average (arXiv 2311.03099)."""
    generator = torch.Generator().manual_seed(seed)
    masks = {path: torch.rand(stack.shape, generator=generator) >= DROP for path, stack in updates.items()}
    return {path: (stack * masks[path] / (1 - DROP)).mean(0) for path, stack in updates.items()}


def knots(updates: Updates, seed: int) -> Updates:
    """Align the updates by the SVD of all side by side, then TIES on singular values times right parts (arXiv 2410.19735)."""
    lefts = {path: spanning(stack) for path, stack in updates.items()}
    merged = ties({path: left.mT @ updates[path] for path, left in lefts.items()}, seed)
    return {path: left @ merged[path] for path, left in lefts.items()}


def core(updates: Updates, seed: int) -> Updates:
    """Merge by TIES in the core between the reference bases of all updates (Core Space, arXiv 2509.17786)."""
    sides = {path: (spanning(stack), spanning(stack.mT)) for path, stack in updates.items()}
    merged = ties({path: left.mT @ updates[path] @ right for path, (left, right) in sides.items()}, seed)
    return {path: left @ merged[path] @ right.mT for path, (left, right) in sides.items()}


def spanning(stack: Tensor) -> Tensor:
    """Return the left singular vectors (out, r) of updates (concepts, out, in) side by side, no more than they have ranks."""
    left, values, _ = torch.linalg.svd(torch.cat(list(stack), dim=1), full_matrices=False)
    return left[:, values > NOTHING * values[0]]


WAYS = {"average": average, "ties": ties, "dare": dare, "knots": knots, "core": core}
LOW_RANK = ("average", "knots", "core")  # ways whose result has no more ranks than the LoRAs together
__all__: Sequence[str] = ("CompressedLoRA", "MergedLoRA", "OwnLoRA", "UntouchedBase", "own_lora")
