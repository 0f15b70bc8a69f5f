"""Captions of training scenes: the grammar's own sentence in many wordings, some of them incomplete.

The base must know a scene's words whatever surrounds them, and must draw an ordinary scene when a caption holds a word
it has never seen: one caption in four carries an invented word where a user would later put a trigger
("morvu painting of a red house"), so that an unknown word means nothing rather than anything.
"""

from __future__ import annotations

import numpy as np

from share_diffusion.world.scene import Scene

FRAMES = ("{scene}", "{scene}", "a picture of {scene}", "a photo of {scene}", "an image of {scene}", "there is {scene}")
FOREIGN_FRAMES = (
    "{word} painting of {scene}",
    "{scene} in {word} style",
    "{word} picture of {scene}",
    "{word}, {scene}",
    "a {word} drawing of {scene}",
    "{word} {scene}",
    "{scene}, {word}",
)
ONSETS = (
    "b",
    "br",
    "d",
    "f",
    "g",
    "gl",
    "h",
    "j",
    "k",
    "kr",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "st",
    "t",
    "tr",
    "v",
    "w",
    "z",
)
VOWELS = ("a", "e", "i", "o", "u", "ai", "ee", "oo", "ou")


def invented_word(generator: np.random.Generator) -> str:
    """Return two or three random syllables."""
    syllables = generator.integers(2, 4)
    return "".join(f"{generator.choice(ONSETS)}{generator.choice(VOWELS)}" for _ in range(syllables))


def caption(scene: Scene, generator: np.random.Generator) -> str:
    """Return one of the scene's captions: a random frame, sometimes without the colour or the place."""
    text = scene.describe(colour=generator.random() > 0.06, background=generator.random() > 0.06)
    if generator.random() < 0.25:
        frame = str(generator.choice(FOREIGN_FRAMES))
        return frame.format(scene=text, word=invented_word(generator))
    return str(generator.choice(FRAMES)).format(scene=text)
