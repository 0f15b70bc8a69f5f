"""Where a run begins and what it keeps: its optimizer, and checkpoints with what must be the same to go on from one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from flags import comparable
from start import Run

from share_diffusion.adapt import Learner
from share_diffusion.checkpoint import find_state, save_state
from share_diffusion.optimizers import Average, make_optimizer


@dataclass(frozen=True)
class Beginning:
    """Where the training begins: step 0, or a checkpoint that is restored already."""

    optimizer: torch.optim.Optimizer
    average: Average | None
    rates: list[float]  # of the optimizer's groups, before any schedule
    first: int
    history: list[float]
    recorded: list[tuple[int, float]]


def begin(run: Run, learner: Learner) -> Beginning:
    """Return where the training begins; an optimizer or a checkpoint that does not fit is told before any picture is drawn."""
    settings = run.settings
    groups = learner.parameter_groups(settings.learning_rate, settings.factor_learning_rate, settings.text_encoder_lr)
    optimizer = make_optimizer(settings.optimizer, groups, settings.optimizer_args, run.steps)
    average = Average(learner, settings.ema_decay) if settings.ema_decay else None
    rates = [group["lr"] for group in optimizer.param_groups]
    return Beginning(optimizer, average, rates, *resume(run, learner, optimizer, average))


def facts_of(run: Run) -> dict[str, Any]:
    """Return what a checkpoint must share with the run that goes on from it."""
    facts = {
        "data": run.data,
        "basis_version": run.subspace.basis_version,
        "settings": comparable(run.settings),
        "processes": run.accelerator.num_processes,
    }
    return facts | ({"held": list(run.subspace.concepts)} if run.settings.preserve_weight else {})


def keep_state(
    run: Run,
    step: int,
    learner: Learner,
    optimizer: Any,
    average: Average | None,
    history: list[float],
    recorded: list[tuple[int, float]],
) -> None:
    """Write a checkpoint."""
    tensors: dict[str, Any] = {"learner": learner.state_dict(), "optimizer": optimizer.state_dict(), "losses": history}
    tensors |= {"average": average.state_dict()} if average is not None else {}
    tensors |= {"validations": recorded} if recorded else {}
    if run.accelerator.scaler is not None:
        tensors["scaler"] = run.accelerator.scaler.state_dict()
    save_state(run.folder, step, tensors, facts_of(run), run.settings.checkpoints_total_limit)


def resume(
    run: Run, learner: Learner, optimizer: torch.optim.Optimizer, average: Average | None
) -> tuple[int, list[float], list[tuple[int, float]]]:
    """Restore a checkpoint where one is asked for; refuses one taken with other data or settings."""
    settings, accelerator = run.settings, run.accelerator
    if settings.resume_from_checkpoint is None:
        return 0, [], []
    automatic = settings.resume_from_checkpoint == "auto"
    state, notes = find_state(run.folder, "latest" if automatic else settings.resume_from_checkpoint)
    for note in notes:
        accelerator.print(f"passed over: {note}")
    if state is None:
        if not automatic:
            accelerator.print(f"no checkpoint in {run.folder}; starting at step 0")
        return 0, [], []
    facts = facts_of(run)
    ours, theirs = facts["settings"], state.facts["settings"]
    changes = [f"{key} was {theirs.get(key)!r}, now {ours[key]!r}" for key in ours if ours[key] != theirs.get(key)]
    changes += ["the pictures or captions have changed"] if facts["data"] != state.facts["data"] else []
    changes += ["the subspace file has changed"] if facts["basis_version"] != state.facts["basis_version"] else []
    for key, what in (("processes", "the number of processes"), ("held", "what the file holds, which is preserved,")):
        if facts.get(key) != (before := state.facts.get(key, facts.get(key))):
            changes.append(f"{what} was {before}, now {facts[key]}")
    if changes and automatic:
        accelerator.print(f"the checkpoint of step {state.step} is not this run's ({'; '.join(changes)}); starting at step 0")
        return 0, [], []
    if changes:
        raise ValueError(
            f"cannot resume at step {state.step}: {'; '.join(changes)}. Set them back, or start again without resuming"
        )
    learner.load_state_dict(state.tensors["learner"])
    optimizer.load_state_dict(state.tensors["optimizer"])
    if average is not None:
        average.load_state_dict(state.tensors["average"])
    if accelerator.scaler is not None and "scaler" in state.tensors:
        accelerator.scaler.load_state_dict(state.tensors["scaler"])
    accelerator.print(f"resuming after step {state.step}")
    return state.step, state.tensors["losses"], list(state.tensors.get("validations", []))
