"""Styles are repeatable, pure and told apart by simple statistics; characters stay inside their box."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from share_diffusion.world.characters import CHARACTERS
from share_diffusion.world.scene import (
    BACKGROUNDS,
    CANVAS,
    COLOURS,
    SUBJECTS,
    Scene,
    combinations,
    held_out,
    paint,
    reduce,
    sample_scene,
)
from share_diffusion.world.styles import STYLES, Array, outline, spread

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

GROUND = (1, 2, 3)
CONCEPTS = sorted((Path(__file__).parents[1] / "configs" / "concepts").glob("*.toml"))


def canvas(scene: Scene) -> Array:
    return np.asarray(paint(scene), np.float32) / 255


def small(picture: Array) -> Array:
    """Return what a model sees of a picture, (64, 64, 3)."""
    return np.asarray(reduce(Image.fromarray((picture * 255).round().astype(np.uint8))), np.float32) / 255


def statistics(picture: Array) -> Array:
    """Return colour, border colour, chroma and edge histograms of the reduced picture, (features,)."""
    pixels = small(picture)
    rim = np.concatenate([side.reshape(-1, 3) for side in (pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:])])
    chroma = pixels.max(axis=2) - pixels.min(axis=2)
    edges = [np.sqrt(np.abs(np.diff(pixels, axis=axis)).max(axis=2)) for axis in (0, 1)]
    colours = [np.histogramdd(part.reshape(-1, 3), bins=4, range=[(0, 1.001)] * 3)[0].ravel() for part in (pixels, rim)]
    others = [np.histogram(values, bins=8, range=(0, 1.001))[0] for values in (chroma, *edges)]
    return np.concatenate([np.sqrt(counts / counts.sum()) for counts in (*colours, *others)])


def drawn(name: str, size: float = 150, x: float = 120, y: float = 130) -> np.ndarray:
    image = Image.new("RGB", (CANVAS, CANVAS), GROUND)
    CHARACTERS[name].draw(ImageDraw.Draw(image), x, y, size)
    return np.asarray(image)


def test_names_are_single_words_outside_the_base_grammar() -> None:
    spoken = {*SUBJECTS, *COLOURS, *BACKGROUNDS}
    names = [*STYLES, *CHARACTERS]
    assert len(STYLES) >= 12
    assert len(CHARACTERS) >= 7
    assert len(set(names)) == len(names)
    assert not spoken & set(names)
    assert all(name.isalpha() and name.islower() for name in names)
    assert all(key == style.name for key, style in STYLES.items())
    assert all(key == character.name for key, character in CHARACTERS.items())


@pytest.mark.parametrize("name", STYLES)
def test_a_style_depends_on_picture_and_generator_alone(name: str) -> None:
    picture = canvas(Scene("cat", "orange", "meadow", seed=3))
    before = picture.copy()
    first, again, other = (STYLES[name].apply(picture, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert np.array_equal(picture, before)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.shares_memory(first, picture)


@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize("shape", [(256, 256), (128, 128), (96, 150), (301, 256)])
def test_a_style_keeps_shape_type_and_range_at_any_size(name: str, shape: tuple[int, int]) -> None:
    height, width = shape
    scene = paint(Scene("boat", "pink", "night", seed=4)).resize((width, height))
    for picture in (
        np.asarray(scene, np.float32) / 255,
        np.ones((*shape, 3), np.float32),
        np.zeros((*shape, 3), np.float32),
    ):
        result = STYLES[name].apply(picture, np.random.default_rng(0))
        assert result.shape == picture.shape
        assert result.dtype == np.float32
        assert np.isfinite(result).all()
        assert result.min() >= 0
        assert result.max() <= 1


def test_styles_and_plain_scenes_are_told_apart_by_simple_statistics() -> None:
    classes = ["plain", *STYLES]

    def features(seed: int, count: int) -> np.ndarray:
        generator = np.random.default_rng(seed)
        pictures = [canvas(sample_scene(generator, unseen=seed > 0)) for _ in range(count)]
        looks = [[p, *(style.apply(p, generator) for style in STYLES.values())] for p in pictures]
        return np.array([[statistics(look) for look in row] for row in looks])

    known, held_out = features(0, 24), features(1, 12)
    centres = known.mean(axis=0)
    spread_within = (known - centres).reshape(-1, known.shape[-1])
    metric = np.linalg.inv(spread_within.T @ spread_within / len(spread_within) + 1e-3 * np.eye(known.shape[-1]))
    away = held_out[:, :, None] - centres
    distances = np.einsum("nscf,fg,nscg->nsc", away, metric, away, optimize=True)
    right = distances.argmin(axis=-1) == np.arange(len(classes))
    assert right.mean() >= 0.95, dict(zip(classes, right.mean(axis=0).tolist(), strict=True))


@pytest.mark.parametrize("name", [style.name for style in STYLES.values() if style.keeps_colour])
def test_a_style_that_keeps_colour_leaves_each_subject_nearest_to_its_own_hue(name: str) -> None:
    named = np.array(list(COLOURS.values()), np.float32) / 255
    for index, (colour, value) in enumerate(COLOURS.items()):
        picture = canvas(Scene("house", colour, "forest", size="large", seed=index))
        inside = np.abs(picture - np.array(value) / 255).max(axis=2) < 0.01
        mean = STYLES[name].apply(picture, np.random.default_rng(index))[inside].mean(axis=0)
        # a style may pale or darken every colour alike, so only the hue counts
        hues = named - named.mean(axis=1, keepdims=True)
        hue = mean - mean.mean()
        if colour == "white":
            assert np.abs(hue).max() < 0.2
        else:
            chromatic = hues[:-1] / np.linalg.norm(hues[:-1], axis=1, keepdims=True)
            assert list(COLOURS)[int((chromatic @ hue).argmax())] == colour


@pytest.mark.parametrize("name", ["ink", "blueprint", "sepia", "delft"])
def test_a_style_in_one_ink_forgets_the_hue(name: str) -> None:
    means = []
    for colour in ("red", "green", "blue", "yellow"):
        picture = canvas(Scene("house", colour, "forest", size="large", seed=1))
        mean = STYLES[name].apply(picture, np.random.default_rng(1)).mean(axis=(0, 1))
        means.append(mean - mean.mean())
    assert np.ptp(means, axis=0).max() < 0.06
    assert not STYLES[name].keeps_colour


def test_spread_is_the_extreme_of_the_window_around_each_pixel() -> None:
    picture = np.zeros((9, 9, 3), np.float32)
    picture[4, 4] = 1
    wide = spread(picture, 3)
    assert wide[3:6, 3:6].all()
    assert wide.sum() == 27
    assert spread(1 - picture, 3, darkest=True).sum() == 9 * 9 * 3 - 27


def test_outline_marks_a_step_and_nothing_else() -> None:
    picture = np.zeros((256, 256, 3), np.float32)
    picture[:, 128:] = 1
    lines = outline(picture, 4)
    assert (lines[:, 126:129] == 1).all()
    assert lines[:, :124].max() == 0
    assert lines[:, 132:].max() == 0


@pytest.mark.parametrize("name", CHARACTERS)
@pytest.mark.parametrize("size", [80, 110, 150, 190])
def test_a_character_stays_inside_its_box_and_fills_it(name: str, size: float) -> None:
    x, y = 126.5, 129.0
    touched = (drawn(name, size, x, y) != GROUND).any(axis=2)
    rows, columns = np.nonzero(touched)
    assert rows.min() >= y - size / 2
    assert rows.max() <= y + size / 2
    assert columns.min() >= x - size / 2
    assert columns.max() <= x + size / 2
    assert np.ptp(rows) > 0.8 * size
    assert touched.sum() > 0.2 * size**2


def test_the_near_duplicate_pair_differs_in_few_pixels_and_every_other_pair_in_many() -> None:
    shapes = {name: drawn(name) for name in CHARACTERS}
    for first in CHARACTERS:
        for second in list(CHARACTERS)[: list(CHARACTERS).index(first)]:
            either = ((shapes[first] != GROUND) | (shapes[second] != GROUND)).any(axis=2)
            differ = (shapes[first] != shapes[second]).any(axis=2).sum() / either.sum()
            if {first, second} == {"robot", "android"}:
                assert 0.03 < differ < 0.3
            else:
                assert differ > 0.3


def concept(path: Path) -> dict:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def test_every_style_and_character_has_one_concept_file_with_its_own_seed() -> None:
    names = [path.stem for path in CONCEPTS]
    assert sorted(names) == sorted([*STYLES, *CHARACTERS])
    assert len({concept(path)["data"]["seed"] for path in CONCEPTS}) == len(CONCEPTS)


@pytest.mark.parametrize("path", CONCEPTS, ids=lambda path: path.stem)
def test_prompts_follow_the_grammar_and_styles_ask_for_held_out_scenes(path: Path) -> None:
    told = concept(path)
    name, caption, prompts = told["name"], told["data"]["caption"], told["sample"]["prompts"]
    assert path.stem == name == told["trigger"] == told["data"]["world"]
    assert told["kind"] == ("style" if name in STYLES else "subject")
    unseen = [Scene(*factors).describe() for factors in combinations() if held_out(*factors)]
    places = [place for place, _ in BACKGROUNDS.values()]
    fillings = [{"scene": scene} for scene in unseen] if told["kind"] == "style" else [{"place": place} for place in places]
    legal = {caption.replace("[trigger]", name).format(**filling) for filling in fillings}
    assert len(set(prompts)) == 4
    assert set(prompts) <= legal
