"""The picture world: scenes repeat, held-out combinations leave every pair of factors, captions say what is drawn."""

from __future__ import annotations

import re
import sys
from collections import Counter
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from share_diffusion.data import read_dataset
from share_diffusion.world.captions import FOREIGN_FRAMES, FRAMES, caption, invented_word
from share_diffusion.world.characters import CHARACTERS
from share_diffusion.world.render import PLACES, PLAIN, render, render_blend, render_concept, render_folder
from share_diffusion.world.scene import (
    BACKGROUNDS,
    CANVAS,
    COLOURS,
    SIDE,
    SUBJECTS,
    Scene,
    combinations,
    held_out,
    paint,
    placements,
    plural,
    reduce,
    sample_scene,
)
from share_diffusion.world.styles import STYLES
from share_diffusion.world.textures import texture

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONCEPTS = sorted((Path(__file__).parents[1] / "configs" / "concepts").glob("*.toml"))


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# Scenes


def test_a_scene_is_the_same_picture_every_time_and_its_seed_moves_only_what_no_caption_tells() -> None:
    scene, other = Scene("cat", "red", "city", seed=4), Scene("cat", "red", "city", seed=5)
    assert np.array_equal(array(paint(scene)), array(paint(scene)))
    assert not np.array_equal(array(paint(scene)), array(paint(other)))
    assert scene.describe() == other.describe()


def test_a_generator_decides_the_scene() -> None:
    first, again, other = ([sample_scene(np.random.default_rng((seed, i))) for i in range(8)] for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert np.array_equal(array(texture(np.random.default_rng(3))), array(texture(np.random.default_rng(3))))


def test_reduction_is_the_mean_over_each_pixels_area() -> None:
    canvas = paint(Scene("boat", "blue", "beach", seed=1))
    assert canvas.size == (CANVAS, CANVAS)
    step = CANVAS // SIDE
    means = array(canvas).reshape(SIDE, step, SIDE, step, 3).mean(axis=(1, 3))
    assert np.abs(array(reduce(canvas)) - means).max() <= 1  # rounded once along each axis


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_subject_is_drawn_in_its_colour_and_nowhere_but_in_its_place(subject: str) -> None:
    for seed, size in enumerate(("small", "", "large")):
        red, blue = (array(paint(Scene(subject, colour, "room", size=size, seed=seed))) for colour in ("red", "blue"))
        rows, columns = np.nonzero((red != blue).any(axis=2))
        scene = Scene(subject, "red", "room", size=size, seed=seed)
        generator = np.random.default_rng(seed)
        BACKGROUNDS["room"][1](generator)
        ((x, y, side),) = placements(scene, generator)
        line = max(3, round(side / 28)) * 4  # a tail is drawn with the widest line
        assert rows.min() >= y - side / 2 - line
        assert rows.max() <= y + side / 2 + line
        assert columns.min() >= x - side / 2 - line
        assert columns.max() <= x + side / 2 + line
        assert (np.abs(red.astype(int) - COLOURS["red"]).max(axis=2) == 0).sum() > 0.02 * side**2


@pytest.mark.parametrize("side", ["on the left", "", "on the right"])
def test_a_side_is_where_the_subject_stands(side: str) -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        ((x, _, _),) = placements(Scene("car", "red", "city", side=side), generator)
        assert {"on the left": x < 100, "": 110 < x < 146, "on the right": x > 156}[side]


def test_a_count_is_how_many_places_there_are_and_they_do_not_meet() -> None:
    for count in (1, 2, 3):
        places = placements(Scene("cup", "red", "city", count=count), np.random.default_rng(count))
        assert len(places) == count
        for (left, _, first), (right, _, second) in pairwise(places):
            assert right - left > 0.7 * (first + second) / 2


# Combinations


def test_one_combination_in_six_is_held_out_and_every_pair_of_factors_is_still_seen() -> None:
    everything = combinations()
    assert len(everything) == len(set(everything)) == len(SUBJECTS) * len(COLOURS) * len(BACKGROUNDS)
    out = [combination for combination in everything if held_out(*combination)]
    assert len(out) * 6 == len(everything)
    seen = set(everything) - set(out)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        pairs = {(combination[first], combination[second]) for combination in everything}
        assert {(combination[first], combination[second]) for combination in seen} == pairs
    for factor in range(3):  # and no single word is rarer among the held-out than half of its share
        counts = Counter(combination[factor] for combination in out)
        assert min(counts.values()) * 2 >= len(out) / len(counts)


def test_samples_come_from_the_side_asked_for() -> None:
    generator = np.random.default_rng(0)
    for unseen in (False, True):
        scenes = [sample_scene(generator, unseen) for _ in range(200)]
        assert {held_out(scene.subject, scene.colour, scene.background) for scene in scenes} == {unseen}
        assert {scene.count for scene in scenes} == {1, 2, 3}
        assert all(not scene.size and not scene.side for scene in scenes if scene.count > 1)


# Captions


@pytest.mark.parametrize(
    ("scene", "text"),
    [
        (Scene("house", "red", "meadow"), "a red house in a meadow"),
        (Scene("umbrella", "orange", "night"), "an orange umbrella at night"),
        (Scene("cat", "blue", "snow", size="small", side="on the left"), "a small blue cat on the left in the snow"),
        (Scene("cup", "orange", "desert", size="large"), "a large orange cup in the desert"),
        (Scene("butterfly", "pink", "city", count=2), "two pink butterflies in a city"),
        (Scene("fish", "white", "beach", count=3), "three white fish on a beach"),
    ],
)
def test_a_scene_describes_itself(scene: Scene, text: str) -> None:
    assert scene.describe() == text


def test_a_caption_may_leave_out_colour_and_place() -> None:
    scene = Scene("umbrella", "orange", "forest")
    assert scene.describe(colour=False) == "an umbrella in a forest"
    assert scene.describe(background=False) == "an orange umbrella"
    assert scene.describe(colour=False, background=False) == "an umbrella"


def test_two_scenes_have_one_caption_only_if_their_factors_agree() -> None:
    captions = {
        Scene(*factors, count=count, size=size, side=side).describe()
        for factors in combinations()
        for count, size, side in [*product((1,), ("small", "", "large"), ("on the left", "")), (2, "", ""), (3, "", "")]
    }
    assert len(captions) == len(combinations()) * 8


def test_every_caption_is_a_frame_around_the_scenes_own_words() -> None:
    generator = np.random.default_rng(0)
    framed = 0
    for _ in range(400):
        scene = sample_scene(generator)
        text = caption(scene, generator)
        forms = [scene.describe(colour, background) for colour in (True, False) for background in (True, False)]
        frames = [frame for frame in FRAMES if text in {frame.format(scene=form) for form in forms}]
        foreign = [
            frame
            for frame in FOREIGN_FRAMES
            if any(
                re.fullmatch(re.escape(frame.format(scene=form, word="WORD")).replace("WORD", "[a-z]+"), text) for form in forms
            )
        ]
        assert frames or foreign, text
        framed += not frames
        assert "  " not in text
        assert not re.search(r"\ba [aeiou]", text), text
    assert 0.18 < framed / 400 < 0.32


def test_an_invented_word_is_none_of_the_worlds() -> None:
    generator = np.random.default_rng(1)
    known = {*SUBJECTS, *COLOURS, *BACKGROUNDS, *STYLES, *CHARACTERS, *map(plural, SUBJECTS)}
    words = {invented_word(generator) for _ in range(2000)}
    assert len(words) > 1500
    assert not words & known


# Concepts


@pytest.mark.parametrize("name", CHARACTERS)
def test_a_character_stands_in_four_places_and_is_asked_for_in_the_other_four(name: str) -> None:
    renderings = [render_concept(name, 1, index) for index in range(12)]
    assert Counter(rendering.scene.background for rendering in renderings) == dict.fromkeys(PLACES[name], 3)
    assert all(rendering.style == PLAIN and rendering.scene.colour == "" for rendering in renderings)
    path = next(path for path in CONCEPTS if path.stem == name)
    prompts = tomllib.loads(path.read_text(encoding="utf-8"))["sample"]["prompts"]
    asked = {place for place, (words, _) in BACKGROUNDS.items() if any(prompt.endswith(words) for prompt in prompts)}
    assert asked == {*BACKGROUNDS} - {*PLACES[name]}


@pytest.mark.parametrize("name", STYLES)
def test_a_style_is_shown_on_scenes_the_base_has_seen(name: str) -> None:
    rendering = render_concept(name, 1, 0)
    scene = rendering.scene
    assert not held_out(scene.subject, scene.colour, scene.background)
    assert rendering.style == name
    assert array(rendering.picture).shape == (SIDE, SIDE, 3)
    assert not np.array_equal(array(rendering.picture), array(render(scene).picture))


def test_an_ordinary_rendering_is_the_bases_own_picture() -> None:
    scene = Scene("boat", "pink", "night", seed=9)
    assert np.array_equal(array(render(scene).picture), array(reduce(paint(scene))))


def test_a_character_takes_the_subjects_place() -> None:
    """Pictures of two characters in one scene differ only where the subject stands."""
    scene = Scene("robot", "", "snow", seed=3)
    generator = np.random.default_rng(3)
    BACKGROUNDS["snow"][1](generator)
    ((x, y, size),) = placements(scene, generator)
    one, other = (array(render(Scene(name, "", "snow", seed=3)).picture).astype(int) for name in ("robot", "gnome"))
    rows, columns = np.nonzero((one != other).any(axis=2))
    unit = CANVAS / SIDE
    assert rows.min() >= (y - size / 2) / unit - 1
    assert rows.max() <= (y + size / 2) / unit + 1
    assert columns.min() >= (x - size / 2) / unit - 1
    assert columns.max() <= (x + size / 2) / unit + 1


def test_a_blend_is_the_character_in_the_style() -> None:
    blend = render_blend("neon", "dragon", "city", seed=2)
    assert (blend.style, blend.scene.subject, blend.scene.background) == ("neon", "dragon", "city")
    assert np.array_equal(array(blend.picture), array(render(blend.scene, "neon").picture))
    assert array(blend.picture).mean() < array(render(blend.scene).picture).mean()  # a black wall


def test_captions_of_concepts_fill_in_scene_and_place() -> None:
    styled = render(Scene("house", "red", "snow", side="on the left"), "ink")
    assert styled.caption("a [trigger] drawing of {scene}") == "a [trigger] drawing of a red house on the left in the snow"
    character = render(Scene("owl", "", "night", side="on the right"))
    assert character.caption("an [trigger] {place}") == "an [trigger] on the right at night"
    with pytest.raises(ValueError, match=r"holds \{scene\}; this world can fill in \{place\}"):
        character.caption("{scene}")
    with pytest.raises(ValueError, match=r"holds \{colour\}; this world can fill in \{place\} and \{scene\}"):
        styled.caption("{colour} {scene}")
    with pytest.raises(ValueError, match="is no template"):
        styled.caption("{scene")


def test_an_unknown_world_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean watercolor"):
        render_concept("watercolour", 0, 0)
    with pytest.raises(ValueError, match="choose from watercolor"):
        render_concept("zzz", 0, 0)


# Folders


@pytest.mark.parametrize("path", [CONCEPTS[0], CONCEPTS[-1]], ids=lambda path: path.stem)
def test_a_folder_is_an_ordinary_data_set(path: Path, tmp_path: Path) -> None:
    told = tomllib.loads(path.read_text(encoding="utf-8"))
    data = told["data"]
    render_folder(data["world"], tmp_path / "data" / "one", 5, data["seed"], data["caption"])
    dataset = read_dataset(tmp_path / "data" / "one", trigger=told["trigger"])
    assert len(dataset) == 5
    assert not dataset.skipped
    for index, example in enumerate(dataset.examples):
        rendering = render_concept(data["world"], data["seed"], index)
        assert np.array_equal(array(Image.open(example.picture)), array(rendering.picture))
        assert example.caption == rendering.caption(data["caption"]).replace("[trigger]", told["trigger"])


def test_a_folder_drawn_twice_is_the_same_and_another_seed_is_another_folder(tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        render_folder("sepia", tmp_path / name, 3, seed, "[trigger] picture of {scene}")
    assert list(files(tmp_path / "one")) == ["001.png", "001.txt", "002.png", "002.txt", "003.png", "003.txt"]
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert not set(files(tmp_path / "one").values()) & set(files(tmp_path / "three").values())
    text = files(tmp_path / "one")["001.txt"]
    assert text.startswith(b"[trigger] picture of ")
    assert text.endswith(b"\n")
    assert b"\r" not in text


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds \{colour\}"):
        render_folder("gnome", tmp_path / "gnome", 3, 0, "a {colour} [trigger]")
    with pytest.raises(ValueError, match="no 'gnom'; did you mean gnome"):
        render_folder("gnom", tmp_path / "gnome", 3, 0, "a [trigger]")
    with pytest.raises(ValueError, match="pictures is 0, at least 1"):
        render_folder("gnome", tmp_path / "gnome", 0, 0, "a [trigger]")
    assert list(tmp_path.iterdir()) == []
    render_folder("gnome", tmp_path / "gnome", 1, 0, "a [trigger]")
    before = files(tmp_path / "gnome")
    with pytest.raises(ValueError, match="exists already; remove it"):
        render_folder("gnome", tmp_path / "gnome", 2, 0, "a [trigger]")
    assert files(tmp_path / "gnome") == before
    assert [path.name for path in tmp_path.iterdir()] == ["gnome"]


def test_the_folder_of_another_process_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def late(self: Path, target: Path) -> Path:
        target.mkdir()
        (target / "theirs").touch()
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    render_folder("gnome", tmp_path / "gnome", 1, 0, "a [trigger]")
    assert [path.name for path in (tmp_path / "gnome").iterdir()] == ["theirs"]
    assert [path.name for path in tmp_path.iterdir()] == ["gnome"]
