"""The denoising objective, as the base's family and its scheduler define it: add noise, and what is to be predicted.

    noisy = signal * latents + sigma * noise

All randomness is a pure function of (seed, step), drawn on the CPU: a run that was stopped and resumed, or that runs on
another device, sees the same pictures, times and noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from share_diffusion.models import family_of


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


def draw(
    pipeline: Any, count: int, batch: int, shape: tuple[int, ...], seed: int, step: int, weighting: str | None = None
) -> Draw:
    """Return a step's pictures, times and noise for latents of a shape (c, h, w).

    The times are spread evenly within the batch, then weighted (None: as the family does) and shifted by the scheduler.
    """
    process = family_of(pipeline).noise
    generator = step_generator(seed, step)
    spread = (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch
    return Draw(
        indices=batch_indices(count, batch, seed, step),
        times=process.times(pipeline, spread, shape, weighting or process.weighting),
        noise=torch.randn(batch, *shape, generator=generator),
    )


def add_noise(pipeline: Any, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """Return the noisy latents (n, c, h, w) at times (n)."""
    signal, sigma = family_of(pipeline).noise.scales(pipeline, times)
    return signal * latents + sigma * noise


def target(pipeline: Any, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """Return what the denoiser should predict (n, c, h, w)."""
    process = family_of(pipeline).noise
    signal, sigma = process.scales(pipeline, times)
    kind = process.prediction(pipeline)
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return signal * noise - sigma * latents
    return latents if kind == "sample" else noise - latents


def recover(pipeline: Any, noisy: Tensor, predicted: Tensor, times: Tensor) -> Tensor:
    """Return the latents that a prediction for noisy latents stands for: the inverse of `add_noise` and `target`."""
    process = family_of(pipeline).noise
    signal, sigma = process.scales(pipeline, times)
    kind = process.prediction(pipeline)
    if kind == "epsilon":
        return (noisy - sigma * predicted) / signal
    if kind == "v_prediction":
        return signal * noisy - sigma * predicted
    return predicted if kind == "sample" else noisy - sigma * predicted


def signal_to_noise(pipeline: Any, times: Tensor) -> Tensor:
    """Return (signal / sigma) ** 2 at times (n), for weights of the loss."""
    signal, sigma = family_of(pipeline).noise.scales(pipeline, times)
    return ((signal / sigma) ** 2).flatten()
