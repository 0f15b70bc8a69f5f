"""Checkpoints of a run: what is kept, and what must be the same before a run goes on from one."""

from __future__ import annotations

from typing import Any

import torch
from flags import comparable
from start import Run

from share_diffusion.adapt import Learner
from share_diffusion.checkpoint import find_state, save_state
from share_diffusion.optimizers import Average


def facts_of(run: Run) -> dict[str, Any]:
    """Return what a checkpoint must share with the run that goes on from it."""
    return {
        "data": run.data,
        "basis_version": run.subspace.basis_version,
        "settings": comparable(run.settings),
    }


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
