"""Styles of the picture world: whole-picture transforms, from watercolour to woodblock print.

A style takes a scene on the large canvas, (H, W, 3) float32 in [0, 1], and a generator, and returns a picture of the
same shape; it never changes its input. Every length is written in pixels of a 256-pixel canvas and follows the real
height (`span`), so that a style looks the same at any size. Cues are coarse on purpose: a frame, a palette, lines of
four pixels and more. They have to survive the reduction to 64 x 64 and a lossy autoencoder.

    H, W  height and width        K  colours of a palette        N  cells of a tiling
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

Array = npt.NDArray[np.floating]
Labels = npt.NDArray[np.intp]
Tone = tuple[float, float, float]


@dataclass(frozen=True)
class Style:
    """A named look; `keeps_colour` tells whether a scene's colour words still hold for the styled picture."""

    name: str
    apply: Callable[[Array, np.random.Generator], Array]
    description: str
    keeps_colour: bool


# Lengths, fields and masks


def span(picture: Array, pixels: float) -> int:
    """Return a length given on a 256-pixel canvas in this picture's own pixels, at least one."""
    return max(1, round(pixels * picture.shape[0] / 256))


def rows_columns(picture: Array) -> tuple[Array, Array]:
    """Return every pixel's row (H, 1) and column (1, W) in units of a 256-pixel canvas."""
    height, width = picture.shape[:2]
    unit = np.float32(256 / height)
    return np.arange(height, dtype=np.float32)[:, None] * unit, np.arange(width, dtype=np.float32)[None, :] * unit


def ramp(values: Array, low: float, high: float) -> Array:
    """Return 0 below `low`, 1 above `high` and a straight line between."""
    return np.clip((values - np.float32(low)) / np.float32(high - low), 0, 1)


def mix(under: Array | Tone, over: Array | Tone, mask: Array) -> Array:
    """Return `over` where the mask (H, W) is 1, `under` where it is 0, (H, W, 3)."""
    below, above = np.asarray(under, np.float32), np.asarray(over, np.float32)
    return below + (above - below) * mask[..., None]


def clouds(picture: Array, generator: np.random.Generator, cells: int) -> Array:
    """Return smooth random values in [0, 1], (H, W), with about `cells` bumps from side to side."""
    grid = Image.fromarray(generator.random((cells + 1, cells + 1), np.float32))
    height, width = picture.shape[:2]
    return np.clip(np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC), np.float32), 0, 1)


def border(picture: Array) -> Array:
    """Return the distance to the nearest side of the picture, (H, W), in units of a 256-pixel canvas."""
    rows, columns = rows_columns(picture)
    return np.minimum(np.minimum(rows, rows[-1] - rows), np.minimum(columns, columns[:, -1:] - columns))


# Colour


def luminance(picture: Array) -> Array:
    """Return the perceived brightness, (H, W)."""
    return picture @ np.array((0.299, 0.587, 0.114), np.float32)


def saturate(picture: Array, factor: float) -> Array:
    """Return the picture with every colour moved away from its own grey by the factor."""
    grey = luminance(picture)[..., None]
    return np.clip(grey + (picture - grey) * np.float32(factor), 0, 1)


def gradient_map(values: Array, tones: Sequence[Tone]) -> Array:
    """Return the evenly spaced tones looked up at values in [0, 1], (H, W, 3)."""
    stops = np.linspace(0, 1, len(tones))
    table = np.stack([np.interp(np.linspace(0, 1, 256), stops, channel) for channel in zip(*tones, strict=True)], axis=1)
    return table.astype(np.float32)[np.clip(values * 255, 0, 255).astype(np.intp)]


def nearest(colours: Array, palette: Sequence[Tone]) -> Labels:
    """Return the index of the palette's nearest colour for every colour, (..., 3) to (...)."""
    tones = np.asarray(palette, np.float32)
    return np.argmin((tones**2).sum(1) - 2 * colours @ tones.T, axis=-1)


# Filters


def blur(picture: Array, pixels: float) -> Array:
    """Return the Gaussian blur of an (H, W) or (H, W, 3) picture, in 8-bit steps."""
    image = Image.fromarray((np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8))
    soft = image.filter(ImageFilter.GaussianBlur(pixels * picture.shape[0] / 256))
    return np.asarray(soft, np.float32) / 255


def sharpen(picture: Array, pixels: float, factor: float) -> Array:
    """Return the picture with details smaller than `pixels` exaggerated, so that contours outlive coarse cells."""
    return np.clip(picture + np.float32(factor) * (picture - blur(picture, pixels)), 0, 1)


def spread(values: npt.NDArray[Any], pixels: int, darkest: bool = False) -> npt.NDArray[Any]:
    """Return the largest (or smallest) value in a square window `pixels` wide, (H, W, 3)."""
    pick = np.minimum if darkest else np.maximum
    before, after = (pixels - 1) // 2, pixels // 2
    height, width = values.shape[:2]
    padded = np.pad(values, ((before, after), (0, 0), (0, 0)), mode="edge")
    values = reduce(pick, (padded[step : step + height] for step in range(pixels)))
    padded = np.pad(values, ((0, 0), (before, after), (0, 0)), mode="edge")
    return reduce(pick, (padded[:, step : step + width] for step in range(pixels)))


def shift(values: Array, steps: int, axis: int) -> Array:
    """Return the values moved along an axis, the edge repeated."""
    length = values.shape[axis]
    return values.take(np.clip(np.arange(length) - steps, 0, length - 1), axis)


def outline(picture: Array, pixels: float, low: float = 0.12, high: float = 0.3) -> Array:
    """Return lines of the given width wherever any channel changes, in [0, 1], (H, W)."""
    window = span(picture, pixels)
    eight = (np.clip(picture, 0, 1) * 255).astype(np.uint8)  # four times faster than floats, and fine enough
    change = spread(eight, window) - spread(eight, window, darkest=True)
    return ramp(change.max(axis=2).astype(np.float32) / 255, low, high)


def warp(picture: Array, generator: np.random.Generator, pixels: float, cells: int) -> Array:
    """Return the picture with its points moved by smooth random offsets of up to `pixels`."""
    reach = pixels * picture.shape[0] / 128
    rows, columns = np.indices(picture.shape[:2])
    moved_rows = rows + (clouds(picture, generator, cells) - 0.5) * reach
    moved_columns = columns + (clouds(picture, generator, cells) - 0.5) * reach
    height, width = picture.shape[:2]
    return picture[
        np.clip(moved_rows, 0, height - 1).astype(np.intp),
        np.clip(moved_columns, 0, width - 1).astype(np.intp),
    ]


# Tilings


def cell_means(picture: Array, labels: Labels) -> Array:
    """Return each cell's mean colour, (N, 3)."""
    flat = labels.ravel()
    sizes = np.maximum(np.bincount(flat), 1)
    sums = [np.bincount(flat, weights=picture[..., channel].ravel()) for channel in range(3)]
    return (np.stack(sums, axis=1) / sizes[:, None]).astype(np.float32)


def shards(picture: Array, generator: np.random.Generator, pixels: float) -> tuple[Labels, Array]:
    """Return random Voronoi cells about `pixels` wide, labels and distances to the own cell's rim, both (H, W)."""
    rows, columns = rows_columns(picture)
    across, down = int(np.ceil(columns[0, -1] / pixels)) + 2, int(np.ceil(rows[-1, 0] / pixels)) + 2
    jitter = generator.uniform(0.2, 0.8, (2, down, across))
    seeds = ((np.indices((down, across)) - 1 + jitter) * pixels).astype(np.float32)
    cell_row, cell_column = (rows / pixels).astype(np.intp) + 1, (columns / pixels).astype(np.intp) + 1
    first = second = np.full(picture.shape[:2], np.inf, np.float32)
    labels = np.zeros(picture.shape[:2], np.intp)
    for step_row in (-1, 0, 1):
        for step_column in (-1, 0, 1):
            row, column = np.minimum(cell_row + step_row, down - 1), np.minimum(cell_column + step_column, across - 1)
            distance = np.hypot(rows - seeds[0, row, column], columns - seeds[1, row, column])
            closer = distance < first
            second = np.where(closer, first, np.minimum(second, distance))
            first, labels = np.minimum(first, distance), np.where(closer, row * across + column, labels)
    return labels, (second - first) / 2


def bricks(picture: Array, pixels: float) -> tuple[Labels, Array]:
    """Return square tiles in staggered rows, labels and distances to the own tile's rim, both (H, W)."""
    rows, columns = rows_columns(picture)
    row = np.floor(rows / pixels)
    moved = columns + (row % 2 + 1) * np.float32(pixels / 2)
    column = np.floor(moved / pixels)
    inside = np.minimum(np.minimum(rows % pixels, pixels - rows % pixels), np.minimum(moved % pixels, pixels - moved % pixels))
    return (row * (column.max() + 1) + column).astype(np.intp), inside


def mesh(picture: Array, generator: np.random.Generator, pixels: float) -> Array:
    """Return triangles over the whole picture, (N, 3, 2) as (row, column), a corner on each cell's strongest edge."""
    height, width = picture.shape[:2]
    side = span(picture, pixels)
    down, across = -(-height // side), -(-width // side)
    strength = outline(picture, 3) + generator.random((height, width), np.float32)
    strength = np.pad(strength, ((0, down * side - height), (0, across * side - width)))
    cells = strength.reshape(down, side, across, side).swapaxes(1, 2).reshape(down, across, -1)
    place = cells.argmax(axis=2)
    inner = np.stack((place // side, place % side), axis=2) + np.indices((down, across)).transpose(1, 2, 0) * side
    corners = np.pad(inner.astype(np.float32), ((1, 1), (1, 1), (0, 0)), mode="edge")
    corners[[0, -1], :, 0], corners[:, [0, -1], 1] = [[-side], [height + side]], [-side, width + side]
    a, b, c, d = corners[:-1, :-1], corners[:-1, 1:], corners[1:, :-1], corners[1:, 1:]
    rising = (np.indices(a.shape[:2]).sum(axis=0) % 2 == 0)[..., None, None]
    upper = np.where(rising, np.stack((a, b, c), axis=2), np.stack((a, b, d), axis=2))
    lower = np.where(rising, np.stack((d, b, c), axis=2), np.stack((a, c, d), axis=2))
    return np.concatenate((upper.reshape(-1, 3, 2), lower.reshape(-1, 3, 2)))


# Styles


def watercolor(picture: Array, generator: np.random.Generator) -> Array:
    """Soft washes with darker rims that leave a ragged margin of white paper."""
    paper = (0.99, 0.98, 0.95)
    wet = blur(warp(picture, generator, 7, 9), 2.5)
    pigment = (1 - wet) * (0.45 + 0.5 * clouds(picture, generator, 5))[..., None]
    pigment *= (1 + 0.7 * outline(wet, 5, 0.1, 0.5))[..., None]
    pigment *= (0.85 + 0.3 * clouds(picture, generator, 60))[..., None]
    edge = ramp(border(picture) + 26 * clouds(picture, generator, 7), 22, 32)
    return mix(paper, np.clip(1 - pigment, 0, 1), edge)


def ink(picture: Array, generator: np.random.Generator) -> Array:
    """Black pen lines on cream paper, the shadows hatched in two directions."""
    drawn = warp(picture, generator, 4, 14)
    light = blur(luminance(drawn), 2)
    rows, columns = rows_columns(picture)
    hatching = np.zeros_like(light)
    for direction, shade in ((1, 0.55), (-1, 0.25)):
        wave = np.abs((rows + direction * columns) % 20 - 10)
        hatching = np.maximum(hatching, ramp(-wave, -3, -2) * ramp(-light, -shade, -shade + 0.06))
    strokes = outline(drawn, 4, 0.15, 0.35) * (0.85 + 0.15 * clouds(picture, generator, 20))
    return mix((0.96, 0.93, 0.85), (0.07, 0.06, 0.08), np.maximum(strokes, 0.45 * hatching))


def blueprint(picture: Array, generator: np.random.Generator) -> Array:
    """White construction lines on blue paper with a drafting grid."""
    rows, columns = rows_columns(picture)
    offset = generator.uniform(0, 32, 2).astype(np.float32)
    grid = np.maximum(np.abs((rows + offset[0]) % 32 - 16) < 1.6, np.abs((columns + offset[1]) % 32 - 16) < 1.6)
    paper = mix((0.05, 0.2, 0.56), (0.1, 0.29, 0.68), blur(luminance(picture), 2))
    paper = mix(paper, (0.42, 0.6, 0.9), 0.6 * grid.astype(np.float32))
    lines = outline(picture, 3, 0.12, 0.3)
    frame = ramp(-np.abs(border(picture) - 10), -3, -2)
    return mix(paper, (0.95, 0.98, 1.0), np.maximum(lines, frame))


CONSOLE: tuple[Tone, ...] = (
    (0.10, 0.10, 0.14), (0.06, 0.07, 0.24), (0.16, 0.36, 0.86), (0.10, 0.54, 0.70),
    (0.40, 0.74, 0.96), (0.72, 0.88, 0.97), (0.92, 0.95, 0.98), (0.64, 0.72, 0.82),
    (0.50, 0.50, 0.57), (0.87, 0.83, 0.84), (0.50, 0.20, 0.70), (0.98, 0.55, 0.75),
    (0.84, 0.16, 0.16), (0.48, 0.10, 0.12), (0.97, 0.52, 0.10), (0.82, 0.50, 0.24),
    (0.98, 0.84, 0.16), (0.98, 0.86, 0.62), (0.91, 0.78, 0.69), (0.60, 0.40, 0.24),
    (0.30, 0.25, 0.18), (0.45, 0.74, 0.32), (0.19, 0.62, 0.28), (0.12, 0.36, 0.24),
)  # fmt: skip


def pixel(picture: Array, generator: np.random.Generator) -> Array:
    """Large square pixels in the few colours of an old game console."""
    height, width = picture.shape[:2]
    side = span(picture, 12)
    rows, columns = np.arange(height) // side, np.arange(width) // side
    across = int(columns[-1]) + 1
    means = cell_means(sharpen(picture, 8, 0.8), rows[:, None] * across + columns)
    checker = (np.arange(len(means)) // across + np.arange(len(means)) % across) % 2 - 0.5
    means += 0.12 * checker[:, None] + generator.uniform(-0.015, 0.015, means.shape)
    small = np.asarray(CONSOLE, np.float32)[nearest(means, CONSOLE)].reshape(-1, across, 3)
    return small[rows[:, None], columns]


def stainedglass(picture: Array, generator: np.random.Generator) -> Array:
    """Glowing panes of coloured glass in black leads."""
    panes, rim = shards(picture, generator, 58)
    tint = generator.uniform(0.75, 1.25, panes.max() + 1).astype(np.float32)[panes]
    glow = 0.8 + 0.5 * ramp(rim, 0, 22)
    glass = np.clip(saturate(blur(picture, 2), 1.9) * (tint * glow)[..., None], 0, 1)
    leads = np.maximum(ramp(-rim, -3.4, -2.4), outline(picture, 2, 0.35, 0.55))
    return mix(glass, (0.03, 0.03, 0.04), leads)


def neon(picture: Array, generator: np.random.Generator) -> Array:
    """Glowing coloured tubes on a black wall."""
    colour = saturate(spread(picture, span(picture, 7)), 2.2)
    colour = colour / np.maximum(colour.max(axis=2, keepdims=True), 0.2)
    tubes = outline(picture, 3, 0.25, 0.45)
    light = colour * tubes[..., None]
    halo = blur(light, 9) * 1.5 + blur(light, 3) * 0.7
    core = mix(light, (1.0, 1.0, 1.0), 0.35 * tubes)
    flicker = generator.uniform(0.9, 1.1)
    return np.clip(np.maximum(core, np.float32(flicker) * halo) + np.array((0.03, 0.01, 0.06), np.float32), 0, 1)


def mosaic(picture: Array, generator: np.random.Generator) -> Array:
    """Small stone tiles in pale mortar."""
    tiles, rim = bricks(picture, 16)
    sharp = sharpen(saturate(picture, 1.2), 8, 0.8)
    colours = cell_means(sharp, tiles)
    weathering = generator.uniform(0.8, 1.12, (len(colours), 1)).astype(np.float32)
    stones = np.clip((0.6 * colours[tiles] + 0.4 * sharp) * weathering[tiles], 0, 1)
    return mix((0.93, 0.9, 0.82), stones, ramp(rim, 1, 2.2))


def risograph(picture: Array, generator: np.random.Generator) -> Array:
    """Two grainy inks, pink and teal, printed out of register."""
    soft = blur(picture, 1)
    result = np.full_like(picture, 1) * np.array((0.97, 0.95, 0.89), np.float32)
    for channel, tone in ((1, (1.0, 0.3, 0.5)), (0, (0.0, 0.5, 0.6))):
        rows, columns = generator.integers(3, 7, 2) * generator.choice((-1, 1), 2)
        layer = shift(shift(1 - soft[..., channel], span(picture, rows), 0), span(picture, columns), 1)
        grain = clouds(picture, generator, 80)
        cover = ramp(layer + 0.4 * (grain - 0.5), 0.12, 0.75)
        result = result * mix((1.0, 1.0, 1.0), tone, cover)
    return result


def sepia(picture: Array, generator: np.random.Generator) -> Array:
    """A faded brown photograph with dark corners and a white deckle edge."""
    light = 0.12 + 0.76 * blur(luminance(picture), 1.5)
    rows, columns = rows_columns(picture)
    away = np.hypot(rows / rows[-1] - 0.5, columns / columns[:, -1:] - 0.5)
    light = light * (1 - 0.75 * ramp(away, 0.3, 0.72)) + 0.1 * (clouds(picture, generator, 6) - 0.5)
    photo = gradient_map(light, ((0.16, 0.09, 0.04), (0.52, 0.36, 0.2), (0.83, 0.7, 0.5), (0.97, 0.91, 0.78)))
    edge = border(picture) + 3 * clouds(picture, generator, 40)
    return mix((0.95, 0.92, 0.85), photo, ramp(edge, 11, 13))


def halftone(picture: Array, generator: np.random.Generator) -> Array:
    """Pop-art print: fat coloured dots on white inside black contours."""
    rows, columns = rows_columns(picture)
    phase = generator.uniform(0, 18)
    along, across = (rows + columns) * 0.7071 + phase, (rows - columns) * 0.7071 + phase
    away = np.hypot(along % 16 - 8, across % 16 - 8)
    flat = saturate(blur(picture, 3), 1.7)
    radius = 4 + 5.2 * (1 - blur(flat.min(axis=2), 4))
    dots = mix((1.0, 0.99, 0.95), flat, ramp(radius - away, -0.8, 0.8))
    return mix(dots, (0.04, 0.04, 0.05), outline(picture, 3, 0.3, 0.5))


def chalkboard(picture: Array, generator: np.random.Generator) -> Array:
    """Crumbly chalk on a green-grey board in a wooden frame."""
    drawn = warp(picture, generator, 4, 16)
    board = mix((0.1, 0.18, 0.15), (0.19, 0.27, 0.24), clouds(picture, generator, 4))
    crumbs = clouds(picture, generator, 50)
    result = mix(board, saturate(drawn, 1.4), 0.3 * ramp(luminance(drawn), 0.1, 0.5) * (0.4 + 0.6 * crumbs))
    strokes = outline(drawn, 4, 0.2, 0.45) * (0.6 + 0.4 * crumbs)
    result = mix(result, (0.97, 0.97, 0.93), strokes)
    return mix((0.5, 0.32, 0.17), result, ramp(border(picture), 11, 13))


def thermal(picture: Array, generator: np.random.Generator) -> Array:
    """A heat camera's false colours with its scale at the right."""
    heat = blur(picture, 4) @ np.array((0.66, 0.38, -0.2), np.float32) + 0.04
    heat = heat + 0.04 * (clouds(picture, generator, 40) - 0.5)
    rows, columns = rows_columns(picture)
    scale = ((columns > 234) & (columns < 248) & (rows > 24) & (rows < 232)).astype(np.float32)
    heat = heat * (1 - scale) + (1 - (rows - 24) / 208) * scale
    tones = ((0.0, 0.0, 0.25), (0.3, 0.0, 0.6), (0.8, 0.05, 0.5), (1.0, 0.4, 0.05), (1.0, 0.85, 0.1), (1.0, 1.0, 0.9))
    return gradient_map(heat, tones)


WOODBLOCK: tuple[Tone, ...] = (
    (0.10, 0.16, 0.34), (0.18, 0.36, 0.62), (0.52, 0.70, 0.76), (0.93, 0.88, 0.76),
    (0.90, 0.74, 0.32), (0.86, 0.48, 0.20), (0.78, 0.24, 0.18), (0.48, 0.14, 0.14),
    (0.92, 0.58, 0.72), (0.36, 0.52, 0.32), (0.44, 0.24, 0.50), (0.36, 0.28, 0.22),
    (0.50, 0.50, 0.54),
)  # fmt: skip


def ukiyoe(picture: Array, generator: np.random.Generator) -> Array:
    """A woodblock print: few flat faded inks, a sky graded to deep blue, a red seal."""
    rows, columns = rows_columns(picture)
    flat = np.asarray(WOODBLOCK, np.float32)[nearest(blur(picture, 2), WOODBLOCK)]
    grain = np.abs((rows + 10 * clouds(picture, generator, 4)) % 12 - 6) / 6
    printed = mix(flat, (0.94, 0.89, 0.77), 0.14 + 0.14 * grain)
    printed = mix(printed, (0.08, 0.15, 0.36), 0.85 * ramp(-rows, -70, -14) * np.ones_like(columns))
    printed = mix(printed, (0.1, 0.1, 0.16), 0.9 * outline(picture, 3, 0.2, 0.4))
    seal = ((columns > 212) & (columns < 234) & (rows > 190) & (rows < 234)).astype(np.float32)
    printed = mix(printed, (0.8, 0.16, 0.12), seal)
    return mix((0.95, 0.91, 0.81), printed, ramp(border(picture), 9, 11))


def embroidery(picture: Array, generator: np.random.Generator) -> Array:
    """Satin stitches on linen, stretched in a round wooden hoop."""
    rows, columns = rows_columns(picture)
    flat = saturate(blur(picture, 3), 1.15)
    leaning = np.where(nearest(flat, CONSOLE) % 2 == 0, rows + columns, rows - columns)
    thread = np.abs((leaning + 6 * clouds(picture, generator, 12)) % 12 - 6) / 6
    stitched = np.clip(flat * (0.68 + 0.5 * thread)[..., None], 0, 1)
    weave = np.maximum(rows % 12 < 4, columns % 12 < 4).astype(np.float32)
    linen = mix((0.86, 0.8, 0.68), (0.76, 0.69, 0.56), weave)
    away = np.hypot(rows - rows[-1] / 2, columns - columns[:, -1:] / 2)
    hoop = mix((0.72, 0.48, 0.26), (0.45, 0.27, 0.13), ramp(np.abs(away - 122), 2, 6))
    return mix(mix(stitched, hoop, ramp(away, 114, 116)), linen, ramp(away, 128, 130))


def lowpoly(picture: Array, generator: np.random.Generator) -> Array:
    """A mesh of flat triangular facets whose corners sit on the scene's contours, each lit on its own."""
    facets = mesh(picture, generator, 18)
    height, width = picture.shape[:2]
    centres = np.clip(facets.mean(axis=1), 0, (height - 1, width - 1)).astype(np.intp)
    light = generator.uniform(0.74, 1.2, (len(facets), 1))
    soft = blur(picture, 2)
    colours = np.clip(soft[centres[:, 0], centres[:, 1]] * light * 255, 0, 255).astype(np.uint8)
    image = Image.fromarray((soft * 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for facet, colour in zip(facets[..., ::-1].reshape(-1, 6).tolist(), colours.tolist(), strict=True):
        draw.polygon(facet, fill=tuple(colour))
    return np.asarray(image, np.float32) / 255


def delft(picture: Array, generator: np.random.Generator) -> Array:
    """Cobalt brushwork on a white glazed tile with a motif in every corner."""
    drawn = warp(picture, generator, 4, 10)
    wash = 0.75 * (1 - blur(luminance(drawn), 3)) + 0.16 * (clouds(picture, generator, 12) - 0.5)
    glaze = gradient_map(wash, ((0.97, 0.98, 1.0), (0.62, 0.74, 0.93), (0.2, 0.34, 0.74), (0.08, 0.14, 0.5)))
    painted = mix(glaze, (0.07, 0.13, 0.5), outline(drawn, 3, 0.2, 0.45))
    rows, columns = rows_columns(picture)
    corner = np.hypot(np.minimum(rows, rows[-1] - rows), np.minimum(columns, columns[:, -1:] - columns))
    painted = mix(painted, (0.97, 0.98, 1.0), ramp(-corner, -52, -50))
    petals = np.maximum(ramp(-np.abs(corner - 42), -5, -3), ramp(-corner, -28, -26))
    painted = mix(painted, (0.08, 0.16, 0.58), petals)
    return mix((0.97, 0.98, 1.0), painted, ramp(border(picture), 5, 7))


STYLES: dict[str, Style] = {
    style.name: style
    for style in (
        Style("watercolor", watercolor, "soft washes with darker rims on white paper", True),
        Style("ink", ink, "black pen lines and hatching on cream paper", False),
        Style("blueprint", blueprint, "white lines and a grid on blue paper", False),
        Style("pixel", pixel, "large square pixels in the few colours of an old console", True),
        Style("stainedglass", stainedglass, "glowing panes of coloured glass in black leads", True),
        Style("neon", neon, "glowing coloured tubes on a black wall", False),
        Style("mosaic", mosaic, "small stone tiles in pale mortar", True),
        Style("risograph", risograph, "two grainy inks, pink and teal, out of register", False),
        Style("sepia", sepia, "a faded brown photograph with dark corners", False),
        Style("halftone", halftone, "fat coloured dots inside black contours", True),
        Style("chalkboard", chalkboard, "chalk on a green-grey board in a wooden frame", False),
        Style("thermal", thermal, "false colours of a heat camera", False),
        Style("ukiyoe", ukiyoe, "a woodblock print in few flat faded inks", True),
        Style("embroidery", embroidery, "satin stitches in a round wooden hoop", True),
        Style("lowpoly", lowpoly, "flat triangular facets", True),
        Style("delft", delft, "cobalt brushwork on a white glazed tile", False),
    )
}
