"""What is trained when a concept is learned: the modes of adaptation, and where new directions come from.

    lora          an ordinary LoRA: up and down of rank r (how the first concept starts an empty subspace)
    coefficients  the shared bases are frozen, only the concept's coefficients (k, p) train
    temporary     the paper's: phi temporary factors, started from the strongest shared columns, and their coefficients
    hybrid        coefficients in the frozen bases, plus phi temporary factors that train as well
    gradient      the bases are extended by phi directions read off the loss's gradient, then only coefficients train

Every mode starts at dW = 0 with one side of each product zero and the other not (both zero is a saddle point), and ends
as an ordinary LoRA in memory, which `Subspace.merge` folds in. Sizes per layer: gradient p (2 k + 2 phi) trainables,
temporary and hybrid phi (out + in + 2 p) (+ 2 k p), lora r (out + in).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from share_diffusion.attached import Attached
from share_diffusion.basis import WORK, Basis, Coefficients, outside, pad_rows, principal_directions
from share_diffusion.layer import Update
from share_diffusion.lora import Factors, LoRA
from share_diffusion.models.layers import shape_of
from share_diffusion.optimizers import FACTOR_RATE, LORA_RATE, RATE

MODES = ("gradient", "coefficients", "temporary", "hybrid", "lora")
SKETCH = 16  # columns of the random sketch of a gradient
START = 0.3  # norm of a starting column of coefficients in frozen bases: what it holds is noise, and little is soon outgrown


@dataclass(frozen=True)
class Adaptation:
    """How a concept is learned: `mode`, p = `pseudo_rank`, phi = `temporary_rank`, r = `rank` of an ordinary LoRA.

    `start` is the norm of the columns that coefficients in frozen bases start from.
    """

    mode: str = "coefficients"
    pseudo_rank: int = 4
    temporary_rank: int = 4
    rank: int = 8
    start: float = START

    def __post_init__(self) -> None:
        problems = [] if self.mode in MODES else [f"adaptation is {self.mode!r}; it is one of {', '.join(MODES)}"]
        for name in ("pseudo_rank", "temporary_rank", "rank"):
            if getattr(self, name) < 1:
                problems.append(f"{name} is {getattr(self, name)}; it is at least 1")
        if not 0 < self.start < float("inf"):
            problems.append(f"start is {self.start}; it is positive and finite (0 with zeros on the other side is a saddle)")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def looks_at_gradient(self) -> bool:
        """Whether the mode needs directions from the gradient."""
        return self.mode in ("gradient", "hybrid")


class LearningPath(nn.Module):
    """One low-rank path in training: alpha (in, k), coefficients (k, p) and (k', p) or none, beta (out, k').

    Bases are laid out alike wherever they come from, a file or a seed: a product's last bit depends on its layout.
    """

    def __init__(
        self,
        alpha: Tensor,
        beta: Tensor,
        pseudo_rank: int | None,
        train_factors: bool,
        generator: torch.Generator,
        start: float = 1.0,
    ) -> None:
        super().__init__()
        if train_factors:
            rows = torch.contiguous_format
            self.alpha, self.beta = (nn.Parameter(side.clone(memory_format=rows)) for side in (alpha, beta))
        else:
            self.register_buffer("alpha", alpha.contiguous(), persistent=False)
            self.register_buffer("beta", beta.contiguous(), persistent=False)
        self.coefficients_alpha = self.coefficients_beta = None
        if pseudo_rank is not None:
            rank = min(pseudo_rank, alpha.shape[1], beta.shape[1])
            columns = torch.randn(alpha.shape[1], rank, generator=generator) / alpha.shape[1] ** 0.5
            self.coefficients_alpha = nn.Parameter(start * columns)
            self.coefficients_beta = nn.Parameter(torch.zeros(beta.shape[1], rank))

    @property
    def is_lora(self) -> bool:
        """Whether the path is an ordinary LoRA: factors without coefficients."""
        return self.coefficients_alpha is None

    def update(self) -> Update:
        """Return the path as an update of the live layer; gradients flow to what trains.

        Coefficients and bases are multiplied here, so that the layer's tokens go through p columns and not through k; the
        product is transposed, because CPU libraries multiply tokens by a few rows faster than by a few columns.
        """
        if self.coefficients_alpha is None or self.coefficients_beta is None:
            return Update(self.alpha, (), self.beta)
        return Update((self.coefficients_alpha.mT @ self.alpha.mT).mT, (), self.beta @ self.coefficients_beta)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return up (out, p) and down (p, in) of the path."""
        update = self.update()
        return update.beta.detach(), update.alpha.detach().mT


class Learner(nn.Module):
    """Everything that trains for one concept; nothing of the base is in it."""

    def __init__(self, paths: Mapping[str, list[LearningPath]], kernels: Mapping[str, tuple[int, int] | None]) -> None:
        super().__init__()
        self.kernels = dict(kernels)
        self.paths = nn.ModuleDict({name.replace(".", "/"): nn.ModuleList(entry) for name, entry in paths.items()})

    def by_layer(self) -> dict[str, list[LearningPath]]:
        """Return the paths of every layer."""
        return {name.replace("/", "."): list(entry) for name, entry in self.paths.items()}  # type: ignore[arg-type]

    def updates(self) -> dict[str, list[Update]]:
        """Return what has to be active on the model while this concept trains."""
        return {name: [path.update() for path in entry] for name, entry in self.by_layer().items()}

    def lora(self) -> LoRA:
        """Return the concept as it stands, as an ordinary LoRA; layers that the loss never reached have no columns."""
        layers = {}
        for name, entry in self.by_layer().items():
            pairs = [path.factors() for path in entry]
            up, down = torch.cat([up for up, _ in pairs], dim=1), torch.cat([down for _, down in pairs], dim=0)
            if up.shape[1] == 0:
                continue
            layers[name] = Factors(up.cpu().float(), down.cpu().float(), self.kernels[name])
        return LoRA(layers, {})

    def start_from(self, coefficients: Mapping[str, Coefficients]) -> None:
        """Set the trainable coefficients to a held concept's."""
        with torch.no_grad():
            for name, (path,) in self.by_layer().items():
                entry = coefficients[name]
                path.coefficients_alpha = nn.Parameter(pad_rows(entry.alpha, path.alpha.shape[1]).clone())
                path.coefficients_beta = nn.Parameter(pad_rows(entry.beta, path.beta.shape[1]).clone())

    def coefficients(self) -> dict[str, Coefficients]:
        """Return the coefficients of a learner that has one frozen path a layer."""
        held = {}
        for name, (path,) in self.by_layer().items():
            assert path.coefficients_alpha is not None
            assert path.coefficients_beta is not None
            held[name] = Coefficients(path.coefficients_alpha.detach().cpu(), path.coefficients_beta.detach().cpu())
        return held

    def parameter_groups(
        self, rate: float = RATE, factor_rate: float | None = None, text_rate: float | None = None
    ) -> list[dict[str, Any]]:
        """Return the optimizer's groups: coefficients at `rate`, temporary factors and LoRAs at `factor_rate`.

        Without `factor_rate` temporary factors have FACTOR_RATE and LoRAs LORA_RATE. With `text_rate` the coefficients of
        text encoders have it, and their factors are slowed down or sped up alike.
        """
        groups: dict[float, list[nn.Parameter]] = {}
        for layer, paths in self.by_layer().items():
            in_text = text_rate is not None and layer.startswith("text_encoder")
            small = text_rate if text_rate is not None and in_text else rate
            pace = small / rate if in_text and rate else 1.0
            for path in paths:
                factors = (LORA_RATE if path.is_lora else FACTOR_RATE) if factor_rate is None else factor_rate
                for name, parameter in path.named_parameters():
                    groups.setdefault(small if "coefficients" in name else factors * pace, []).append(parameter)
        return [{"params": parameters, "lr": found} for found, parameters in groups.items()]

    @property
    def trainables(self) -> int:
        """How many numbers train."""
        return sum(parameter.numel() for parameter in self.parameters())


def make_learner(
    modules: Mapping[str, nn.Module],
    bases: Mapping[str, Basis],
    adaptation: Adaptation,
    directions: Mapping[str, Basis],
    seed: int,
) -> Learner:
    """Return the learner of a concept on these layers; a layer without basis or directions starts as a LoRA.

    `bases` are the shared ones, `directions` new orthonormal columns beside them (from `gradient_directions`).
    """
    generator = torch.Generator().manual_seed(seed)
    paths, kernels = {}, {}
    for name, module in modules.items():
        shape, kernels[name] = shape_of(module)
        basis = bases.get(name, Basis(torch.zeros(shape[1], 0), torch.zeros(shape[0], 0)))
        paths[name] = layer_paths(shape, basis, directions.get(name), adaptation, generator)
    return Learner(paths, kernels)


def layer_paths(
    shape: tuple[int, int], basis: Basis, directions: Basis | None, adaptation: Adaptation, generator: torch.Generator
) -> list[LearningPath]:
    """Return the trainable paths of one layer in the chosen mode."""
    p, phi = adaptation.pseudo_rank, adaptation.temporary_rank
    empty = min(basis.rank) == 0
    if adaptation.mode == "lora" or (empty and directions is None):
        rank = min(adaptation.rank, *shape)
        start = torch.randn(shape[1], rank, generator=generator) / rank**0.5 / shape[1] ** 0.5
        return [LearningPath(start, torch.zeros(shape[0], rank), None, True, generator)]
    if adaptation.mode == "temporary":
        return [LearningPath(basis.alpha[:, :phi], basis.beta[:, :phi], p, True, generator)]
    frozen = [] if empty else [LearningPath(basis.alpha, basis.beta, p, False, generator, adaptation.start)]
    if adaptation.mode == "coefficients":
        return frozen
    assert directions is not None
    if adaptation.mode == "hybrid":
        return [*frozen, LearningPath(directions.alpha, directions.beta, p, True, generator)]
    wide = Basis(torch.cat([basis.alpha, directions.alpha], 1), torch.cat([basis.beta, directions.beta], 1))
    return [LearningPath(wide.alpha, wide.beta, p, False, generator, adaptation.start)]


def gradient_directions(
    attached: Attached,
    bases: Mapping[str, Basis],
    rank: int,
    losses: Callable[[int], Tensor],
    batches: int,
    seed: int,
    average: Callable[[Tensor], Tensor] = lambda sketch: sketch,
) -> dict[str, Basis]:
    """Return, per layer, the `rank` strongest directions of dL/dW0 that the shared bases do not span.

    `losses(i)` computes the loss of batch i through the attached layers. The gradient G (out, in) is never formed: a
    zero factor beside a fixed random one has G @ omega, or G.T @ psi, as its own gradient, a sketch of G's range.
    `average` is applied to every sketch, for processes that each see a part of the batch.
    """
    generator = torch.Generator().manual_seed(seed)
    sketches: dict[str, tuple[Tensor, Tensor]] = {}
    updates: dict[str, list[Update]] = {}
    for name, layer in attached.layers.items():
        (out, width), _ = shape_of(layer)
        like = next(layer.parameters())
        omega = torch.randn(width, SKETCH + rank, generator=generator).to(like.device)
        psi = torch.randn(out, SKETCH + rank, generator=generator).to(like.device)
        up = torch.zeros(out, SKETCH + rank, device=like.device, requires_grad=True)
        down = torch.zeros(width, SKETCH + rank, device=like.device, requires_grad=True)
        sketches[name], updates[name] = (down, up), [Update(omega, (), up), Update(down, (), psi)]
    attached.set(updates)
    for index in range(batches):
        losses(index).backward()
    attached.set({})
    grads = {name: (average(gradient_of(down)), average(gradient_of(up))) for name, (down, up) in sketches.items()}
    return {name: new_basis(bases.get(name), *pair, rank) for name, pair in grads.items()}


def gradient_of(tensor: Tensor) -> Tensor:
    """Return a tensor's gradient, zero where the loss does not depend on it."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def new_basis(basis: Basis | None, alpha: Tensor, beta: Tensor, rank: int) -> Basis:
    """Return the strongest `rank` directions of two sketches outside a basis, as an orthonormal basis of their own."""
    sides = []
    for sketch, held in ((alpha, basis.alpha if basis else None), (beta, basis.beta if basis else None)):
        vectors = sketch.detach().cpu().to(WORK)
        scale = vectors.square().sum().sqrt()
        rest = vectors if held is None else outside(held.to(WORK), vectors)
        directions, energies = principal_directions(rest, scale)
        sides.append(directions[:, : min(rank, int((energies > 0).sum()))].float())
    width = min(sides[0].shape[1], sides[1].shape[1])
    return Basis(sides[0][:, :width], sides[1][:, :width])
