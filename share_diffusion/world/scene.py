"""The picture world: scenes with known factors, drawn by a program, described by a grammar.

A scene is one to three equal subjects of one colour at one place. Every factor is known, so a judge can be trained on it,
a caption can be written from it, and a combination can be held out of training. Scenes are drawn hard-edged on a
CANVAS of 256 x 256 and reduced to 64 x 64, which anti-aliases them; styles (`styles.py`) and characters
(`characters.py`) act on the large canvas, before the reduction.

Everything here is a pure function of its arguments: the same `Scene` gives the same pixels on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

CANVAS = 256
SIDE = 64

Colour = tuple[int, int, int]
Point = tuple[float, float]

COLOURS: dict[str, Colour] = {
    "red": (214, 40, 40),
    "orange": (247, 130, 20),
    "yellow": (250, 214, 40),
    "green": (48, 158, 70),
    "blue": (40, 92, 220),
    "purple": (126, 52, 178),
    "pink": (250, 140, 190),
    "white": (246, 246, 246),
}
OUTLINE: Colour = (34, 32, 40)
COUNTS = ("a", "two", "three")
SIZES = ("small", "", "large")
SIDES = ("on the left", "", "on the right")


def shade(colour: Colour, factor: float) -> Colour:
    """Return the colour darkened (factor < 1) or lightened towards white (factor > 1)."""
    if factor <= 1:
        red, green, blue = (round(channel * factor) for channel in colour)
    else:
        red, green, blue = (round(channel + (255 - channel) * (factor - 1)) for channel in colour)
    return red, green, blue


@dataclass(frozen=True)
class Pen:
    """Draws in a subject's own coordinates: x to the right, y down, the subject filling [-1, 1] on both axes."""

    draw: ImageDraw.ImageDraw
    x: float
    y: float
    size: float

    def at(self, point: Point) -> Point:
        return self.x + point[0] * self.size / 2, self.y + point[1] * self.size / 2

    @property
    def width(self) -> int:
        return max(3, round(self.size / 28))

    def polygon(self, points: Sequence[Point], fill: Colour) -> None:
        corners = [self.at(point) for point in points]
        self.draw.polygon(corners, fill=fill)
        self.draw.line([*corners, corners[0], corners[1]], fill=OUTLINE, width=self.width, joint="curve")

    def ellipse(self, centre: Point, radius: Point, fill: Colour) -> None:
        left, top = self.at((centre[0] - radius[0], centre[1] - radius[1]))
        right, bottom = self.at((centre[0] + radius[0], centre[1] + radius[1]))
        self.draw.ellipse((left, top, right, bottom), fill=fill, outline=OUTLINE, width=self.width)

    def box(self, corner: Point, opposite: Point, fill: Colour) -> None:
        self.polygon([corner, (opposite[0], corner[1]), opposite, (corner[0], opposite[1])], fill)

    def line(self, points: Sequence[Point], fill: Colour = OUTLINE, thickness: float = 1.0) -> None:
        self.draw.line([self.at(p) for p in points], fill=fill, width=round(self.width * thickness), joint="curve")

    def half(self, centre: Point, radius: Point, start: float, end: float, fill: Colour) -> None:
        """Draw a filled arc from `start` to `end` degrees (0 = right, 90 = down)."""
        angles = np.radians(np.linspace(start, end, 33))
        self.polygon([(centre[0] + radius[0] * math.cos(a), centre[1] + radius[1] * math.sin(a)) for a in angles], fill)


def house(pen: Pen, colour: Colour) -> None:
    pen.box((-0.7, -0.1), (0.7, 1.0), colour)
    pen.polygon([(-0.95, -0.08), (0.0, -0.95), (0.95, -0.08)], shade(colour, 0.6))
    pen.box((-0.18, 0.35), (0.2, 1.0), shade(colour, 0.4))
    pen.box((0.34, 0.15), (0.58, 0.45), (190, 226, 250))
    pen.box((-0.58, 0.15), (-0.34, 0.45), (190, 226, 250))


def tree(pen: Pen, colour: Colour) -> None:
    pen.box((-0.16, 0.2), (0.16, 1.0), (112, 72, 40))
    for centre, radius in (((-0.42, 0.05), 0.42), ((0.42, 0.05), 0.42), ((0.0, -0.42), 0.55)):
        pen.ellipse(centre, (radius, radius), colour)
    pen.draw.ellipse((*pen.at((-0.42, -0.4)), *pen.at((0.42, 0.3))), fill=colour)


def cat(pen: Pen, colour: Colour) -> None:
    pen.line([(0.5, 0.85), (0.88, 0.6), (0.8, 0.1)], colour, 4.0)
    pen.ellipse((0.0, 0.55), (0.55, 0.47), colour)
    for side in (-1, 1):
        pen.polygon([(side * 0.6, -0.35), (side * 0.55, -1.0), (side * 0.1, -0.7)], shade(colour, 0.75))
    pen.ellipse((0.0, -0.3), (0.6, 0.48), colour)
    for side in (-1, 1):
        pen.ellipse((side * 0.25, -0.38), (0.09, 0.13), (30, 30, 30))
        pen.line([(side * 0.25, -0.08), (side * 0.8, -0.16)], thickness=0.7)
    pen.polygon([(-0.1, -0.18), (0.1, -0.18), (0.0, -0.05)], (240, 120, 130))


def fish(pen: Pen, colour: Colour) -> None:
    pen.polygon([(0.4, 0.0), (1.0, -0.5), (0.85, 0.0), (1.0, 0.5)], shade(colour, 0.7))
    pen.polygon([(-0.2, -0.4), (0.2, -0.8), (0.35, -0.3)], shade(colour, 0.7))
    pen.ellipse((-0.2, 0.0), (0.75, 0.48), colour)
    pen.ellipse((-0.62, -0.1), (0.13, 0.13), (250, 250, 250))
    pen.ellipse((-0.64, -0.1), (0.05, 0.05), (20, 20, 20))
    pen.line([(-0.25, -0.3), (-0.15, 0.0), (-0.25, 0.3)], shade(colour, 0.5))


def car(pen: Pen, colour: Colour) -> None:
    pen.polygon([(-0.55, 0.05), (-0.35, -0.45), (0.35, -0.45), (0.6, 0.05)], (190, 226, 250))
    pen.line([(0.02, -0.45), (0.02, 0.05)])
    pen.polygon([(-1, 0.55), (-1, 0.1), (-0.6, 0.0), (0.7, 0.0), (1, 0.2), (1, 0.55)], colour)
    for x in (-0.55, 0.55):
        pen.ellipse((x, 0.55), (0.25, 0.25), (40, 40, 44))
        pen.ellipse((x, 0.55), (0.1, 0.1), (200, 200, 200))


def boat(pen: Pen, colour: Colour) -> None:
    pen.line([(0.0, 0.4), (0.0, -1.0)], (112, 72, 40), 2.0)
    pen.polygon([(0.08, -0.95), (0.8, 0.25), (0.08, 0.25)], (250, 250, 246))
    pen.polygon([(-0.08, -0.75), (-0.6, 0.25), (-0.08, 0.25)], (232, 232, 226))
    pen.polygon([(-1.0, 0.4), (1.0, 0.4), (0.65, 0.9), (-0.65, 0.9)], colour)


def flower(pen: Pen, colour: Colour) -> None:
    pen.line([(0.0, 0.0), (0.0, 1.0)], (40, 120, 50), 2.5)
    pen.ellipse((0.25, 0.7), (0.25, 0.11), (60, 150, 70))
    for turn in range(6):
        angle = math.pi * turn / 3
        pen.ellipse((0.45 * math.cos(angle), -0.35 + 0.45 * math.sin(angle)), (0.3, 0.3), colour)
    pen.ellipse((0.0, -0.35), (0.24, 0.24), (120, 74, 30))


def mushroom(pen: Pen, colour: Colour) -> None:
    pen.polygon([(-0.25, 0.0), (0.25, 0.0), (0.35, 1.0), (-0.35, 1.0)], (240, 228, 204))
    pen.half((0.0, 0.15), (0.95, 0.95), 180, 360, colour)
    for x, y, radius in ((-0.45, -0.15, 0.15), (0.1, -0.45, 0.17), (0.52, -0.08, 0.13)):
        pen.ellipse((x, y), (radius, radius), (252, 250, 240))


def rocket(pen: Pen, colour: Colour) -> None:
    pen.polygon([(-0.22, 0.6), (0.22, 0.6), (0.0, 1.0)], (255, 170, 30))
    for side in (-1, 1):
        pen.polygon([(side * 0.3, 0.1), (side * 0.75, 0.7), (side * 0.3, 0.6)], shade(colour, 0.6))
    pen.polygon([(0.0, -1.0), (0.26, -0.55), (0.34, 0.0), (0.3, 0.62), (-0.3, 0.62), (-0.34, 0.0), (-0.26, -0.55)], colour)
    pen.ellipse((0.0, -0.2), (0.16, 0.16), (190, 226, 250))


def cup(pen: Pen, colour: Colour) -> None:
    pen.ellipse((0.62, 0.2), (0.34, 0.34), colour)
    pen.ellipse((0.62, 0.2), (0.17, 0.17), (226, 222, 214))
    pen.polygon([(-0.75, -0.35), (0.65, -0.35), (0.5, 0.9), (-0.6, 0.9)], colour)
    pen.ellipse((-0.05, -0.35), (0.7, 0.17), (96, 58, 34))
    for x in (-0.3, 0.15):
        pen.line([(x, -0.6), (x + 0.1, -0.75), (x, -0.9)], (240, 240, 240), 1.6)


def umbrella(pen: Pen, colour: Colour) -> None:
    pen.line([(0.0, -0.9), (0.0, 0.8), (0.1, 0.92), (0.25, 0.92), (0.32, 0.78)], (96, 62, 40), 2.0)
    pen.half((0.0, 0.05), (0.98, 0.9), 180, 360, colour)
    pen.half((0.0, 0.05), (0.35, 0.9), 180, 360, shade(colour, 0.72))


def butterfly(pen: Pen, colour: Colour) -> None:
    for side in (-1, 1):
        pen.polygon([(side * 0.06, 0.0), (side * 0.5, -0.85), (side * 1.0, -0.7), (side * 0.85, 0.0)], colour)
        pen.polygon([(side * 0.06, 0.05), (side * 0.8, 0.15), (side * 0.7, 0.75), (side * 0.3, 0.7)], shade(colour, 0.72))
        pen.ellipse((side * 0.65, -0.42), (0.14, 0.14), (252, 250, 240))
        pen.line([(0.0, -0.5), (side * 0.22, -0.95)])
    pen.ellipse((0.0, 0.05), (0.1, 0.6), (52, 40, 36))


SUBJECTS: dict[str, Callable[[Pen, Colour], None]] = {
    "house": house,
    "tree": tree,
    "cat": cat,
    "fish": fish,
    "car": car,
    "boat": boat,
    "flower": flower,
    "mushroom": mushroom,
    "rocket": rocket,
    "cup": cup,
    "umbrella": umbrella,
    "butterfly": butterfly,
}


def gradient(top: Colour, bottom: Colour) -> Image.Image:
    """Return a canvas whose colour runs from top to bottom."""
    ramp = np.linspace(0, 1, CANVAS)[:, None, None]
    rows = np.asarray(top) * (1 - ramp) + np.asarray(bottom) * ramp
    return Image.fromarray(np.broadcast_to(rows, (CANVAS, CANVAS, 3)).round().astype(np.uint8))


def meadow(generator: np.random.Generator) -> Image.Image:
    image = gradient((128, 196, 250), (200, 232, 255))
    draw = ImageDraw.Draw(image)
    horizon = int(generator.integers(140, 165))
    draw.ellipse((-90, horizon - 22, 170, horizon + 120), fill=(134, 200, 92))
    draw.rectangle((0, horizon, CANVAS, CANVAS), fill=(112, 186, 78))
    for x, y in generator.uniform((0, horizon + 12), (CANVAS, CANVAS), (16, 2)):
        draw.line((x, y, x + 4, y - 12), fill=(70, 138, 50), width=4)
    x, y = generator.uniform((20, 14), (180, 50))
    for dx in (0, 22, 44):
        draw.ellipse((x + dx - 18, y - 8, x + dx + 22, y + 18), fill=(255, 255, 255))
    return image


def beach(generator: np.random.Generator) -> Image.Image:
    image = gradient((90, 190, 240), (190, 236, 250))
    draw = ImageDraw.Draw(image)
    sea = int(generator.integers(105, 130))
    draw.rectangle((0, sea, CANVAS, CANVAS), fill=(20, 140, 176))
    for x in range(-20, CANVAS, 36):
        draw.arc((x, sea + 16, x + 36, sea + 32), 0, 180, fill=(210, 244, 250), width=4)
    shore = sea + int(generator.integers(42, 60))
    draw.polygon([(0, shore + 8), (128, shore - 6), (CANVAS, shore + 10), (CANVAS, CANVAS), (0, CANVAS)], fill=(244, 218, 154))
    x = generator.uniform(30, 226)
    draw.ellipse((x - 22, 14, x + 22, 58), fill=(255, 226, 90))
    return image


def desert(generator: np.random.Generator) -> Image.Image:
    image = gradient((250, 176, 96), (255, 228, 170))
    draw = ImageDraw.Draw(image)
    for depth, tone in enumerate(((226, 150, 76), (206, 124, 58))):
        y = 140 + 40 * depth
        peak = generator.uniform(0, CANVAS)
        ridge = [(x, y - 34 * math.exp(-(((x - peak) / 70) ** 2))) for x in range(0, CANVAS + 8, 8)]
        draw.polygon([*ridge, (CANVAS, CANVAS), (0, CANVAS)], fill=tone)
    x = int(generator.choice((26, 226)))
    draw.line((x, 190, x, 110), fill=(66, 120, 66), width=14)
    draw.line((x - 20, 128, x - 20, 152, x + 20, 152, x + 20, 120), fill=(66, 120, 66), width=10, joint="curve")
    return image


def snow(generator: np.random.Generator) -> Image.Image:
    image = gradient((150, 172, 200), (206, 218, 232))
    draw = ImageDraw.Draw(image)
    for x in generator.uniform(0, CANVAS, 3):
        draw.polygon([(x - 60, 160), (x, 160 - generator.uniform(50, 90)), (x + 60, 160)], fill=(176, 192, 214))
    draw.ellipse((-80, 140, 200, 300), fill=(240, 245, 250))
    draw.ellipse((80, 150, 340, 320), fill=(228, 236, 246))
    draw.rectangle((0, 205, CANVAS, CANVAS), fill=(236, 242, 249))
    for x, y in generator.uniform(0, CANVAS, (36, 2)):
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=(255, 255, 255))
    return image


def night(generator: np.random.Generator) -> Image.Image:
    image = gradient((10, 12, 46), (36, 34, 92))
    draw = ImageDraw.Draw(image)
    for x, y in generator.uniform((0, 0), (CANVAS, 160), (26, 2)):
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=(250, 244, 200))
    x = generator.uniform(30, 226)
    draw.ellipse((x - 22, 16, x + 22, 60), fill=(246, 240, 190))
    draw.ellipse((x - 8, 12, x + 32, 52), fill=(16, 17, 54))
    draw.ellipse((-60, 178, 200, 330), fill=(20, 26, 50))
    draw.rectangle((0, 205, CANVAS, CANVAS), fill=(16, 21, 42))
    return image


def city(generator: np.random.Generator) -> Image.Image:
    image = gradient((214, 206, 214), (240, 226, 220))
    draw = ImageDraw.Draw(image)
    left = -10.0
    while left < CANVAS:
        width, top = generator.uniform(34, 56), generator.uniform(30, 110)
        draw.rectangle((left, top, left + width - 4, 200), fill=(124, 122, 140))
        for x in np.arange(left + 8, left + width - 12, 14):
            for y in np.arange(top + 10, 180, 22):
                draw.rectangle((x, y, x + 6, y + 10), fill=(246, 226, 150))
        left += width
    draw.rectangle((0, 190, CANVAS, CANVAS), fill=(86, 84, 92))
    draw.line((0, 226, CANVAS, 226), fill=(230, 230, 220), width=5)
    return image


def forest(generator: np.random.Generator) -> Image.Image:
    image = gradient((26, 74, 54), (64, 120, 74))
    draw = ImageDraw.Draw(image)
    for x in np.arange(-10, CANVAS + 20, 42) + generator.uniform(-8, 8):
        draw.rectangle((x - 7, 0, x + 7, 210), fill=(58, 44, 34))
    for x in np.arange(-10, CANVAS + 30, 40) + generator.uniform(-12, 12):
        draw.ellipse((x - 34, -40, x + 34, 44 + generator.uniform(-8, 8)), fill=(24, 92, 50))
    draw.rectangle((0, 196, CANVAS, CANVAS), fill=(74, 66, 40))
    draw.ellipse((-60, 184, 320, 230), fill=(84, 78, 46))
    return image


def room(generator: np.random.Generator) -> Image.Image:
    image = gradient((226, 196, 176), (236, 208, 188))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 176, CANVAS, CANVAS), fill=(160, 106, 66))
    for x in range(-40, CANVAS + 60, 40):
        draw.line((128 + (x - 128) * 0.8, 176, 128 + (x - 128) * 1.5, CANVAS), fill=(128, 82, 50), width=4)
    draw.line((0, 176, CANVAS, 176), fill=(250, 244, 236), width=8)
    x = float(generator.choice((20, 164))) + generator.uniform(-6, 6)
    draw.rectangle((x, 26, x + 72, 104), fill=(168, 216, 246), outline=(250, 248, 240), width=8)
    draw.line((x + 36, 26, x + 36, 104), fill=(250, 248, 240), width=6)
    draw.line((x, 65, x + 72, 65), fill=(250, 248, 240), width=6)
    return image


BACKGROUNDS: dict[str, tuple[str, Callable[[np.random.Generator], Image.Image]]] = {
    "meadow": ("in a meadow", meadow),
    "beach": ("on a beach", beach),
    "desert": ("in the desert", desert),
    "snow": ("in the snow", snow),
    "night": ("at night", night),
    "city": ("in a city", city),
    "forest": ("in a forest", forest),
    "room": ("in a room", room),
}


@dataclass(frozen=True)
class Scene:
    """The factors of one picture; `seed` decides only what no caption tells (jitter, clouds, grass)."""

    subject: str
    colour: str
    background: str
    count: int = 1
    size: str = ""
    side: str = ""
    seed: int = 0

    def describe(self, colour: bool = True, background: bool = True) -> str:
        """Return the caption, e.g. "a small red house on the left in a meadow"."""
        words = [
            COUNTS[self.count - 1],
            self.size,
            self.colour if colour else "",
            plural(self.subject) if self.count > 1 else self.subject,
            self.side,
            BACKGROUNDS[self.background][0] if background else "",
        ]
        text = " ".join(word for word in words if word)
        return text.replace("a orange", "an orange").replace("a umbrella", "an umbrella")


def plural(noun: str) -> str:
    """Return the plural of a base subject's name."""
    irregular = {"fish": "fish", "butterfly": "butterflies"}
    return irregular.get(noun, noun + "s")


def combinations() -> list[tuple[str, str, str]]:
    """Return every (subject, colour, background), in one fixed order."""
    return [(s, c, b) for s in SUBJECTS for c in COLOURS for b in BACKGROUNDS]


def held_out(subject: str, colour: str, background: str) -> bool:
    """Tell whether a combination is kept out of the base's training (one in six, each pair of factors still seen)."""
    indices = (list(SUBJECTS).index(subject), list(COLOURS).index(colour), list(BACKGROUNDS).index(background))
    return (indices[0] + 2 * indices[1] + 3 * indices[2]) % 6 == 0


def sample_scene(generator: np.random.Generator, unseen: bool = False) -> Scene:
    """Draw a random scene from the training combinations, or from the held-out ones."""
    options = [combination for combination in combinations() if held_out(*combination) == unseen]
    subject, colour, background = options[generator.integers(len(options))]
    count = int(generator.choice(3, p=(0.8, 0.13, 0.07))) + 1
    return Scene(
        subject=subject,
        colour=colour,
        background=background,
        count=count,
        size=str(generator.choice(SIZES, p=(0.2, 0.6, 0.2))) if count == 1 else "",
        side=str(generator.choice(SIDES, p=(0.2, 0.6, 0.2))) if count == 1 else "",
        seed=int(generator.integers(2**31)),
    )


def placements(scene: Scene, generator: np.random.Generator) -> list[tuple[float, float, float]]:
    """Return (x, y, size) in canvas pixels for every subject of the scene, back to front."""
    if scene.count > 1:
        size = {2: 112.0, 3: 84.0}[scene.count]
        centres = np.linspace(0, CANVAS, scene.count + 2)[1:-1] if scene.count == 3 else np.array((72.0, 184.0))
        return [
            (x + generator.uniform(-6, 6), 150 + generator.uniform(-14, 14), size * generator.uniform(0.93, 1.07))
            for x in centres
        ]
    size = {"small": 96.0, "": 146.0, "large": 192.0}[scene.size] * generator.uniform(0.94, 1.06)
    x = {"on the left": 0.28, "": 0.5, "on the right": 0.72}[scene.side] * CANVAS + generator.uniform(-12, 12)
    x = min(max(x, 0.45 * size), CANVAS - 0.45 * size)
    lowest = CANVAS - 8 - size / 2
    return [(x, min(158 + generator.uniform(-12, 12), lowest), size)]


def paint(scene: Scene) -> Image.Image:
    """Draw the scene on the large canvas, (256, 256) RGB."""
    generator = np.random.default_rng(scene.seed)
    image = BACKGROUNDS[scene.background][1](generator)
    draw = ImageDraw.Draw(image)
    for x, y, size in placements(scene, generator):
        SUBJECTS[scene.subject](Pen(draw, x, y, size), COLOURS[scene.colour])
    return image


def reduce(canvas: Image.Image, side: int = SIDE) -> Image.Image:
    """Return the canvas at the world's picture size, averaged over every pixel's area."""
    return canvas.resize((side, side), Image.Resampling.BOX)
