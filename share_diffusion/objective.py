"""The denoising objective, as the base's family and its scheduler define it: add noise, and what is to be predicted.

    noisy = signal * latents + sigma * noise

All randomness is a pure function of (seed, step), drawn on the CPU: a run that was stopped and resumed, or that runs on
another device, sees the same pictures, times and noise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    variants: Tensor | None = None  # (n) in [0, 1): which cut of a picture, where there are several
    captions: tuple[str, ...] | None = None  # where they vary from step to step

    def part(self, mine: slice) -> Draw:
        """Return one process's share."""
        variants = None if self.variants is None else self.variants[mine]
        captions = None if self.captions is None else self.captions[mine]
        return Draw(self.indices[mine], self.times[mine], self.noise[mine], variants, captions)


@dataclass(frozen=True)
class Objective:
    """What is minimised; None is off.

    `snr_gamma` weighs diffusion times by min-SNR (Hang et al. 2023), `noise_offset` adds noise that is one value a channel,
    so that a picture's brightness is learned, `weighting` says which times are visited (None: as the family does).
    """

    snr_gamma: float | None = None
    noise_offset: float = 0.0
    weighting: str | None = None

    def problems(self, pipeline: Any) -> list[str]:
        """Return what cannot be meant with this base."""
        problems = []
        if self.snr_gamma is not None and self.snr_gamma <= 0:
            problems.append(f"snr_gamma is {self.snr_gamma}; it is positive, 5 is usual")
        if self.snr_gamma is not None and family_of(pipeline).noise.prediction(pipeline) == "flow":
            problems.append("snr_gamma is for diffusion, this base is a flow model; use --weighting_scheme")
        if not 0 <= self.noise_offset <= 1:
            problems.append(f"noise_offset is {self.noise_offset}; it is 0 to 1, 0.05 is usual")
        return problems


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


def offset_noise(drawn: Draw, offset: float, seed: int, step: int) -> Draw:
    """Return a draw whose noise has one more normal value a picture and channel, `offset` strong."""
    count, channels = drawn.noise.shape[:2]
    values = torch.randn(count, channels, 1, 1, generator=step_generator(seed + 15_485_863, step))
    return replace(drawn, noise=drawn.noise + offset * values)


def time_weights(pipeline: Any, times: Tensor, gamma: float | None) -> Tensor:
    """Return the weight of each time's loss (n): min(SNR, gamma) in terms of what is predicted, or 1."""
    if gamma is None:
        return torch.ones(len(times), device=times.device)
    ratio = signal_to_noise(pipeline, times).clamp_min(1e-8)
    capped = ratio.clamp_max(gamma)
    kind = family_of(pipeline).noise.prediction(pipeline)
    if kind == "epsilon":
        return capped / ratio
    return capped / (ratio + 1) if kind == "v_prediction" else capped
