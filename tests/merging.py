"""What tests of fitting, merging and dropping share: small random LoRAs, and dense linear algebra as the truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import pytest
import torch
from torch import Tensor

from share_diffusion.capacity import Capacity
from share_diffusion.file import pack
from share_diffusion.lora import Factors, LoRA
from share_diffusion.subspace import Subspace

Shape = tuple[int, int, tuple[int, int] | None]
SHAPES: dict[str, Shape] = {
    "text_encoder.c": (12, 10, None),
    "unet.a": (20, 12, None),
    "unet.b": (10, 18, (3, 3)),
    "unet.z": (14, 14, None),
}
ONE: dict[str, Shape] = {"unet.a": (20, 12, None)}
ALL = Capacity(retain=None)
ROUNDING = 1e-6  # of float32 coefficients and bases, as a share of energy


def draw(seed: int, shapes: Mapping[str, Shape] = SHAPES, rank: int = 2, scale: float = 1.0) -> LoRA:
    """A random LoRA."""
    generator = torch.Generator().manual_seed(seed)

    def pair(out: int, width: int, kernel: tuple[int, int] | None) -> Factors:
        up = torch.randn(out, rank, generator=generator, dtype=torch.float64) / out**0.5
        return Factors(scale * up, torch.randn(rank, width, generator=generator, dtype=torch.float64), kernel)

    return LoRA({layer: pair(*shape) for layer, shape in shapes.items()})


def only(matrix: Tensor, layer: str = "unet.a") -> LoRA:
    """The LoRA of one dense update."""
    return LoRA({layer: Factors(matrix.double(), torch.eye(matrix.shape[1], dtype=torch.float64))})


def changed(lora: LoRA, change: Callable[[Factors], tuple[Tensor, Tensor]]) -> LoRA:
    """The LoRA with other factors."""
    return LoRA({layer: Factors(*change(entry), entry.kernel) for layer, entry in lora.layers.items()})


def dense(lora: LoRA, layer: str) -> Tensor | float:
    """dW of a layer, 0 where there is none."""
    entry = lora.layers.get(layer)
    return 0.0 if entry is None else entry.up.double() @ entry.down.double()


def truths(subspace: Subspace, name: str, lora: LoRA) -> tuple[float, float]:
    """The share of a concept's energy that is held, once by what is lost and once by what is there."""
    held = subspace.lora(name)
    lost = sum(float((dense(lora, layer) - dense(held, layer)).square().sum()) for layer in lora.layers)
    there = sum(float(torch.as_tensor(dense(held, layer)).square().sum()) for layer in lora.layers)
    return max(0.0, 1 - lost / lora.norm**2), there / lora.norm**2


def error(subspace: Subspace, name: str, lora: LoRA) -> float:
    """||dW - held|| / ||dW|| over all layers."""
    return math.sqrt(1 - truths(subspace, name, lora)[0])


def moments(loras: Iterable[LoRA], layer: str) -> tuple[Tensor, Tensor]:
    """The dense second moments of a layer's two sides (alpha, beta), every concept weighing 1 / ||dW||."""
    updates = [dense(lora, layer) / lora.norm for lora in loras if layer in lora.layers]
    return sum(update.T @ update for update in updates), sum(update @ update.T for update in updates)  # type: ignore


def one_by_one(loras: Mapping[str, LoRA], capacity: Capacity | None = None) -> Subspace:
    """The subspace after a merge of every LoRA in turn."""
    subspace = Subspace()
    for name, lora in loras.items():
        subspace = subspace.merge({name: lora}, capacity=capacity)
    return subspace


def angle(one: Tensor, other: Tensor) -> float:
    """The largest principal angle between two column spaces of equal rank (1 where the ranks differ)."""
    if one.shape[1] != other.shape[1]:
        return 1.0
    rest = one.double() - other.double() @ (other.double().T @ one.double())
    return float(torch.linalg.matrix_norm(rest, 2)) if one.numel() else 0.0


def apart(one: Subspace, other: Subspace) -> float:
    """The largest principal angle between two subspaces over all layers and sides."""
    assert one.layers.keys() == other.layers.keys()
    pairs = [(basis, other.layers[layer]) for layer, basis in one.layers.items()]
    return max(max(angle(a.alpha, b.alpha), angle(a.beta, b.beta)) for a, b in pairs)


def same_concept(one: Subspace, other: Subspace, name: str) -> bool:
    """Whether a concept's coefficients and the columns they belong to are the same bits."""
    ours, theirs = one[name], other[name]
    return (ours.norm, ours.retention, ours.coefficients.keys()) == (
        theirs.norm,
        theirs.retention,
        theirs.coefficients.keys(),
    ) and all(
        torch.equal(entry.alpha, theirs.coefficients[layer].alpha)
        and torch.equal(entry.beta, theirs.coefficients[layer].beta)
        and torch.equal(one.layers[layer].alpha[:, : len(entry.alpha)], other.layers[layer].alpha[:, : len(entry.alpha)])
        and torch.equal(one.layers[layer].beta[:, : len(entry.beta)], other.layers[layer].beta[:, : len(entry.beta)])
        for layer, entry in ours.coefficients.items()
    )


def refusal(action: Callable[[], object]) -> str:
    """The message of the ValueError that an action must raise."""
    with pytest.raises(ValueError) as caught:
        action()
    return str(caught.value)


def correlated(seed: int, count: int, strength: float) -> dict[str, LoRA]:
    """A stream in which every concept repeats a part of the one before."""
    stream: dict[str, LoRA] = {}
    for i in range(count):
        fresh = draw(seed * 100 + i, {layer: SHAPES[layer] for layer in ("unet.a", "unet.b")}, scale=3.0 ** (i % 3))
        last = next(reversed(stream.values())) if stream else fresh
        layers = {
            layer: Factors(
                torch.cat([entry.up, strength * last.layers[layer].up[:, -2:]], 1),
                torch.cat([entry.down, last.layers[layer].down[-2:]]),
                entry.kernel,
            )
            for layer, entry in fresh.layers.items()
        }
        stream[f"c{i}"] = LoRA(layers)
    return stream


def stored_bytes(subspace: Subspace) -> int:
    """Bytes of bases and coefficients in the file."""
    return sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in pack(subspace)[0].items()
        if name not in ("layouts", "details")
    )


WEIGHTS = {layer: draw(77, {layer: shape}, rank=30).layers[layer].dense() for layer, shape in SHAPES.items()}
DERIVED = [("random", None), ("weights", WEIGHTS)]
