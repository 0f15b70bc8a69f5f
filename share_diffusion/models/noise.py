"""What noise does to latents, and which times training visits: diffusion and flow matching, from the scheduler's config.

    noisy = signal(t) * latents + sigma(t) * noise

Only the scheduler's config and its table of alphas are read, never what `set_timesteps` left behind: a pipeline that has
just drawn a picture trains the same. The schedulers' own `add_noise` depends on that state for some classes (Euler's
does, and it leaves the signal unscaled), hence this.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")
WEIGHTINGS = ("uniform", "logit_normal")
EDGE = 1e-5  # flow times stay this far inside (0, 1), where the logit is finite


@dataclass(frozen=True)
class Noise:
    """A noising process; `scales` returns signal and sigma (n, 1, 1, 1), `times` maps a spread (n) in [0, 1) to times (n)."""

    prediction: Callable[[Any], str]  # pipeline -> one of PREDICTIONS: what the denoiser predicts
    scales: Callable[[Any, Tensor], tuple[Tensor, Tensor]]  # pipeline, times -> signal, sigma
    times: Callable[[Any, Tensor, tuple[int, ...], str], Tensor]  # pipeline, spread, latent shape (c, h, w), weighting
    weighting: str  # how training visits the times unless told otherwise, one of WEIGHTINGS


def diffusion_prediction(pipeline: Any) -> str:
    """Return the scheduler's `prediction_type`."""
    kind = pipeline.scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(f"prediction_type is {kind!r}; epsilon, v_prediction and sample are known")
    return kind


def diffusion_scales(pipeline: Any, times: Tensor) -> tuple[Tensor, Tensor]:
    """Return sqrt(alpha_bar) and sqrt(1 - alpha_bar) at integer times."""
    alphas = pipeline.scheduler.alphas_cumprod.to(times.device, torch.float32)[times][:, None, None, None]
    return alphas**0.5, (1 - alphas) ** 0.5


def diffusion_times(pipeline: Any, spread: Tensor, shape: tuple[int, ...], weighting: str = "uniform") -> Tensor:
    """Return integer times below `num_train_timesteps`."""
    count = pipeline.scheduler.config.num_train_timesteps
    return (weighted(spread, weighting) * count).long().clamp_max(count - 1)


def flow_prediction(pipeline: Any) -> str:
    """Return `flow`: the denoiser predicts noise - latents."""
    return "flow"


def flow_scales(pipeline: Any, times: Tensor) -> tuple[Tensor, Tensor]:
    """Return 1 - sigma and sigma, where sigma = time / `num_train_timesteps`."""
    sigma = (times.float() / pipeline.scheduler.config.num_train_timesteps)[:, None, None, None]
    return 1 - sigma, sigma


def flow_times(pipeline: Any, spread: Tensor, shape: tuple[int, ...], weighting: str = "logit_normal") -> Tensor:
    """Return times sigma * `num_train_timesteps`, shifted to noisier ones as the scheduler shifts them when it draws."""
    config = pipeline.scheduler.config
    sigma = weighted(spread.clamp(EDGE, 1 - EDGE), weighting)
    if config.use_dynamic_shifting:
        sigma = pipeline.scheduler.time_shift(dynamic_shift(config, shape), 1.0, sigma)
    else:
        sigma = config.shift * sigma / (1 + (config.shift - 1) * sigma)
    return sigma * config.num_train_timesteps


def dynamic_shift(config: Any, shape: tuple[int, ...]) -> float:
    """Return mu for latents (c, h, w) in patches of 2 x 2: the line through (base_image_seq_len, base_shift) and the max."""
    tokens = (shape[-2] // 2) * (shape[-1] // 2)
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return config.base_shift + slope * (tokens - config.base_image_seq_len)


def weighted(spread: Tensor, weighting: str) -> Tensor:
    """Return a uniform spread as it is, or as the quantiles of a logit-normal (Esser et al. 2024, section 3.1)."""
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting of the times is {weighting!r}; it is one of {', '.join(WEIGHTINGS)}")
    if weighting == "uniform":
        return spread
    return torch.sigmoid(math.sqrt(2) * torch.erfinv(2 * spread - 1))


DIFFUSION = Noise(diffusion_prediction, diffusion_scales, diffusion_times, "uniform")
FLOW = Noise(flow_prediction, flow_scales, flow_times, "logit_normal")
