"""What a denoiser is called with: how many samples, at which step, and on which grids it will see the picture."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from share_diffusion.models.family import inner

LEVELS = 8


@dataclass(frozen=True)
class Call:
    """One call: `samples`, the time, `grids` (number of image tokens -> height, width), and how many `words` there are."""

    samples: int
    time: float
    grids: Mapping[int, tuple[int, int]]
    words: int


def read_call(denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """Return what a denoiser's forward is called with."""
    names = list(inspect.signature(type(inner(denoiser)).forward).parameters)[1:]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    latents = given["sample"] if "sample" in given else given["hidden_states"]
    states = given.get("encoder_hidden_states")
    return Call(
        samples=latents.shape[0],
        time=float(torch.as_tensor(given["timestep"]).flatten()[0]),
        grids=grids(denoiser, latents, given.get("img_ids")),
        words=states.shape[1] if isinstance(states, Tensor) else 0,
    )


def grids(denoiser: nn.Module, latents: Tensor, places: Tensor | None) -> dict[int, tuple[int, int]]:
    """Return height and width of the picture by number of tokens: a UNet halves it, a transformer cuts it into patches.

    `places` (tokens, 3) are the positions that come with packed latents (tokens in place of height and width).
    """
    if latents.ndim == 4 and hasattr(denoiser, "up_blocks"):
        height, width = latents.shape[-2:]
        sizes = [(-(-height // 2**level), -(-width // 2**level)) for level in range(LEVELS)]
    elif latents.ndim == 4:
        side = int(getattr(denoiser.config, "patch_size", None) or 1)
        sizes = [(latents.shape[-2] // side, latents.shape[-1] // side)]
    elif latents.ndim == 3 and places is not None:
        rows, columns = places.reshape(-1, places.shape[-1])[:, 1:3].amax(0).tolist()
        sizes = [(int(rows) + 1, int(columns) + 1)]
    else:
        sizes = []
    return {height * width: (height, width) for height, width in reversed(sizes)}


def caller(pipeline: Any, denoiser: nn.Module) -> Any:
    """Return the pipeline that is drawing: the nearest one up the stack that holds the denoiser, or else the given one.

    Pipelines share their parts (image to image made of text to image, say), and how many samples guidance adds stands in
    the one that was called, not in the one that was attached to.
    """
    frame = sys._getframe(1)
    while frame is not None:
        one = frame.f_locals.get("self")
        if isinstance(one, DiffusionPipeline) and any(module is denoiser for module in vars(one).values()):
            return one
        frame = frame.f_back
    return pipeline


def progress(pipeline: Any, time: float) -> float:
    """Return how far a call at a time is on the scheduler's whole way, 0 to 1: the middle of its step."""
    times = getattr(getattr(pipeline, "scheduler", None), "timesteps", None)
    if not isinstance(times, Tensor) or not times.numel():
        return 0.0
    times = times.detach().float().cpu()
    whole = float(getattr(pipeline.scheduler.config, "num_train_timesteps", 1000))
    distances = torch.stack([(times - time).abs(), (times - whole * time).abs()])  # some pipelines pass it as a fraction
    return (int(distances[distances.amin(1).argmin()].argmin()) + 0.5) / len(times)


def order_of_samples(pipeline: Any, blends: int, samples: int) -> Tensor:
    """Return which blend each sample of a denoiser's or text encoder's batch belongs to, (samples).

    Guidance puts the samples without prompt before those with it; several pictures of one prompt stand side by side.
    """
    each, rest = divmod(samples, blends)
    if rest or not each:
        raise ValueError(
            f"{blends} blends are set, one a sample, but the model is called with {samples} samples; give {blends} prompts "
            f"(and as many negative prompts), in lists"
        )
    guided = bool(getattr(pipeline, "_guidance_scale", None)) and bool(getattr(pipeline, "do_classifier_free_guidance", False))
    if guided and each % 2:
        raise ValueError(
            f"{blends} blends are set, one a sample, and guidance doubles the {samples // 2} that are drawn at once; give "
            f"{blends} prompts in one call (generate draws 16 at a time: pass batch={blends})"
        )
    halves = 2 if guided else 1
    return torch.arange(blends).repeat_interleave(each // halves).repeat(halves)
