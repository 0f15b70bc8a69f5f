"""The parts of a training loop: a data set as latents and tokens, the forward pass with a learner on it, the loss."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from share_diffusion.adapt import Learner
from share_diffusion.attached import Attached
from share_diffusion.data import Dataset
from share_diffusion.models import stable_diffusion as family
from share_diffusion.objective import Draw, target
from share_diffusion.pictures import fit_picture, open_picture, to_tensor


@dataclass(frozen=True)
class Materials:
    """A data set as the loop needs it: latents (n, c, h, w), token ids (n, tokens), and each picture's file name."""

    latents: Tensor
    tokens: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)


def prepare(pipeline: Any, dataset: Dataset, resolution: int, batch: int = 16) -> Materials:
    """Encode every picture once; a picture with repeats counts as often as it repeats."""
    latents = []
    for start in range(0, len(dataset.examples), batch):
        some = dataset.examples[start : start + batch]
        pictures = torch.stack([to_tensor(fit_picture(open_picture(one.picture), resolution)) for one in some])
        latents.append(family.encode_pictures(pipeline, pictures).cpu())
    places = [place for place, one in enumerate(dataset.examples) for _ in range(one.repeats)]
    tokens = family.tokenize(pipeline, [one.caption for one in dataset.examples])
    return Materials(
        latents=torch.cat(latents)[places],
        tokens=tokens[places],
        names=tuple(dataset.examples[place].picture.name for place in places),
    )


class Denoiser(nn.Module):
    """Text encoder and denoiser with a learner's updates on them; only the learner's parameters belong to it.

    The frozen pipeline is kept out of the module tree, so that wrappers for several processes see what trains alone.
    """

    def __init__(self, learner: Learner, pipeline: Any, attached: Attached) -> None:
        super().__init__()
        self.learner = learner
        self._frozen = (pipeline, attached)

    def forward(self, noisy: Tensor, times: Tensor, tokens: Tensor) -> Tensor:
        pipeline, attached = self._frozen
        attached.set(self.learner.updates())
        return family.predict(pipeline, noisy, times, family.encode_text(pipeline, tokens))


def denoising_loss(model: nn.Module, pipeline: Any, materials: Materials, drawn: Draw, device: torch.device) -> Tensor:
    """Return the mean squared error of the prediction, one value per picture (n)."""
    latents = materials.latents[drawn.indices].to(device)
    noise, times = drawn.noise.to(device), drawn.times.to(device)
    noisy = pipeline.scheduler.add_noise(latents, noise, times)
    wanted = target(pipeline.scheduler, latents, noise, times)
    with fast_attention(device):
        predicted = model(noisy, times, materials.tokens[drawn.indices].to(device))
    return F.mse_loss(predicted.float(), wanted, reduction="none").mean(dim=(1, 2, 3))


class Frozen(nn.Module):
    """The pipeline's own forward pass with whatever updates are set on it, for measuring gradients and losses."""

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        self._frozen = (pipeline,)

    def forward(self, noisy: Tensor, times: Tensor, tokens: Tensor) -> Tensor:
        (pipeline,) = self._frozen
        return family.predict(pipeline, noisy, times, family.encode_text(pipeline, tokens))


@contextlib.contextmanager
def fast_attention(device: torch.device) -> Iterator[None]:
    """Choose the attention whose backward is fast: on a CPU the plain one (1.2 to 1.6 times faster on small maps)."""
    if device.type == "cpu":
        with sdpa_kernel(SDPBackend.MATH):
            yield
    else:
        yield


def freeze(pipeline: Any) -> None:
    """Stop gradients to the base's own weights and switch its dropout off."""
    for module in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        module.requires_grad_(False)
        module.eval()


def bad_pictures(losses: Tensor, drawn: Draw, materials: Materials) -> list[str]:
    """Return the names of the pictures whose loss is not finite, or all of the batch when only the gradient is not."""
    broken = [int(index) for index, loss in zip(drawn.indices, losses, strict=True) if not torch.isfinite(loss)]
    return sorted({materials.names[index] for index in (broken or drawn.indices.tolist())})


def rate_factor(schedule: str, step: int, steps: int, warmup: int) -> float:
    """Return the learning rate's factor at a step: linear warm-up, then constant, cosine or linear decay."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule == "cosine":
        return 0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress)).item())
    return 1 - progress if schedule == "linear" else 1.0


def fixed_noise_loss(
    model: nn.Module, pipeline: Any, materials: Materials, draws: Sequence[Draw], device: torch.device
) -> float:
    """Return the mean loss over fixed draws, to compare states of one concept with each other."""
    with torch.no_grad():
        losses = [denoising_loss(model, pipeline, materials, drawn, device).mean() for drawn in draws]
    return float(torch.stack(losses).mean())
