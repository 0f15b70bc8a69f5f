"""Learn a concept from a script of your own: `adapt` in one call, or the parts of its loop for a loop of yours.

    subspace = adapt(pipeline, "photos/", name="mycat", kind="subject", instance_prompt="a photo of mycat")

The pipeline is an ordinary diffusers pipeline; it is left as it was. `train/concept.py` runs on the same parts and adds what
needs several processes, checkpoints and files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from share_diffusion.adapt import Adaptation, Learner, gradient_directions, make_learner
from share_diffusion.attached import Attached
from share_diffusion.basis import Basis
from share_diffusion.calibration import Survey, measured
from share_diffusion.capacity import Capacity
from share_diffusion.data import Dataset, read_dataset, with_trigger
from share_diffusion.learning import Denoiser, Frozen, denoising_loss, fixed_noise_loss, freeze
from share_diffusion.loudness import half_weight
from share_diffusion.models import family_of
from share_diffusion.models.identity import identify, weight_of
from share_diffusion.models.layers import select, shape_of
from share_diffusion.optimizers import RATE, make_optimizer
from share_diffusion.picture_set import PictureSet, prepare_pictures
from share_diffusion.recipe import default_trigger
from share_diffusion.schedules import rate_factor
from share_diffusion.step import draw_step
from share_diffusion.subspace import Origin, Subspace

TARGETS = "attention+ff+conv"  # the layers that are adapted where nothing else is asked for
ORIGIN = Origin("activations", 48)  # of a new subspace: columns measured on its base, stored in four bits a number
HEARD = 4  # batches at fixed noise that tell how loud a concept is
LOOK = 1_000_000_000  # steps that look at the gradient are numbered from here, apart from those that train


def adapt(
    pipeline: Any,
    data: str | Path | Dataset,
    *,
    name: str,
    kind: str = "style",
    trigger: str | None = None,
    instance_prompt: str | None = None,
    subspace: Subspace | None = None,
    adaptation: Adaptation | None = None,
    capacity: Capacity | None = None,
    targets: str = TARGETS,
    train_text_encoder: bool = True,
    resolution: int | None = None,
    steps: int = 400,
    batch: int = 8,
    learning_rate: float = RATE,
    factor_learning_rate: float | None = None,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> Subspace:
    """Learn a concept from a folder of pictures and return the subspace that holds it beside all earlier ones.

    `progress` is called with the number of steps done and the last loss. Raises ValueError, with nothing changed, where
    the data cannot be used or the loss is not finite.
    """
    word = trigger or default_trigger(name, instance_prompt)
    dataset = data if isinstance(data, Dataset) else read_dataset(data, trigger=word, instance_prompt=instance_prompt)
    pictures = prepare_pictures(pipeline, dataset, resolution or family_of(pipeline).native_resolution(pipeline))
    survey = Survey(batch=min(batch, Survey.batch), resolution=resolution)
    subspace = opened(pipeline, subspace, targets, train_text_encoder, survey)
    chosen = adaptation or Adaptation(mode_for(subspace))
    with learning(pipeline, subspace, pictures, chosen, targets, train_text_encoder, batch, seed) as parts:
        learner, model = parts
        groups = learner.parameter_groups(learning_rate, factor_learning_rate)
        optimizer = make_optimizer("adamw", groups, steps=steps)
        rates = [group["lr"] for group in optimizer.param_groups]
        for step in range(steps):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * rate_factor("cosine", step, steps, min(10, steps // 4))
            drawn = draw_step(pipeline, pictures, batch, seed, step)
            loss = denoising_loss(model, pipeline, pictures, drawn, pipeline.device).mean()
            loss.backward()
            if not torch.isfinite(loss):
                raise ValueError(f"the loss is not finite at step {step}; lower learning_rate ({learning_rate:g})")
            torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if progress is not None:
                progress(step + 1, float(loss.detach()))
        half = measured_half_weight(model, pipeline, pictures, batch, seed)
    details = {"prompts": [with_trigger(instance_prompt or word, word)]} | ({"half_weight": half} if half else {})
    about = {"kind": kind, "trigger": word, "details": details}
    return subspace.merge({name: learner.lora()}, capacity=capacity, about={name: about})


def measured_half_weight(model: Denoiser, pipeline: Any, pictures: PictureSet, batch: int, seed: int) -> float | None:
    """Return the weight at which what was trained has half of its effect on its own pictures (see `loudness.py`)."""
    draws = [draw_step(pipeline, pictures, batch, seed, 2 * LOOK + index) for index in range(HEARD)]

    def loss(weight: float) -> float:
        model.weight = weight
        return fixed_noise_loss(model, pipeline, pictures, draws, pipeline.device)

    try:
        return half_weight(loss, loss(0.0), loss(1.0))
    finally:
        model.weight = 1.0


def opened(
    pipeline: Any,
    subspace: Subspace | None = None,
    targets: str = TARGETS,
    train_text_encoder: bool = True,
    survey: Survey | None = None,
) -> Subspace:
    """Return a subspace (an empty one for None) with a basis for every layer that is to be adapted.

    An empty one whose origin is `activations` and has no columns yet is measured on the base, as `survey` says.
    """
    modules = select(pipeline, targets, train_text_encoder)
    identity = identify(pipeline, Path(str(getattr(pipeline.config, "_name_or_path", ""))).name or "base")
    held = subspace or Subspace(base=identity, origin=ORIGIN)
    if mismatch := held.base.mismatch(identity):
        raise ValueError(f"wrong base: {mismatch}; load that base")
    if held.origin.kind == "activations" and held.origin.principal is None:
        held = replace(held, origin=measured(pipeline, modules, held.origin, survey))
    weights = {path: weight_of(module) for path, module in modules.items()}
    return held.cover({path: shape_of(module) for path, module in modules.items()}, weights)


def mode_for(subspace: Subspace) -> str:
    """Return how a concept extends a subspace: by coefficients alone where a new file has columns, else by new ones."""
    return "gradient" if subspace.origin.kind == "adapters" else "coefficients"


@contextmanager
def learning(
    pipeline: Any,
    subspace: Subspace,
    pictures: PictureSet,
    adaptation: Adaptation,
    targets: str = TARGETS,
    train_text_encoder: bool = True,
    batch: int = 8,
    seed: int = 0,
) -> Iterator[tuple[Learner, Denoiser]]:
    """Within the block the pipeline carries a learner; gives (what trains, the forward pass with it).

    The base is frozen in the block and afterwards as it was, to the last bit.
    """
    asked = {parameter: parameter.requires_grad for part in (pipeline.components or {}).values() if isinstance(part, nn.Module)
             for parameter in part.parameters()}  # fmt: skip
    freeze(pipeline)
    modules = select(pipeline, targets, train_text_encoder)
    frozen = Frozen(pipeline)

    def loss(index: int) -> Tensor:
        drawn = draw_step(pipeline, pictures, batch, seed, LOOK + index)
        return denoising_loss(frozen, pipeline, pictures, drawn, pipeline.device).mean()

    try:
        with Attached(pipeline, sorted(modules)) as attached:
            learner = start(attached, modules, subspace, adaptation, loss, seed).to(pipeline.device)
            yield learner, Denoiser(learner, pipeline, attached)
    finally:
        for parameter, wanted in asked.items():
            parameter.requires_grad_(wanted)


def start(
    attached: Attached,
    modules: Mapping[str, nn.Module],
    subspace: Subspace,
    adaptation: Adaptation,
    loss: Callable[[int], Tensor],
    seed: int,
    batches: int = 8,
    average: Callable[[Tensor], Tensor] = lambda sketch: sketch,
) -> Learner:
    """Return what will train; `loss(i)` is that of batch i through the attached layers, looked at where the mode needs it.

    A first concept has no shared bases yet: it gets `adaptation.rank` directions of its own gradient.
    """
    bases = {path: basis for path, basis in subspace.layers.items() if path in modules}
    first = all(min(basis.rank) == 0 for basis in bases.values())
    rank = adaptation.rank if first and adaptation.mode == "gradient" else adaptation.temporary_rank
    wanted = adaptation.looks_at_gradient and not (first and adaptation.mode == "hybrid")
    count = batches if wanted else 1  # one batch all the same: it tells what a step costs
    directions: dict[str, Basis] = gradient_directions(attached, bases, rank, loss, count, seed, average)
    return make_learner(modules, bases, adaptation, directions if wanted else {}, seed)
