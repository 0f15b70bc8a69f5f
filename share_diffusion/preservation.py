"""Keep the new concept out of the base's and the earlier concepts' way, without any of their pictures.

Learning never changes what is held, but the new concept is there whenever a blend holds it, and then a prompt for something
else should draw as it would have without it. So at every step one witness is chosen, the frozen base or an earlier concept;
with its core active, the prediction *with* the new concept beside it is pulled towards the prediction *without* it, on
the noisy latents of the current batch and a prompt of the witness's own:

    loss = || model(x_t, t, prompt; dW_witness + dW_new) - model(x_t, t, prompt; dW_witness) ||^2

The base is the witness in every second step; its prompts are the batch's captions with the trigger taken out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from share_diffusion.attached import Attached
from share_diffusion.captions import without_trigger
from share_diffusion.layer import Update
from share_diffusion.learning import Frozen, fast_attention
from share_diffusion.objective import Draw, add_noise, step_generator
from share_diffusion.picture_set import PictureSet
from share_diffusion.subspace import Subspace

OFFSET = 32_452_843  # keeps these draws apart from those of times and noise


@dataclass(frozen=True)
class Witness:
    """What must go on predicting as it does: an earlier concept's updates (none for the base) and prompts for the batch."""

    name: str | None
    updates: Mapping[str, Update]
    prompts: tuple[str, ...]


class Preservation:
    """Chooses witnesses and measures how far the new concept moves them; every choice is a function of (seed, step)."""

    def __init__(self, pipeline: Any, subspace: Subspace, attached: Attached, pictures: PictureSet, trigger: str, seed: int):
        self.pipeline, self.subspace, self.attached = pipeline, subspace, attached
        self.pictures, self.trigger, self.seed = pictures, trigger, seed
        self.frozen = Frozen(pipeline)

    def witness(self, drawn: Draw, step: int) -> Witness:
        """Return the witness of a step."""
        generator = step_generator(self.seed + OFFSET, step)
        names = list(self.subspace.concepts)
        if not names or int(torch.randint(2, (1,), generator=generator)):
            captions = [self.pictures.captions[self.pictures.places[index]] for index in drawn.indices.tolist()]
            return Witness(None, {}, tuple(without_trigger(caption, self.trigger) for caption in captions))
        concept = self.subspace[names[int(torch.randint(len(names), (1,), generator=generator))]]
        prompts = list(concept.details.get("prompts") or [concept.trigger])
        places = torch.randint(len(prompts), (len(drawn.indices),), generator=generator).tolist()
        return Witness(concept.name, concept_updates(self.subspace, concept.name), tuple(prompts[place] for place in places))

    def loss(self, model: nn.Module, drawn: Draw, step: int, device: torch.device) -> Tensor:
        """Return how far the witness's prediction is moved, one value per picture (n)."""
        witness = self.witness(drawn, step)
        noise, times = drawn.noise.to(device), drawn.times.to(device)
        noisy = add_noise(self.pipeline, self.pictures.latents_of(drawn, device), noise, times)
        told = self.pictures.conditions_of(replace(drawn, captions=witness.prompts), device)
        with fast_attention(device, self.pipeline):
            self.attached.set({path: (update,) for path, update in witness.updates.items()})
            with torch.no_grad():
                wanted = self.frozen(noisy, times, told).float()
            moved = model(noisy, times, told, witness.updates)
        return F.mse_loss(moved.float(), wanted, reduction="none").mean(dim=(1, 2, 3))


def concept_updates(subspace: Subspace, name: str) -> dict[str, Update]:
    """Return a held concept as updates of the live layers, by path."""
    layers = subspace.lora(name).layers
    return {path: Update(factors.down.mT.contiguous(), (), factors.up) for path, factors in layers.items()}
