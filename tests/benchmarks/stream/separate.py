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

import torch
from torch import Tensor

from share_diffusion.adapt import Adaptation, make_learner
from share_diffusion.basis import thin_svd
from share_diffusion.lora import Factors, LoRA
from stream.workbench import Lesson, Workbench

DENSITY = 0.2  # share of an update's entries that TIES keeps (its authors' value)
DROP = 0.5  # share of entries that DARE drops
SCALES = (0.1, 0.3, 1.0, 3.0)  # of the mean, tried on the training pictures


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

    def __init__(self, bench: Workbench, seed: int, keep: int | None = None, bits: int = 16) -> None:
        super().__init__(bench, seed)
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
    """Separate LoRAs merged into one update for all concepts; its scale is the best of a few on the training pictures."""

    every_step = False

    def __init__(self, bench: Workbench, seed: int, way: str = "average") -> None:
        super().__init__(bench, seed)
        self.way, self.merged = way, (0, LoRA({}))

    def update(self, concept: str) -> LoRA:
        """Return the one update for all."""
        if self.merged[0] != len(self.loras):
            self.merged = len(self.loras), self.tuned()
        return self.merged[1]

    def tuned(self) -> LoRA:
        """Return the merge at the scale with the lowest training loss over the concepts."""
        mean = {path: WAYS[self.way](self.stacked(path), self.seed) for path in self.bench.shapes}
        options = [self.as_lora(mean, scale) for scale in SCALES]
        return min(options, key=lambda lora: sum(self.bench.training_loss(lora, concept) for concept in self.loras))

    def stacked(self, path: str) -> Tensor:
        """Return one layer's updates over the concepts, (concepts, out, in); a convolution's as a matrix."""
        return torch.stack([lora.layers[path].dense().double().flatten(1) for lora in self.loras.values()])

    def as_lora(self, mean: dict[str, Tensor], scale: float) -> LoRA:
        """Return dense updates as a LoRA of full rank."""
        return LoRA({path: full_rank(scale * matrix.float(), self.bench.shapes[path][1]) for path, matrix in mean.items()})

    def costs(self) -> tuple[int, int, int]:
        """Return what the merged matrices store."""
        total = sum(out * width for (out, width), _ in self.bench.shapes.values())
        return total, 0, 2 * total


def full_rank(matrix: Tensor, kernel: tuple[int, int] | None) -> Factors:
    """Return a dense update (out, in) as factors of its smaller side's rank."""
    out, width = matrix.shape
    return Factors(torch.eye(out), matrix, kernel) if out <= width else Factors(matrix, torch.eye(width), kernel)


def average(updates: Tensor, seed: int) -> Tensor:
    """Return the mean of the updates (task arithmetic, up to the scale)."""
    return updates.mean(0)


def ties(updates: Tensor, seed: int) -> Tensor:
    """Trim every update to its largest entries, elect a sign per entry, and average what agrees (arXiv 2306.01708)."""
    count = max(1, int(DENSITY * updates[0].numel()))
    least = updates.abs().flatten(1).topk(count, dim=1).values[:, -1]
    kept = torch.where(updates.abs() >= least.view(-1, *[1] * (updates.ndim - 1)), updates, 0)
    agree = kept * kept.sum(0).sign() > 0
    return (kept * agree).sum(0) / agree.sum(0).clamp_min(1)


def dare(updates: Tensor, seed: int) -> Tensor:
    """Drop entries at random, rescale the rest, then average (arXiv 2311.03099)."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(updates.shape, generator=generator) >= DROP
    return (updates * mask / (1 - DROP)).mean(0)


def knots(updates: Tensor, seed: int) -> Tensor:
    """Align the updates by the SVD of all side by side, then TIES on the right parts (KnOTS, arXiv 2410.19735)."""
    wide = torch.cat(list(updates), dim=1)
    left, values, right = torch.linalg.svd(wide, full_matrices=False)
    parts = (values[:, None] * right).unflatten(1, (len(updates), -1)).transpose(0, 1)
    return left @ ties(parts.contiguous(), seed)


def core(updates: Tensor, seed: int) -> Tensor:
    """Merge by TIES in the core between the reference bases of all updates (Core Space, arXiv 2509.17786)."""
    left = torch.linalg.svd(torch.cat(list(updates), dim=1), full_matrices=False)[0]
    right = torch.linalg.svd(torch.cat(list(updates.mT), dim=1), full_matrices=False)[0]
    return left @ ties(left.mT @ updates @ right, seed) @ right.mT


WAYS = {"average": average, "ties": ties, "dare": dare, "knots": knots, "core": core}
__all__: Sequence[str] = ("CompressedLoRA", "MergedLoRA", "OwnLoRA", "UntouchedBase", "own_lora")
