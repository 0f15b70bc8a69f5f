"""A small VAE of diffusers' shape, without attention and of any width, for bases that ComfyUI's own VAE cannot hold.

Shapes: pictures (n, 3, h, w) in [-1, 1], latents (n, c, h / f, w / f). Module names are those of diffusers' files.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """Two convolutions with a shortcut."""

    def __init__(self, inside: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, inside, 1e-6), nn.Conv2d(inside, out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, out, 1e-6), nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inside, out, 1) if inside != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(hidden)))


class Resampled(nn.Module):
    """A convolution after doubling the sides, or one that halves them."""

    def __init__(self, width: int, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(width, width, 3, padding=1) if up else nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """Residual blocks, and a change of size on all levels but the last."""

    def __init__(self, inside: int, out: int, layers: int, groups: int, up: bool, last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Residual(out if number else inside, out, groups) for number in range(layers))
        change = nn.ModuleList([] if last else [Resampled(out, up)])
        setattr(self, "upsamplers" if up else "downsamplers", change)
        self.steps = [*self.resnets, *change]

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


class Middle(nn.Module):
    """Two residual blocks."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Residual(width, width, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.resnets[0](x))


class Half(nn.Module):
    """The encoder or the decoder."""

    def __init__(self, config: dict[str, Any], up: bool) -> None:
        super().__init__()
        widths, groups = config["widths"][:: -1 if up else 1], config["groups"]
        ends = (config["latents"], 3) if up else (3, 2 * config["latents"])
        levels = zip([widths[0], *widths[:-1]], widths, strict=True)
        self.conv_in = nn.Conv2d(ends[0], widths[0], 3, padding=1)
        blocks = nn.ModuleList(
            Level(inside, out, config["layers"] + up, groups, up, number == len(widths) - 1)
            for number, (inside, out) in enumerate(levels)
        )
        setattr(self, "up_blocks" if up else "down_blocks", blocks)
        self.mid_block = Middle(widths[0 if up else -1], groups)
        self.steps = [self.mid_block, *blocks] if up else [*blocks, self.mid_block]
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], 1e-6)
        self.conv_out = nn.Conv2d(widths[-1], ends[1], 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for step in self.steps:
            x = step(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class SmallVAE(nn.Module):
    """Encoder and decoder; `decode` and `encode` work on ComfyUI's images (n, h, w, 3) in [0, 1], as its VAE nodes expect."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        latents = config["latents"]
        self.encoder, self.decoder = Half(config, up=False), Half(config, up=True)
        self.quant_conv = nn.Conv2d(2 * latents, 2 * latents, 1)
        self.post_quant_conv = nn.Conv2d(latents, latents, 1)

    @torch.no_grad()
    def decode(self, samples: Tensor, **_: Any) -> Tensor:
        pictures = self.decoder(self.post_quant_conv(samples.to(self.quant_conv.weight)))
        return (pictures / 2 + 0.5).clamp(0, 1).movedim(1, -1).float().cpu()

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        pictures = pixels.movedim(-1, 1).to(self.quant_conv.weight) * 2 - 1
        return self.quant_conv(self.encoder(pictures)).chunk(2, dim=1)[0].float().cpu()
