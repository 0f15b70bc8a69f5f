"""Live previews: what the denoiser believes the picture to be, long before it is drawn.

Two consecutive latents of a deterministic sampler, x = a x0 + s n at two times, give x0 without another pass through the
model: x0 = (s' x - s x') / (a s' - a' s). Small latents go through the base's own decoder; for large ones a linear map
from latents to colours, fitted to that decoder once, costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from share_diffusion.pictures import to_picture

SMALL = 32 * 32  # positions of a latent up to which the decoder itself is used
SHOWN = 512  # largest side of a preview in pixels
GAP = 4


class Previewer:
    """Turns the latents of one drawing, (n, c, h, w) after every step, into small pictures."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.last: Tensor | None = None
        self.colours: Tensor | None = None

    def start(self) -> None:
        """Forget the last drawing."""
        self.last = None

    def see(self, step: int, latents: Tensor) -> Tensor:
        """Return the picture believed in after step `step`, as latents; remember these for the next."""
        last, self.last = self.last, latents
        times = noise_levels(self.pipeline.scheduler, step)
        if last is None or times is None:
            return latents
        (a, s), (a_next, s_next) = times
        determinant = a * s_next - a_next * s
        return latents if abs(determinant) < 1e-6 else (s_next * last - s * latents) / determinant

    def pictures(self, latents: Tensor) -> list[Image.Image]:
        """Return small pictures of latents."""
        if latents.ndim != 4:
            return []
        if latents.shape[2] * latents.shape[3] <= SMALL:
            return [to_picture(picture) for picture in decoded(self.pipeline.vae, latents).nan_to_num()]
        return self.rough(latents)

    @torch.no_grad()
    def rough(self, latents: Tensor) -> list[Image.Image]:
        """Return pictures by the linear map, one pixel a latent position."""
        if self.colours is None:
            self.colours = fit_colours(self.pipeline, latents.shape[1])
        flat = torch.cat([latents.float(), torch.ones_like(latents[:, :1]).float()], 1)
        pictures = torch.einsum("nchw,cd->ndhw", flat.cpu(), self.colours).clamp(-1, 1)
        return [to_picture(picture) for picture in pictures]


def noise_levels(scheduler: Any, step: int) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """Return (signal, noise) of the latents before and after a step, or None where the sampler does not tell."""
    if step + 1 >= len(scheduler.timesteps):
        return None
    if getattr(scheduler, "init_noise_sigma", 1.0) != 1.0:
        before, after = float(scheduler.sigmas[step]), float(scheduler.sigmas[step + 1])
        return (1.0, before), (1.0, after)
    if not hasattr(scheduler, "alphas_cumprod"):
        return None
    before, after = (float(scheduler.alphas_cumprod[int(scheduler.timesteps[index])]) for index in (step, step + 1))
    return (before**0.5, (1 - before) ** 0.5), (after**0.5, (1 - after) ** 0.5)


@torch.no_grad()
def decoded(vae: Any, latents: Tensor) -> Tensor:
    """Return the pictures (n, 3, height, width) of scaled latents."""
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return vae.decode((latents / vae.config.scaling_factor + shift).to(vae.dtype)).sample.float().clamp(-1, 1)


@torch.no_grad()
def fit_colours(pipeline: Any, channels: int) -> Tensor:
    """Return the linear map (channels + 1, 3) from a latent to the mean colour of its pixels, by least squares."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(4, channels, 4, 4, generator=generator)
    latents = torch.nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear").to(pipeline.vae.device)
    pixels = decoded(pipeline.vae, latents).cpu()
    means = torch.nn.functional.adaptive_avg_pool2d(pixels, (latents.shape[2], latents.shape[3]))
    rows = torch.cat([latents.float().cpu(), torch.ones(4, 1, *latents.shape[2:])], 1).movedim(1, -1).reshape(-1, channels + 1)
    return torch.linalg.lstsq(rows, means.movedim(1, -1).reshape(-1, 3)).solution


def montage(pictures: Sequence[Image.Image], side: int = SHOWN) -> Image.Image:
    """Return pictures side by side in a near-square grid, enlarged or reduced to about `side` pixels in all."""
    columns = max(1, round(len(pictures) ** 0.5 + 0.49))
    rows = -(-len(pictures) // columns)
    width, height = pictures[0].size
    scale = side / max(columns * width, rows * height)
    cell = max(1, round(width * scale)), max(1, round(height * scale))
    method = Image.Resampling.NEAREST if scale > 1 and max(width, height) <= 128 else Image.Resampling.BICUBIC
    sheet = Image.new("RGB", (columns * (cell[0] + GAP) - GAP, rows * (cell[1] + GAP) - GAP), (24, 24, 27))
    for index, picture in enumerate(pictures):
        place = (index % columns) * (cell[0] + GAP), index // columns * (cell[1] + GAP)
        sheet.paste(picture.convert("RGB").resize(cell, method), place)
    return sheet
