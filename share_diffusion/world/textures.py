"""Pictures of nothing in particular, so that the autoencoder keeps what no base scene holds: hatching, dots, cells, noise.

An autoencoder trained on clean scenes alone would smooth away the very marks by which later concepts differ. These
pictures hold no style of `styles.py`, only the general vocabulary of marks at many scales and colours.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from share_diffusion.world.scene import CANVAS, SIDE, Colour, paint, reduce, sample_scene


def _colour(generator: np.random.Generator) -> Colour:
    red, green, blue = (int(channel) for channel in generator.integers(0, 256, 3))
    return red, green, blue


def _scatter(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Scatter shapes of one kind and scale in two colours over the picture."""
    draw = ImageDraw.Draw(image)
    colours = (_colour(generator), _colour(generator))
    scale = generator.uniform(6, 60)
    kind = generator.integers(4)
    for x, y, turn in generator.uniform(0, 1, (int(generator.integers(10, 160)), 3)):
        x, y, colour = x * CANVAS, y * CANVAS, colours[int(turn * 2)]
        if kind == 0:
            draw.ellipse((x - scale / 2, y - scale / 2, x + scale / 2, y + scale / 2), fill=colour)
        elif kind == 1:
            draw.rectangle((x, y, x + scale, y + scale * (0.3 + turn)), fill=colour)
        elif kind == 2:
            angle = 6.28 * turn
            end = (x + 2 * scale * np.cos(angle), y + 2 * scale * np.sin(angle))
            draw.line((x, y, *end), fill=colour, width=int(generator.integers(3, 12)))
        else:
            corners = [(x + dx, y + dy) for dx, dy in generator.uniform(-scale, scale, (3, 2))]
            draw.polygon(corners, fill=colour, outline=colours[0])
    return image


def _stripes(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Lay a straight or crossed grating over the picture."""
    draw = ImageDraw.Draw(image)
    pitch, width, colour = generator.integers(10, 50), int(generator.integers(3, 9)), _colour(generator)
    slope = generator.uniform(-1, 1) * CANVAS
    for x in range(-CANVAS, 2 * CANVAS, int(pitch)):
        draw.line((x, 0, x + slope, CANVAS), fill=colour, width=width)
        if slope > 0.3 * CANVAS:
            draw.line((x, CANVAS, x + slope, 0), fill=colour, width=width)
    return image


def _recolour(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Mix the channels by a random matrix, or keep only the lightness between two colours."""
    pixels = np.asarray(image, dtype=np.float32) / 255
    if generator.random() < 0.5:
        grey = pixels.mean(axis=2, keepdims=True)
        pixels = grey * np.array(_colour(generator)) / 255 + (1 - grey) * np.array(_colour(generator)) / 255
    else:
        pixels = pixels @ (np.eye(3) + generator.normal(0, 0.5, (3, 3))) + generator.normal(0, 0.15, 3)
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


def _noise(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Add grain of a random size and strength."""
    side = int(generator.choice((16, 32, 64)))
    grain = generator.normal(0, generator.uniform(10, 60), (side, side, int(generator.choice((1, 3)))))
    grain = np.repeat(np.repeat(grain, CANVAS // side, axis=0), CANVAS // side, axis=1)
    return Image.fromarray((np.asarray(image, dtype=np.float32) + grain).clip(0, 255).round().astype(np.uint8))


def texture(generator: np.random.Generator) -> Image.Image:
    """Return one 64 x 64 picture: a scene or a plain ground under one to three random marks."""
    if generator.random() < 0.6:
        image = paint(sample_scene(generator))
    else:
        image = Image.new("RGB", (CANVAS, CANVAS), _colour(generator))
    for mark in generator.choice(4, size=int(generator.integers(1, 4)), replace=False):
        image = (_scatter, _stripes, _recolour, _noise)[mark](image, generator)
    return reduce(image, SIDE)
