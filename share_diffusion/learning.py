"""The parts of a training loop: a data set as latents and inputs, the forward pass with a learner on it, the loss."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from share_diffusion.adapt import Learner
from share_diffusion.attached import Attached
from share_diffusion.data import Dataset
from share_diffusion.layer import Update, weighted
from share_diffusion.models import family_of
from share_diffusion.models.layers import components
from share_diffusion.models.texts import tokenize
from share_diffusion.objective import Draw, add_noise, target, time_weights
from share_diffusion.pictures import fit_picture, open_picture, to_tensor
from share_diffusion.schedules import rate_factor as rate_factor


@dataclass(frozen=True)
class Materials:
    """A data set as the loop needs it: latents (n, c, h, w), inputs {name: (n, ...)}, and each picture's file name.

    What `inputs` holds is the family's: token ids by text encoder, and how the picture was framed.
    """

    latents: Tensor
    inputs: Mapping[str, Tensor]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def latents_of(self, drawn: Draw, device: torch.device) -> Tensor:
        """Return the latents (n, c, h, w) of a draw."""
        return self.latents[drawn.indices].to(device)

    def mask_of(self, drawn: Draw, device: torch.device) -> Tensor | None:
        """Return None: all of every picture counts."""
        return None

    def conditions_of(self, drawn: Draw, device: torch.device) -> dict[str, Tensor]:
        """Return the family's inputs of a draw."""
        return self.inputs_of(drawn.indices, device)

    def inputs_of(self, indices: Tensor, device: torch.device) -> dict[str, Tensor]:
        """Return the inputs of some pictures, on a device."""
        return {name: tensor[indices].to(device) for name, tensor in self.inputs.items()}


class Source(Protocol):
    """What a loop draws from: `Materials` of one size, or a `PictureSet` with buckets, cuts and masks."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def latents_of(self, drawn: Draw, device: torch.device) -> Tensor: ...

    def mask_of(self, drawn: Draw, device: torch.device) -> Tensor | None: ...

    def conditions_of(self, drawn: Draw, device: torch.device) -> dict[str, Tensor]: ...


def prepare(pipeline: Any, dataset: Dataset, resolution: int, batch: int = 16) -> Materials:
    """Encode every picture once; a picture with repeats counts as often as it repeats."""
    family = family_of(pipeline)
    if resolution < 1 or resolution % family.grain(pipeline):
        raise ValueError(f"resolution is {resolution}; with this base it is a multiple of {family.grain(pipeline)}")
    latents: list[Tensor] = []
    originals: list[tuple[int, int]] = []
    for start in range(0, len(dataset.examples), batch):
        opened = [open_picture(one.picture) for one in dataset.examples[start : start + batch]]
        originals += [(picture.height, picture.width) for picture in opened]
        pictures = torch.stack([to_tensor(fit_picture(picture, resolution)) for picture in opened])
        latents.append(family.encode_pictures(pipeline, pictures).cpu())
    corners = [corner(original, resolution) for original in originals]
    inputs = tokenize(family, pipeline, [one.caption for one in dataset.examples])
    inputs |= family.framing(pipeline, originals, corners, (resolution, resolution))
    places = [place for place, one in enumerate(dataset.examples) for _ in range(one.repeats)]
    return Materials(
        latents=torch.cat(latents)[places],
        inputs={name: tensor[places] for name, tensor in inputs.items()},
        names=tuple(dataset.examples[place].picture.name for place in places),
    )


def corner(original: tuple[int, int], resolution: int) -> tuple[int, int]:
    """Return (top, left) of the centred square in a picture (height, width) scaled to its shorter side's resolution."""
    side = min(original)
    top, left = ((length - side) / 2 * resolution / side for length in original)
    return round(top), round(left)


class Denoiser(nn.Module):
    """Text encoder and denoiser with a learner's updates on them; only the learner's parameters belong to it.

    The frozen pipeline is kept out of the module tree, so that wrappers for several processes see what trains alone.
    """

    def __init__(self, learner: Learner, pipeline: Any, attached: Attached) -> None:
        super().__init__()
        self.learner = learner
        self.weight = 1.0  # at which the learner acts; it trains at 1
        self._frozen = (pipeline, attached)

    def forward(
        self, noisy: Tensor, times: Tensor, inputs: Mapping[str, Tensor], beside: Mapping[str, Update] | None = None
    ) -> Tensor:
        """Return the prediction; `beside` holds updates that are active together with the learner's."""
        pipeline, attached = self._frozen
        updates: dict[str, list[Update]] = self.learner.updates()
        if self.weight != 1:
            updates = weighted(updates, self.weight)
        for path, update in (beside or {}).items():
            updates[path] = [*updates.get(path, ()), update]
        attached.set(updates)
        return predict(pipeline, noisy, times, inputs)


def denoising_loss(
    model: nn.Module, pipeline: Any, materials: Source, drawn: Draw, device: torch.device, snr_gamma: float | None = None
) -> Tensor:
    """Return the mean squared error of the prediction, one value per picture (n); a mask says where it counts."""
    latents = materials.latents_of(drawn, device)
    noise, times = drawn.noise.to(device), drawn.times.to(device)
    noisy = add_noise(pipeline, latents, noise, times)
    wanted = target(pipeline, latents, noise, times)
    with fast_attention(device, pipeline):
        predicted = model(noisy, times, materials.conditions_of(drawn, device))
    errors = F.mse_loss(predicted.float(), wanted, reduction="none")
    mask = materials.mask_of(drawn, device)
    if mask is None:
        losses = errors.mean(dim=(1, 2, 3))
    else:
        losses = (errors * mask).sum(dim=(1, 2, 3)) / (mask.sum(dim=(1, 2, 3)) * errors.shape[1]).clamp_min(1)
    return losses if snr_gamma is None else losses * time_weights(pipeline, times, snr_gamma)


class Frozen(nn.Module):
    """The pipeline's own forward pass with whatever updates are set on it, for measuring gradients and losses."""

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        self._frozen = (pipeline,)

    def forward(self, noisy: Tensor, times: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        (pipeline,) = self._frozen
        return predict(pipeline, noisy, times, inputs)


def predict(pipeline: Any, noisy: Tensor, times: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the denoiser's prediction (n, c, h, w); gradients flow into text encoders as well.

    Inputs that already hold `states` are not encoded again.
    """
    family = family_of(pipeline)
    encoded = {} if "states" in inputs else family.encode_text(pipeline, inputs)
    return family.predict(pipeline, noisy, times, {**inputs, **encoded})


@contextlib.contextmanager
def fast_attention(device: torch.device, pipeline: Any = None) -> Iterator[None]:
    """Choose the attention whose backward is fast: on a CPU the plain one (1.2 to 1.6 times faster on small maps).

    Not where a `pipeline` recomputes activations in the backward pass, which happens outside of this block and must do the
    same.
    """
    if device.type == "cpu" and not (pipeline is not None and recomputes(pipeline)):
        with sdpa_kernel(SDPBackend.MATH):
            yield
    else:
        yield


def recomputes(pipeline: Any) -> bool:
    """Tell whether gradient checkpointing is on in a part of the pipeline."""
    parts = (part for module in components(pipeline).values() for part in module.modules())
    return any(vars(part).get("gradient_checkpointing", False) for part in parts)


def freeze(pipeline: Any) -> None:
    """Stop gradients to the base's own weights and switch its dropout off."""
    for module in (*components(pipeline).values(), pipeline.vae):
        module.requires_grad_(False)
        module.eval()


def bad_pictures(losses: Tensor, drawn: Draw, materials: Source) -> list[str]:
    """Return the names of the pictures whose loss is not finite, or all of the batch when only the gradient is not."""
    broken = [int(index) for index, loss in zip(drawn.indices, losses, strict=True) if not torch.isfinite(loss)]
    return sorted({materials.names[index] for index in (broken or drawn.indices.tolist())})


def fixed_noise_loss(model: nn.Module, pipeline: Any, materials: Source, draws: Sequence[Draw], device: torch.device) -> float:
    """Return the mean loss over fixed draws, to compare states of one concept with each other."""
    with torch.no_grad():
        losses = [denoising_loss(model, pipeline, materials, drawn, device).mean() for drawn in draws]
    return float(torch.stack(losses).mean())
