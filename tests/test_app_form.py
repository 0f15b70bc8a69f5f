"""The page's form without a model: painted regions, hostile pictures and numbers, and messages that say what to do."""

import base64
import json
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from app.drawing import form_of, wish_of
from app.masks import read_mask, write_mask
from app.mix import mixer_of
from app.plans import with_and_without
from app.regions import painted
from app.remember import form_from
from app.restoring import changes_of, settings_of
from app.speak import WIDTH, plain
from app.wish import Limits, Wish, checked, restored
from app.words import WORDS
from share_diffusion.blend import Blend

LIMITS = Limits(64, ("DDIM", "Euler"))
ENGINE = SimpleNamespace(limits=LIMITS, start=Wish(), cards={"watercolor": None, "robot": None}, look=lambda: None)


def form(blend, masks=None, **values):
    """The values of the form, in the order of `wish_of`."""
    asked = {"negative": "", "seed": 0, "count": 1, "steps": 4, "guidance": 2.0, "sampler": "DDIM", "width": 64, "height": 64}
    prompt = values.pop("prompt", "a robot")
    return (prompt, blend, mixer_of(""), *(asked | values).values(), masks)


def layer(*box):
    """A layer of the painting with one box painted, or nothing."""
    pixels = np.zeros((64, 64, 4), np.uint8)
    if box:
        left, top, right, bottom = box
        pixels[top:bottom, left:right, 3] = 255
    return pixels


def paint(form, layers, chosen):
    """The wish of a form and a painting."""
    return wish_of(ENGINE, form, lambda blend: painted({"layers": layers}, chosen, blend))


# painted regions

LEFT, RIGHT = (0, 0, 32, 64), (32, 0, 64, 64)


def test_a_region_can_be_painted_again_after_a_reload():
    """The browser gives back the blend and not the masks."""
    wish = paint(form("watercolor:1[region=@painted1 soft=0.05]"), [layer(*LEFT)], ("watercolor",))
    assert list(wish.masks) == Blend.parse(wish.blend).masks
    assert read_mask(wish.masks["painted1"]).getpixel((5, 5)) == 255


def test_what_was_rubbed_out_counts_no_more():
    before = paint(form("watercolor:1 + robot:1"), [layer(*LEFT), layer()], ("watercolor", "robot"))
    wish = paint(form(before.blend, before.masks), [layer(), layer(*RIGHT)], ("watercolor", "robot"))
    assert [term.region is not None for term in Blend.parse(wish.blend).terms] == [False, True]
    assert list(wish.masks) == Blend.parse(wish.blend).masks


def test_a_mask_from_elsewhere_stays_beside_what_is_painted():
    hat = write_mask(Image.new("L", (64, 64), 255))
    wish = paint(form("watercolor:1[region=@hat] + robot:1", {"hat": hat}), [layer(*LEFT)], ("robot",))
    assert wish.masks["hat"] == hat
    assert sorted(wish.masks) == Blend.parse(wish.blend).masks == ["hat", "painted1"]


def test_two_layers_of_one_concept_are_one_region():
    wish = paint(form("watercolor:1"), [layer(0, 0, 16, 64), layer(48, 0, 64, 64)], ("watercolor", "watercolor"))
    mask = read_mask(wish.masks["painted1"])
    assert [mask.getpixel((x, 30)) for x in (5, 30, 60)] == [255, 0, 255]


@pytest.mark.parametrize("blend", ["robot:1[region=left] + robot:0.5[region=right]", "robot:1[region=@painted1] + robot:0.5"])
def test_a_concept_that_would_stand_twice_is_refused_in_words(blend):
    with pytest.raises(ValueError, match="leave one of its terms under Draw"):
        paint(form(blend), [layer(*LEFT)], ("robot",))


def test_a_painting_still_has_to_be_one():
    with pytest.raises(ValueError, match="no region is painted"):
        paint(form("robot:1[region=@painted1]"), [layer()], ("robot",))
    with pytest.raises(ValueError, match="not in the blend"):
        paint(form("robot:1"), [layer(*LEFT)], ("watercolor",))


# numbers and texts


@pytest.mark.parametrize("field", ["seed", "steps", "width", "guidance_scale"])
def test_a_number_beyond_all_numbers_is_out_of_range(field):
    clean, problems = checked({field: 10**400, "prompt": "a"}, LIMITS)
    assert clean == {"prompt": "a"}
    assert problems[0].startswith(f"{field} is 1000")


def test_a_remembered_form_with_such_a_number_keeps_the_rest():
    assert form_from({"prompt": "a", "seed": 10**400}, ENGINE)[0] == {"prompt": "a"}


def test_a_remembered_form_leaves_alone_what_a_new_page_shows_already():
    """A page that has just opened may be typed into before the form comes back; it must not set defaults over that."""
    start = ENGINE.start
    same = {name: getattr(start, name) for name in ("prompt", "seed", "count", "steps", "guidance_scale", "sampler", "width")}
    assert form_from(same, ENGINE)[0] == {}
    assert form_from({**same, "steps": start.steps + 1}, ENGINE)[0] == {"steps": start.steps + 1}


@pytest.mark.parametrize("field", ["prompt", "negative_prompt", "blend"])
def test_half_a_character_is_refused_in_words(field):
    with pytest.raises(ValueError, match=f"{field} holds half a character at place 3"):
        Wish.of({field: "ab\ud800"}, LIMITS)


@pytest.mark.parametrize("side", [7, 4000])
def test_a_side_says_all_that_it_must_be(side):
    for value in (side, 65):
        with pytest.raises(ValueError, match=f"width is {value}; it is a multiple of 16 from 16 to 256"):
            Wish.of({"width": value}, LIMITS)


# pictures


def huge_png(width, height):
    """A PNG of a few bytes whose header promises many pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def picture(path, settings):
    """A small PNG with a text as its settings."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("share", settings if isinstance(settings, str) else json.dumps(settings))
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return str(path)


def test_a_picture_too_large_to_open_says_how_large_it_may_be(tmp_path):
    (tmp_path / "a.png").write_bytes(huge_png(40_000, 40_000))
    with pytest.raises(ValueError, match="67,108,864 pixels"):
        settings_of(str(tmp_path / "a.png"))


@pytest.mark.parametrize("side", [65, 40_000])
def test_a_mask_too_large_says_how_large_it_may_be(side):
    with pytest.raises(ValueError, match="more than 64 x 64 pixels"):
        read_mask(base64.b64encode(huge_png(side, side)).decode())


def test_settings_nested_beyond_reading_are_none(tmp_path):
    assert settings_of(picture(tmp_path / "a.png", "[" * 60_000)) == {}


def test_a_picture_with_a_number_beyond_all_numbers_is_restored_without_it(tmp_path):
    settings = settings_of(picture(tmp_path / "a.png", {"seed": 10**400, "prompt": "b", "blend": ""}))
    wish, notes = restored(settings, Wish(seed=4), LIMITS, [])
    assert (wish.seed, wish.prompt) == (4, "b")
    assert "seed" in notes[0]


def test_a_picture_repairs_a_form_that_is_wrong():
    now = form_of(ENGINE, form("robot:1 + ", width=7, seed=None, prompt="a <share:"))
    then, notes = restored({"blend": "robot:1", "width": 64, "prompt": "b"}, now, LIMITS, ["robot"])
    assert [row[1:] for row in changes_of(now, then)] == [["a <share:", "b"], ["robot:1 + ", "robot:1"], ["7", "64"]]
    assert notes == []
    assert Wish.of(then.values, LIMITS, ["robot"]).width == 64


# messages


def test_a_file_that_never_pays_has_a_price_all_the_same():
    facts = {"per_concept_mean": 0, "total": 10, "as_separate_loras": 0, "break_even_concepts": None}
    assert WORDS.cost(facts).startswith("A further concept costs 0 bytes")
    assert WORDS.cost(facts | {"break_even_concepts": 1200}).endswith("from 1,200 concepts on.")


def test_with_nothing_chosen_the_message_says_to_choose():
    with pytest.raises(ValueError, match="choose one"):
        with_and_without(Wish(blend="robot:1"), None)


@pytest.mark.parametrize("place", [0, 20, 60, 119, 120])
def test_a_message_keeps_its_mark_under_its_character(place):
    """A blend longer than a notice is shown around the mark."""
    text = "".join(chr(0x100 + index) for index in range(120))
    message = plain(f"blend: no\n  {text}\n  {' ' * place}^; width is 7")
    first, shown, mark = message.split("\n")
    assert (first, mark.endswith("^; width is 7")) == ("blend: no", True)
    assert shown[mark.index("^") :][:1] == text[place : place + 1]
    assert len(shown) <= WIDTH + 3


def test_a_short_message_stays_as_it_is_and_a_prompt_of_two_lines_is_one():
    assert plain("blend: no\n  robot:x\n        ^") == "blend: no\n  robot:x\n        ^"
    assert plain("blend: no\n  a\nb:x\n      ^") == "blend: no\n  a b:x\n      ^"
