"""Learn a foreign LoRA again inside the shared subspace, from what it does instead of what it is.

An adapter from elsewhere lies in directions that are its seed's, so projecting it onto a basis of other concepts keeps
little of it. What it does to pictures needs no such directions: the teacher is base + LoRA, the student base +
coefficients in the frozen shared bases, and the student learns the teacher's prediction. No training picture is needed;
noise is added to latents that the base draws itself, with the teacher on it or not.

The share of the teacher's effect that the student has is its functional retention,

    1 - sum ||student - teacher||^2 / sum ||teacher - base||^2

over noise, times, prompts and latents that were not trained on. It says what pictures say; the retention of a merge
compares weights and is far lower here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from share_diffusion.adapt import Adaptation, Learner, gradient_directions, make_learner
from share_diffusion.attached import Attached
from share_diffusion.basis import Basis, Coefficients, factor_core, project
from share_diffusion.layer import Update
from share_diffusion.learning import Denoiser, Frozen, Materials, fast_attention, rate_factor
from share_diffusion.lora import LoRA
from share_diffusion.models import family_of
from share_diffusion.models.identity import weight_of
from share_diffusion.models.layers import layers as layers_of
from share_diffusion.models.texts import tokenize
from share_diffusion.objective import Draw, add_noise, draw
from share_diffusion.subspace import Subspace

HELD_OUT = 4  # one prompt in so many is kept for measuring
MEASURED_BATCHES = 6
BATCH = 16  # pictures drawn at once
SOURCES = ("teacher", "base", "both")
THINGS = ("a red house", "a blue cat", "a green tree", "a yellow boat", "a white dog", "a purple flower", "a person", "a car")
PLACES = ("in a meadow", "at night", "in a city", "on a beach", "in a room", "in the snow")


@dataclass(frozen=True)
class Distillation:
    """How a LoRA is distilled: optimizer steps, what trains, and what latents noise is added to.

    `directions` new columns a side are added, from the gradient, only where coefficients alone keep less than `effect`.
    """

    steps: int = 200
    batch: int = 8
    rate: float = 2e-2
    pseudo_rank: int = 4
    directions: int = 2
    effect: float = 0.95
    latents: int = 32
    source: str = "teacher"
    drawing_steps: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}; it is at least 1"
            for name in ("steps", "batch", "pseudo_rank", "latents", "drawing_steps")
            if getattr(self, name) < 1
        ]
        problems += [f"directions is {self.directions}; it is 0 or more"] if self.directions < 0 else []
        problems += [f"effect is {self.effect}; it is a share from 0 to 1"] if not 0 <= self.effect <= 1 else []
        problems += [f"source is {self.source!r}; it is one of {', '.join(SOURCES)}"] if self.source not in SOURCES else []
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(frozen=True)
class Distilled:
    """A foreign LoRA inside the subspace, as an ordinary LoRA, and what is kept of it."""

    lora: LoRA
    weights: float  # share of the LoRA's energy that its projection onto the bases has, at the same pseudo-rank
    projected: float  # share of its effect that the projection has
    functional: float  # share of its effect that the student has
    trainables: int
    columns: int  # directions added a side and layer, 0 where the shared bases were enough


def default_prompts(trigger: str, kind: str) -> list[str]:
    """Return prompts with the trigger and as many without it."""
    generic = [f"{thing} {PLACES[number % len(PLACES)]}" for number, thing in enumerate(THINGS)]
    if not trigger:
        return generic
    if kind == "subject":
        return [*generic, *(f"a {trigger} {place}" for place in PLACES), f"a {trigger}", trigger]
    return [*generic, *(f"{trigger} painting of {prompt}" for prompt in generic)]


def distil(
    pipeline: Any,
    subspace: Subspace,
    lora: LoRA,
    prompts: Sequence[str],
    settings: Distillation | None = None,
    progress: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> Distilled:
    """Return the student of a foreign LoRA in the subspace's bases; `progress` hears (step, steps, loss).

    Raises ValueError where the LoRA and the subspace, or the pipeline, have no layer in common.
    """
    settings = settings or Distillation()
    paths, shared = layers_in_common(pipeline, subspace, lora)
    bases = {path: subspace.layers[path] for path in shared}
    with Attached(pipeline, paths) as attached:
        lesson = Lesson(pipeline, attached, lora, prompts, settings)
        learner = start(attached, bases, lora, settings).to(lesson.device)
        weights, projected = learner.lora().norm ** 2 / max(lora.norm**2, 1e-30), lesson.effect(learner.updates())
        lesson.teach(learner, progress)
        functional, columns = lesson.effect(learner.updates()), 0
        if functional < settings.effect and settings.directions:
            learner, columns = widened(lesson, attached, bases, learner, settings), settings.directions
            lesson.teach(learner, progress)
            functional = lesson.effect(learner.updates())
    return Distilled(learner.lora(), weights, projected, functional, learner.trainables, columns)


def layers_in_common(pipeline: Any, subspace: Subspace, lora: LoRA) -> tuple[list[str], list[str]]:
    """Return the layers that teacher or student need, and those that the student has: in the LoRA and with a basis."""
    known = layers_of(pipeline)
    if absent := [path for path in lora.layers if path not in known]:
        raise ValueError(f"{len(absent)} layers of the LoRA are not in this base ({absent[0]}, ...); load the base it is for")
    shared = [path for path in lora.layers if path in subspace.layers and min(subspace.layers[path].rank) > 0]
    if not shared:
        raise ValueError("the subspace has no basis in any layer of this LoRA; merge it without distilling")
    return sorted(lora.layers), shared


class Lesson:
    """The teacher on a live pipeline, the latents and prompts it is asked about, and how a student is doing."""

    def __init__(self, pipeline: Any, attached: Attached, lora: LoRA, prompts: Sequence[str], settings: Distillation) -> None:
        self.pipeline, self.attached, self.settings = pipeline, attached, settings
        self.device = weight_of(next(iter(attached.layers.values()))).device
        self.teacher = {
            path: [Update(entry.down.mT.to(self.device), (), entry.up.to(self.device))] for path, entry in lora.layers.items()
        }
        self.frozen = Frozen(pipeline)
        # Every prompt that is kept for measuring has a neighbour of its sort that is trained on.
        measured = list(prompts[HELD_OUT - 1 :: HELD_OUT]) or list(prompts)
        trained = [prompt for prompt in prompts if prompt not in measured] or list(prompts)
        self.trained, self.measured = self.materials(trained, 0), self.materials(measured, 1)

    def materials(self, prompts: Sequence[str], part: int) -> Materials:
        """Return latents that the base draws of these prompts; `part` 0 and 1 share no seed."""
        settings = self.settings
        count = min(settings.latents, settings.steps * settings.batch)  # no more than are looked at
        count = count if part == 0 else max(8, count // 2)
        asked = [prompts[number % len(prompts)] for number in range(count)]
        sources = {"teacher": (asked, []), "base": ([], asked), "both": (asked[::2], asked[1::2])}
        halves: tuple[list[str], list[str]] = sources[self.settings.source]
        seed = self.settings.seed * 1_000_000 + part * 500_000
        drawn = [
            self.draw_latents(some, updates, seed) for some, updates in zip(halves, (self.teacher, {}), strict=True) if some
        ]
        every = (*halves[0], *halves[1])
        return Materials(torch.cat(drawn), tokenize(family_of(self.pipeline), self.pipeline, every), every)

    def draw_latents(self, prompts: Sequence[str], updates: Mapping[str, list[Update]], seed: int) -> Tensor:
        """Return one picture's latents for each prompt, (n, c, h, w)."""
        latents, steps, family = [], self.settings.drawing_steps, family_of(self.pipeline)
        side = family.native_resolution(self.pipeline)
        with torch.no_grad(), self.active(updates):
            for start in range(0, len(prompts), BATCH):
                some = list(prompts[start : start + BATCH])
                generators = [torch.Generator().manual_seed(seed + start + number) for number in range(len(some))]
                drawn = self.pipeline(
                    some, height=side, width=side, num_inference_steps=steps, generator=generators, output_type="latent"
                )
                latents.append(family.latents_of_drawn(self.pipeline, drawn.images, (side, side)).float().cpu())
        return torch.cat(latents)

    def teach(self, learner: Learner, progress: Callable[[int, int, float], None]) -> None:
        """Train a student on the teacher's predictions."""
        settings = self.settings
        model = Denoiser(learner, self.pipeline, self.attached)
        optimizer = torch.optim.AdamW(learner.parameters(), lr=settings.rate, betas=(0.9, 0.99), weight_decay=0.0)
        for step in range(settings.steps):
            optimizer.param_groups[0]["lr"] = settings.rate * rate_factor("cosine", step, settings.steps, 10)
            loss = self.loss(model, self.trained, self.draw(self.trained, step))
            if not torch.isfinite(loss):
                raise ValueError(f"the loss is not finite at step {step}; distil with a rate below {settings.rate:g}")
            loss.backward()
            nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            progress(step + 1, settings.steps, float(loss.detach()))
        self.attached.set({})

    def draw(self, materials: Materials, step: int) -> Draw:
        """Return which latents a step sees, at which times and with which noise."""
        shape = tuple(materials.latents.shape[1:])
        return draw(self.pipeline, len(materials), self.settings.batch, shape, self.settings.seed, step)

    def loss(self, model: nn.Module, materials: Materials, drawn: Draw) -> Tensor:
        """Return the mean squared distance of a model's prediction to the teacher's."""
        noisy, times, conditions = self.inputs(materials, drawn)
        with torch.no_grad(), self.active(self.teacher):
            wanted = self.frozen(noisy, times, conditions).float()
        with fast_attention(self.device):
            return F.mse_loss(model(noisy, times, conditions).float(), wanted)

    def inputs(self, materials: Materials, drawn: Draw) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return noisy latents, times and the family's inputs of a step, on the device."""
        latents, noise, times = (
            materials.latents_of(drawn, self.device),
            drawn.noise.to(self.device),
            drawn.times.to(self.device),
        )
        noisy = add_noise(self.pipeline, latents, noise, times)
        return noisy, times, materials.conditions_of(drawn, self.device)

    @contextmanager
    def active(self, updates: Mapping[str, Sequence[Update]]) -> Iterator[None]:
        """Make updates active, and afterwards those that were before."""
        before = {path: layer.updates for path, layer in self.attached.layers.items()}
        self.attached.set(updates)
        try:
            yield
        finally:
            self.attached.set(before)

    @torch.no_grad()
    def effect(self, updates: Mapping[str, Sequence[Update]]) -> float:
        """Return the share of the teacher's effect that these updates have, on what was not trained on."""
        missing = whole = 0.0
        for number in range(MEASURED_BATCHES):
            inputs = self.inputs(self.measured, self.draw(self.measured, 5_000_000 + number))
            outputs = []
            for chosen in (self.teacher, updates, {}):
                with self.active(chosen):
                    outputs.append(self.frozen(*inputs).double())
            teacher, student, base = outputs
            missing += float((student - teacher).square().sum())
            whole += float((teacher - base).square().sum())
        return 1 - missing / whole if whole else 1.0


def start(attached: Attached, bases: Mapping[str, Basis], lora: LoRA, settings: Distillation) -> Learner:
    """Return a student that begins as the LoRA's projection onto the bases."""
    modules, adaptation = {path: attached.layers[path] for path in bases}, Adaptation("coefficients", settings.pseudo_rank)
    learner = make_learner(modules, bases, adaptation, {}, settings.seed)
    begun = {}
    for path, basis in bases.items():
        entry = lora.layers[path]
        held = factor_core(project(basis, entry.up, entry.down), min(adaptation.pseudo_rank, *basis.rank))
        begun[path] = alive(Coefficients(held.alpha.float(), held.beta.float()))
    learner.start_from(begun)
    return learner


def alive(entry: Coefficients) -> Coefficients:
    """Return coefficients whose columns can still train: where both sides of one are zero, the input side is not."""
    dead = (entry.alpha.abs().sum(0) + entry.beta.abs().sum(0)) == 0
    if not dead.any():
        return entry
    noise = torch.randn(entry.alpha.shape, generator=torch.Generator().manual_seed(0)) / entry.alpha.shape[0] ** 0.5
    return Coefficients(torch.where(dead, noise, entry.alpha), entry.beta)


def widened(
    lesson: Lesson, attached: Attached, bases: Mapping[str, Basis], learner: Learner, settings: Distillation
) -> Learner:
    """Return the student with room outside the bases, where the teacher's pull on the base points, in all its layers."""

    def losses(index: int) -> Tensor:
        return lesson.loss(lesson.frozen, lesson.trained, lesson.draw(lesson.trained, 7_000_000 + index))

    directions = gradient_directions(attached, bases, settings.directions, losses, 8, settings.seed)
    modules = {path: layer for path, layer in attached.layers.items() if path in bases or min(directions[path].rank) > 0}
    wide = make_learner(modules, bases, Adaptation("gradient", settings.pseudo_rank), directions, settings.seed)
    wide.start_from({**wide.coefficients(), **learner.coefficients()})
    return wide.to(lesson.device)
