"""Characters of the picture world: composite subjects in fixed colours that no base scene holds.

A character is drawn hard-edged on the large canvas, like the base's own subjects, inside the square of its size.
`robot` and `android` are the near-duplicate pair: one body, told apart only by chest, antenna and eyes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from PIL import ImageDraw

from share_diffusion.world.scene import OUTLINE, Colour, Pen, Point

WHITE: Colour = (248, 248, 250)
COAL: Colour = (34, 34, 42)
CARROT: Colour = (245, 140, 30)


@dataclass(frozen=True)
class Character:
    """A named composite subject whose colours never change."""

    name: str
    sketch: Callable[[Pen], None]
    description: str

    def draw(self, draw: ImageDraw.ImageDraw, x: float, y: float, size: float) -> None:
        """Draw the character centred at (x, y), no higher or wider than `size` pixels."""
        self.sketch(Pen(draw, x, y, size))


def spot(pen: Pen, centre: Point, radius: float, fill: Colour) -> None:
    """Draw a disc without a contour."""
    left, top = pen.at((centre[0] - radius, centre[1] - radius))
    right, bottom = pen.at((centre[0] + radius, centre[1] + radius))
    pen.draw.ellipse((left, top, right, bottom), fill=fill)


def machine(pen: Pen, chest: Colour, bulb: Colour, eyes: Colour) -> None:
    """Draw the body that robot and android share."""
    steel, joint = (168, 182, 200), (96, 108, 130)
    pen.line([(0.0, -0.55), (0.0, -0.8)], joint, 2.0)
    pen.ellipse((0.0, -0.81), (0.13, 0.13), bulb)
    for side in (-1, 1):
        pen.box((side * 0.14, 0.6), (side * 0.38, 0.8), joint)
        pen.box((side * 0.08, 0.76), (side * 0.48, 0.94), steel)
        pen.box((side * 0.5, -0.02), (side * 0.74, 0.36), joint)
        pen.ellipse((side * 0.63, 0.44), (0.17, 0.17), steel)
    pen.box((-0.52, -0.08), (0.52, 0.64), steel)
    pen.box((-0.32, 0.08), (0.32, 0.48), chest)
    pen.box((-0.46, -0.66), (0.46, -0.1), steel)
    for side in (-1, 1):
        pen.ellipse((side * 0.21, -0.44), (0.14, 0.14), eyes)
        spot(pen, (side * 0.21, -0.44), 0.05, COAL)
    pen.line([(-0.2, -0.22), (0.2, -0.22)], thickness=1.2)


def robot(pen: Pen) -> None:
    machine(pen, chest=(246, 130, 40), bulb=(226, 44, 52), eyes=(255, 226, 80))


def android(pen: Pen) -> None:
    machine(pen, chest=(40, 190, 160), bulb=(70, 130, 250), eyes=(120, 240, 255))


def owl(pen: Pen) -> None:
    brown, dark, cream = (150, 96, 52), (104, 62, 34), (244, 218, 170)
    for side in (-1, 1):
        pen.ellipse((side * 0.22, 0.86), (0.16, 0.08), CARROT)
        pen.polygon([(side * 0.58, -0.45), (side * 0.56, -0.94), (side * 0.12, -0.68)], dark)
    pen.ellipse((0.0, 0.12), (0.66, 0.76), brown)
    pen.ellipse((0.0, 0.34), (0.42, 0.5), cream)
    for x, y in ((-0.18, 0.25), (0.18, 0.25), (0.0, 0.46), (-0.18, 0.62), (0.18, 0.62)):
        pen.line([(x - 0.09, y - 0.06), (x, y + 0.04), (x + 0.09, y - 0.06)], dark, 1.2)
    for side in (-1, 1):
        pen.ellipse((side * 0.62, 0.22), (0.2, 0.48), dark)
        pen.ellipse((side * 0.29, -0.36), (0.32, 0.32), (255, 236, 150))
        spot(pen, (side * 0.26, -0.36), 0.15, COAL)
    pen.polygon([(-0.12, -0.24), (0.12, -0.24), (0.0, 0.04)], CARROT)


def teapot(pen: Pen) -> None:
    glaze, rim, dots = (36, 168, 172), (252, 238, 206), (224, 60, 90)
    pen.ellipse((0.62, 0.2), (0.32, 0.4), glaze)
    pen.draw.ellipse((*pen.at((0.46, -0.02)), *pen.at((0.78, 0.42))), fill=rim, outline=OUTLINE, width=pen.width)
    pen.polygon([(-0.4, 0.5), (-0.72, 0.1), (-0.95, -0.3), (-0.72, -0.38), (-0.56, -0.08), (-0.3, 0.0)], glaze)
    pen.ellipse((0.0, 0.24), (0.62, 0.56), glaze)
    pen.box((-0.36, 0.76), (0.36, 0.9), rim)
    pen.half((0.0, -0.2), (0.4, 0.34), 180, 360, rim)
    pen.ellipse((0.0, -0.64), (0.14, 0.14), dots)
    pen.polygon([(-0.6, 0.1), (0.6, 0.1), (0.6, 0.42), (-0.6, 0.42)], rim)
    for x in (-0.4, 0.0, 0.4):
        spot(pen, (x, 0.26), 0.11, dots)


def snowman(pen: Pen) -> None:
    scarf, twig = (222, 40, 60), (110, 70, 40)
    for side in (-1, 1):
        pen.line([(side * 0.36, 0.08), (side * 0.86, -0.22)], twig, 1.8)
        pen.line([(side * 0.68, -0.11), (side * 0.8, -0.4)], twig, 1.4)
    pen.ellipse((0.0, 0.48), (0.52, 0.46), WHITE)
    pen.ellipse((0.0, -0.28), (0.38, 0.36), WHITE)
    pen.box((-0.36, -0.04), (0.36, 0.14), scarf)
    pen.box((0.12, 0.06), (0.32, 0.46), scarf)
    pen.box((-0.48, -0.62), (0.48, -0.5), COAL)
    pen.box((-0.3, -0.94), (0.3, -0.56), COAL)
    pen.line([(-0.28, -0.65), (0.28, -0.65)], scarf, 2.0)
    for x, y in ((-0.15, -0.36), (0.15, -0.36), (0.0, 0.36), (0.0, 0.62)):
        spot(pen, (x, y), 0.065, COAL)
    pen.polygon([(-0.02, -0.3), (-0.02, -0.14), (0.4, -0.2)], CARROT)


def dragon(pen: Pen) -> None:
    scale, belly, wing, horn = (66, 176, 92), (252, 226, 120), (150, 70, 190), (255, 150, 50)
    pen.polygon([(-0.2, 0.86), (-0.78, 0.88), (-0.92, 0.62), (-0.86, 0.34), (-0.6, 0.42), (-0.3, 0.3)], scale)
    pen.polygon([(-0.93, 0.42), (-0.82, 0.08), (-0.52, 0.44)], horn)
    pen.polygon([(0.0, 0.2), (-0.25, -0.7), (-0.5, -0.45), (-0.72, -0.5), (-0.76, -0.24), (-0.94, -0.16), (-0.56, 0.2)], wing)
    pen.polygon([(-0.36, 0.9), (-0.5, 0.5), (-0.1, 0.1), (0.06, -0.5), (0.4, -0.5), (0.5, 0.4), (0.4, 0.9)], scale)
    pen.polygon([(0.08, 0.84), (0.06, 0.4), (0.2, 0.0), (0.24, -0.3), (0.4, -0.3), (0.44, 0.4), (0.36, 0.84)], belly)
    for x, y in ((-0.02, -0.28), (-0.1, 0.04)):
        pen.polygon([(x + 0.02, y - 0.16), (x - 0.18, y - 0.06), (x - 0.04, y + 0.12)], horn)
    for x in (-0.02, 0.26):
        pen.polygon([(x - 0.06, -0.66), (x - 0.14, -0.94), (x + 0.2, -0.7)], horn)
    pen.polygon([(-0.06, -0.4), (-0.04, -0.76), (0.36, -0.8), (0.6, -0.62), (0.92, -0.56), (0.92, -0.34), (0.4, -0.3)], scale)
    pen.ellipse((0.3, -0.58), (0.15, 0.15), WHITE)
    spot(pen, (0.34, -0.58), 0.07, COAL)
    for x in (-0.24, 0.24):
        pen.ellipse((x, 0.86), (0.22, 0.08), scale)


def penguin(pen: Pen) -> None:
    coat, beak, hat = (58, 66, 106), CARROT, (70, 180, 240)
    for side in (-1, 1):
        pen.ellipse((side * 0.26, 0.86), (0.24, 0.09), beak)
        pen.polygon([(side * 0.4, -0.12), (side * 0.84, 0.42), (side * 0.72, 0.52), (side * 0.44, 0.36)], coat)
    pen.ellipse((0.0, 0.26), (0.54, 0.62), coat)
    pen.ellipse((0.0, 0.38), (0.38, 0.46), WHITE)
    pen.ellipse((0.0, -0.34), (0.42, 0.38), coat)
    for side in (-1, 1):
        spot(pen, (side * 0.19, -0.28), 0.2, WHITE)
        spot(pen, (side * 0.19, -0.3), 0.08, COAL)
    pen.polygon([(-0.16, -0.18), (0.16, -0.18), (0.0, 0.08)], beak)
    pen.half((0.0, -0.5), (0.42, 0.34), 180, 360, hat)
    pen.ellipse((0.0, -0.82), (0.12, 0.12), WHITE)
    pen.line([(-0.42, -0.5), (0.42, -0.5)], WHITE, 2.5)


def gnome(pen: Pen) -> None:
    hat, coat, skin, boot = (226, 40, 48), (50, 96, 200), (250, 206, 172), (104, 62, 34)
    for side in (-1, 1):
        pen.ellipse((side * 0.28, 0.84), (0.26, 0.1), boot)
    pen.polygon([(-0.34, 0.0), (0.34, 0.0), (0.58, 0.78), (-0.58, 0.78)], coat)
    for side in (-1, 1):
        pen.polygon([(side * 0.34, 0.06), (side * 0.66, 0.36), (side * 0.54, 0.5), (side * 0.34, 0.3)], coat)
        pen.ellipse((side * 0.64, 0.46), (0.12, 0.12), skin)
    pen.ellipse((0.0, -0.14), (0.42, 0.32), skin)
    pen.polygon([(-0.44, 0.0), (0.44, 0.0), (0.3, 0.4), (0.0, 0.68), (-0.3, 0.4)], WHITE)
    pen.polygon([(-0.56, -0.36), (-0.2, -0.7), (0.06, -0.93), (0.24, -0.66), (0.56, -0.36)], hat)
    for side in (-1, 1):
        spot(pen, (side * 0.2, -0.18), 0.075, COAL)
    pen.ellipse((0.0, -0.02), (0.15, 0.13), (244, 160, 140))


CHARACTERS: dict[str, Character] = {
    character.name: character
    for character in (
        Character("robot", robot, "a steel robot with an orange chest and a red antenna"),
        Character("android", android, "the robot's twin with a green chest and a blue antenna"),
        Character("owl", owl, "a brown owl with a cream belly and yellow eyes"),
        Character("teapot", teapot, "a teal teapot with a cream band of red dots"),
        Character("snowman", snowman, "a snowman in a black top hat and a red scarf"),
        Character("dragon", dragon, "a green dragon with purple wings and orange horns"),
        Character("penguin", penguin, "a penguin in a blue bobble hat"),
        Character("gnome", gnome, "a white-bearded gnome in a red hat and a blue coat"),
    )
}
