"""How the learning rate runs over the steps: a pure function of the step, so that a resumed run needs no state of it."""

from __future__ import annotations

import torch

SCHEDULES = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
)


def rate_factor(schedule: str, step: int, steps: int, warmup: int, cycles: int = 1, power: float = 1.0) -> float:
    """Return the learning rate's factor at a step: linear warm-up (but of `constant`), then as the schedule says.

    `cosine_with_restarts` falls `cycles` times, `polynomial` as (1 - progress) ** power.
    """
    if step < warmup and schedule != "constant":
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule == "cosine_with_restarts":
        progress, schedule = progress * cycles % 1.0, "cosine"
    if schedule == "cosine":
        return 0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress)).item())
    if schedule in ("linear", "polynomial"):
        return (1 - progress) ** (power if schedule == "polynomial" else 1)
    if schedule not in SCHEDULES:
        raise ValueError(f"lr_scheduler is {schedule!r}; it is one of {', '.join(SCHEDULES)}")
    return 1.0
