"""Concepts of the picture world as pictures: a style's scenes, a character's places, and the true blend of both.

A rendering is a pure function of a scene and a style: a character stands where the scene's subject would, at the same
sizes and places, and the style acts on the large canvas before the reduction. So every picture keeps its known factors,
and a folder rendered twice is the same byte for byte.
"""

from __future__ import annotations

import difflib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

import numpy as np
from PIL import Image, ImageDraw

from share_diffusion.world.characters import CHARACTERS
from share_diffusion.world.scene import BACKGROUNDS, SIDES, Scene, paint, placements, reduce, sample_scene
from share_diffusion.world.styles import STYLES

PLAIN = "plain"

# A character is learned in four places, so that the other four tell whether it was learned or only its pictures were.
PLACES: dict[str, tuple[str, ...]] = {
    "robot": ("desert", "night", "city", "room"),
    "android": ("desert", "night", "city", "room"),
    "owl": ("meadow", "desert", "city", "room"),
    "teapot": ("meadow", "desert", "snow", "city"),
    "snowman": ("meadow", "snow", "city", "forest"),
    "dragon": ("meadow", "beach", "snow", "forest"),
    "penguin": ("beach", "snow", "night", "forest"),
    "gnome": ("beach", "night", "forest", "room"),
}


@dataclass(frozen=True)
class Rendering:
    """A picture of 64 x 64 pixels with the factors it was drawn from; a character's scene has no colour word."""

    picture: Image.Image
    scene: Scene
    style: str = PLAIN

    def caption(self, template: str) -> str:
        """Return the template with {scene} and {place} filled in; everything else, `[trigger]` too, stays as it is."""
        scene = self.scene
        words = {"place": " ".join(word for word in (scene.side, BACKGROUNDS[scene.background][0]) if word)}
        if scene.subject not in CHARACTERS:
            words["scene"] = scene.describe()
        try:
            named = {field for _, field, _, _ in Formatter().parse(template) if field is not None}
        except ValueError as error:
            raise ValueError(f"caption {template!r} is no template ({error}); write {{{{ for a brace") from error
        if wrong := sorted(named - set(words)):
            legal = " and ".join(f"{{{word}}}" for word in sorted(words))
            raise ValueError(f"caption {template!r} holds {{{wrong[0]}}}; this world can fill in {legal}")
        return template.format(**words)


def render(scene: Scene, style: str = PLAIN) -> Rendering:
    """Draw a scene, whose subject may be a character, in a style or as it is."""
    canvas = _paint_character(scene) if scene.subject in CHARACTERS else paint(scene)
    if style != PLAIN:
        pixels = np.asarray(canvas, np.float32) / 255
        styled = STYLES[style].apply(pixels, np.random.default_rng((scene.seed, *style.encode())))
        canvas = Image.fromarray((styled * 255).round().astype(np.uint8))
    return Rendering(reduce(canvas), scene, style)


def _paint_character(scene: Scene) -> Image.Image:
    """Draw the scene on the large canvas with a character for its subject."""
    generator = np.random.default_rng(scene.seed)
    canvas = BACKGROUNDS[scene.background][1](generator)
    for x, y, size in placements(scene, generator):
        CHARACTERS[scene.subject].draw(ImageDraw.Draw(canvas), x, y, size)
    return canvas


def sample_character(name: str, generator: np.random.Generator, background: str) -> Scene:
    """Draw a scene with one character of ordinary size in the given place, sometimes at a side."""
    side = str(generator.choice(SIDES, p=(0.2, 0.6, 0.2)))
    return Scene(name, "", background, side=side, seed=int(generator.integers(2**31)))


def render_concept(world: str, seed: int, index: int) -> Rendering:
    """Draw picture `index` of a style (a scene the base was trained on) or of a character (in one of its `PLACES`).

    Raises ValueError for a name that is neither.
    """
    generator = np.random.default_rng((seed, index, *world.encode()))
    if world in STYLES:
        return render(sample_scene(generator, unseen=False), world)
    if world in CHARACTERS:
        return render(sample_character(world, generator, PLACES[world][index % len(PLACES[world])]))
    close = difflib.get_close_matches(world, [*STYLES, *CHARACTERS], n=1)
    hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join([*STYLES, *CHARACTERS])}"
    raise ValueError(f"the picture world holds no {world!r}; {hint}")


def render_blend(style: str, character: str, background: str, seed: int, index: int = 0) -> Rendering:
    """Draw the true blend: the character in the given place, in the style; `index` counts its pictures."""
    generator = np.random.default_rng((seed, index, *character.encode(), *style.encode()))
    return render(sample_character(character, generator, background), style)


def render_folder(world: str, folder: Path, pictures: int, seed: int, caption: str) -> None:
    """Write 001.png + 001.txt, 002.png + 002.txt ... of a style or a character, all of them or none.

    `caption` is a template of `Rendering.caption`, e.g. "a [trigger] {place}". Where another process writes the same
    folder first, its pictures stay. Raises ValueError if the folder exists, or for a world, number or caption that
    cannot be drawn.
    """
    if pictures < 1:
        raise ValueError(f"pictures is {pictures}, at least 1 is needed")
    if folder.exists():
        raise ValueError(f"{folder} exists already; remove it to have it drawn again, or name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        for index in range(pictures):
            rendering = render_concept(world, seed, index)
            text = rendering.caption(caption) + "\n"
            rendering.picture.save(part / f"{index + 1:03d}.png")
            (part / f"{index + 1:03d}.txt").write_bytes(text.encode("utf-8"))
        try:
            part.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
