"""The denoising objective, as the base's own scheduler defines it: add noise, and what is to be predicted.

All randomness is a pure function of (seed, step), drawn on the CPU: a run that was stopped and resumed, or that runs on
another device, sees the same pictures, times and noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """What one optimizer step sees: indices of pictures (n), times (n) and noise (n, c, h, w)."""

    indices: Tensor
    times: Tensor
    noise: Tensor


def step_generator(seed: int, step: int) -> torch.Generator:
    """Return the CPU generator of one step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """Return the order in which an epoch visits `count` pictures."""
    return torch.randperm(count, generator=step_generator(seed + 7_919, epoch))


def batch_indices(count: int, batch: int, seed: int, step: int) -> Tensor:
    """Return the pictures of a step: epoch after epoch, each in its own order, cut into batches."""
    first = step * batch
    places = torch.arange(first, first + batch)
    orders = {epoch: epoch_order(count, seed, epoch) for epoch in range(first // count, (first + batch - 1) // count + 1)}
    return torch.tensor([int(orders[int(place) // count][int(place) % count]) for place in places])


def draw(count: int, batch: int, shape: tuple[int, ...], train_times: int, seed: int, step: int) -> Draw:
    """Return a step's pictures, times and noise; the times are spread evenly over the schedule within the batch."""
    generator = step_generator(seed, step)
    spread = (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch
    return Draw(
        indices=batch_indices(count, batch, seed, step),
        times=(spread * train_times).long().clamp_max(train_times - 1),
        noise=torch.randn(batch, *shape, generator=generator),
    )


def target(scheduler: Any, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """Return what the denoiser should predict, from the scheduler's own `prediction_type`."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, times)
    if kind == "sample":
        return latents
    raise ValueError(f"prediction_type is {kind!r}; epsilon, v_prediction and sample are known")
