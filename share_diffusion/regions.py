"""Regions of a picture as masks at every resolution at which layers see it.

A box is averaged over the cells of a grid exactly enough (16 samples a side), a picture by area. An edge of softness s
rises linearly over s around the box's border, but not where the border is the picture's own; boxes that share an edge
and a softness therefore add up to one everywhere.

    C  columns (the first is the whole picture)        S  samples, 1 where all share a blend
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from share_diffusion.blend import Region

FINE = 16
COARSE = 64
SOFTENED = 256  # pixels a side of a mask whose edge is softened; more would be lost in the softness


def read_mask(name: str, picture: Any) -> Tensor:
    """Return a mask (height, width) in 0..1 of a PIL picture (its lightness) or of such a tensor."""
    if isinstance(picture, Tensor):
        mask = picture.detach().float().cpu()
    else:
        import numpy as np

        mask = torch.from_numpy(np.array(picture.convert("L"), dtype=np.float32)) / 255
    if mask.ndim != 2 or not mask.numel() or not torch.isfinite(mask).all() or mask.min() < 0 or mask.max() > 1:
        raise ValueError(f"mask {name!r} is {tuple(mask.shape)}; it is a picture, or a tensor (height, width) of 0 to 1")
    return mask


def edge(cells: int, low: float, high: float, soft: float) -> Tensor:
    """Return how much of each of `cells` cells on a line lies between low and high, (cells)."""
    at = (torch.arange(cells * FINE) + 0.5) / (cells * FINE)
    if soft:
        rising = ((at - low) / soft + 0.5).clamp(0, 1) if low > 0 else torch.ones_like(at)
        falling = ((high - at) / soft + 0.5).clamp(0, 1) if high < 1 else torch.ones_like(at)
        inside = torch.minimum(rising, falling)
    else:
        inside = ((at >= low) & (at < high)).float()
    return inside.unflatten(0, (cells, FINE)).mean(1)


def rasterise(region: Region | None, masks: Mapping[str, Tensor], height: int, width: int) -> Tensor:
    """Return a region's mask on a grid, (height, width); None is the whole picture."""
    if region is None:
        return torch.ones(height, width)
    if region.box is not None:
        left, top, right, bottom = region.box
        return edge(height, top, bottom, region.soft)[:, None] * edge(width, left, right, region.soft)
    mask = masks[region.mask or ""][None, None]
    return F.interpolate(softened(mask, region.soft) if region.soft else mask, (height, width), mode="area")[0, 0]


def softened(mask: Tensor, soft: float) -> Tensor:
    """Return a mask (1, 1, height, width), a large one made smaller, as its mean over a window of `soft` of its sides."""
    largest = max(mask.shape[-2:])
    if largest > SOFTENED:
        mask = F.interpolate(mask, [max(1, round(side * SOFTENED / largest)) for side in mask.shape[-2:]], mode="area")
    rows, columns = (int(side * soft / 2) for side in mask.shape[-2:])
    mask = F.pad(mask, (columns, columns, rows, rows), mode="replicate")
    mask = F.avg_pool2d(mask, (2 * rows + 1, 1), stride=1)
    return F.avg_pool2d(mask, (1, 2 * columns + 1), stride=1)


class Masks(dict[str, Tensor]):
    """Masks by their names, with the rasters of regions that were made of them."""

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        super().__init__(masks)
        self.rasters: dict[tuple[Region | None, int, int], Tensor] = {}

    def raster(self, region: Region | None, height: int, width: int) -> Tensor:
        """Return a region's mask on a grid, made on first use."""
        key = region, height, width
        if key not in self.rasters:
            self.rasters[key] = rasterise(region, self, height, width)
        return self.rasters[key]


def area(region: Region | None, masks: Masks) -> float:
    """Return the share of the picture that a region covers."""
    return float(masks.raster(region, COARSE, COARSE).mean())


class Field:
    """The masks of some samples' columns, looked up by the layers; `frame` tells it the picture's shape in time.

    `columns` has one list of regions per sample, all of one length, padded with "" where a sample has fewer. Words stand
    at no place: where a layer sees them beside the picture they take `shares` (S, C).
    """

    def __init__(self, columns: Sequence[Sequence[Region | str | None]], masks: Mapping[str, Tensor], shares: Tensor) -> None:
        self.columns, self.shares = columns, shares
        self.masks = masks if isinstance(masks, Masks) else Masks(masks)
        self.index: Tensor | None = None
        self.grids: dict[int, tuple[int, int]] = {}
        self.words = 0
        self.cache: dict[tuple[Any, ...], Tensor] = {}

    def frame(self, grids: Mapping[int, tuple[int, int]], words: int, index: Tensor | None) -> None:
        """Set the grid (height, width) of each number of image tokens, the number of text tokens, and the samples' order."""
        same = (index is None) == (self.index is None) and (index is None or torch.equal(index, self.index))  # type: ignore[arg-type]
        if self.grids != grids or self.words != words or not same:
            self.grids, self.words, self.index, self.cache = dict(grids), words, index, {}

    def map(self, height: int, width: int, like: Tensor) -> Tensor:
        """Return masks (S, C, height, width) in the precision of a tensor and on its device."""
        return self.kept(("map", height, width), like)

    def tokens(self, tokens: int, like: Tensor) -> Tensor:
        """Return masks (S, tokens, C) of a layer that sees so many tokens."""
        return self.kept(("tokens", tokens), like)

    def means(self, like: Tensor) -> Tensor:
        """Return the columns' shares (S, C), for layers that see neither places nor words."""
        return self.kept(("means",), like)

    def kept(self, what: tuple[Any, ...], like: Tensor) -> Tensor:
        """Return masks from the cache, made on first use."""
        key = (*what, like.dtype, like.device)
        if key not in self.cache:
            self.cache[key] = self.make(what).to(like)
        return self.cache[key]

    def make(self, what: tuple[Any, ...]) -> Tensor:
        """Return masks as asked for by `map`, `tokens` or `means`."""
        if what[0] == "means":
            return self.shares if self.index is None else self.shares[self.index]
        if what[0] == "map":
            maps = torch.stack([torch.stack([self.one(entry, *what[1:]) for entry in some]) for some in self.columns])
            return maps if self.index is None else maps[self.index]
        return self.sequence(what[1])

    def one(self, entry: Region | str | None, height: int, width: int) -> Tensor:
        """Return one column's mask; an empty text stands for no column."""
        return torch.zeros(height, width) if isinstance(entry, str) else self.masks.raster(entry, height, width)

    def sequence(self, tokens: int) -> Tensor:
        """Return masks (S, tokens, C) of image tokens, or of text tokens followed by image tokens."""
        picture = tokens if tokens in self.grids else tokens - self.words
        if picture not in self.grids:
            seen = ", ".join(f"{count} ({height} x {width})" for count, (height, width) in self.grids.items()) or "none"
            raise ValueError(
                f"regions: a layer sees {tokens} tokens, which is no grid of this picture (known: {seen}); regions work "
                "with UNets, and with transformers whose tokens are the picture's patches, text tokens in front or apart"
            )
        masks = self.make(("map", *self.grids[picture])).flatten(2).mT
        if picture == tokens:
            return masks
        shares = self.make(("means",))
        return torch.cat([shares[:, None].expand(-1, self.words, -1), masks], dim=1)
