"""What one optimizer step sees, as a pure function of (seed, step): pictures of one size, times, noise, cuts, captions.

Nothing here has a state, so a run that was stopped and resumed, or that runs on another number of processes with the same
batch in all, sees the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from share_diffusion.buckets import bucket_batch
from share_diffusion.captions import Variation
from share_diffusion.objective import Draw, Objective, draw, offset_noise, step_generator
from share_diffusion.picture_set import PictureSet

OFFSET = 49_979_687  # keeps the choice of cuts apart from times and noise


def draw_step(
    pipeline: Any,
    pictures: PictureSet,
    batch: int,
    seed: int,
    step: int,
    objective: Objective | None = None,
    variation: Variation | None = None,
) -> Draw:
    """Return what all processes together see at a step, `batch` pictures."""
    objective = objective or Objective()
    indices = bucket_batch(pictures.buckets, batch, seed, step)
    shape = pictures.shape(int(indices[0]))
    drawn = replace(draw(pipeline, len(pictures), batch, shape, seed, step, objective.weighting), indices=indices)
    if objective.noise_offset:
        drawn = offset_noise(drawn, objective.noise_offset, seed, step)
    if any(len(latents) > 1 for latents in pictures.latents):
        drawn = replace(drawn, variants=torch.rand(batch, generator=step_generator(seed + OFFSET, step)))
    if variation is not None and variation.any:
        captions = [pictures.captions[pictures.places[index]] for index in indices.tolist()]
        drawn = replace(drawn, captions=variation.apply(captions, seed, step))
    return drawn
