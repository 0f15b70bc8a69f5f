"""The engine and the page's events on the embedded base with the ready-made concepts, called as the page calls them."""

import os
import shutil
import threading
from types import SimpleNamespace

import gradio as gr
import pytest
from PIL import Image

from app import engine as engines
from app.engine import READY_MADE, open_engine
from app.page import create_page
from app.words import WORDS
from share_diffusion.drawing import Sampling, read_settings
from share_diffusion.file import drop_concept, listing

QUICK = ("", 2, 1.0, 64, 64)  # negative prompt, steps, guidance, width, height


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """The base, loaded once; each test opens a file of its own on it."""
    engine = open_engine("tiny", None, tmp_path_factory.mktemp("outputs") / "app")
    for card in engine.cards.values():  # so that nothing is drawn in the background
        Image.new("RGB", (8, 8)).save(engine.pictures.path(card))
    return engine


@pytest.fixture
def file(engine, tmp_path):
    """A copy of the ready-made concepts, opened."""
    path = tmp_path / "mine.safetensors"
    shutil.copyfile(READY_MADE, path)
    engine.file, engine.stamp, engine.failed, engine.wanted = path, None, set(), []
    engine.refresh()
    return path


@pytest.fixture(scope="module")
def page(engine):
    return create_page(engine)


def event(page, name, nth=0):
    """One of the page's event functions, by where it is defined."""
    found = [entry.fn for entry in page.fns.values() if entry.fn is not None]
    return [fn for fn in found if fn.__qualname__.replace(".<locals>", "") == name][nth]


def part(page, elem_id):
    """One of the page's components."""
    return next(block for block in page.blocks.values() if getattr(block, "elem_id", None) == elem_id)


def spoiled(path):
    """Make a file unreadable and return what it was."""
    before = path.read_bytes()
    path.write_bytes(before[: len(before) // 2])
    return before


# the file, while the page is open


def test_a_file_that_does_not_fit_leaves_the_old_one_on_the_model(engine, file, monkeypatch):
    status = file.stat()

    failures, attach = [ValueError("wrong base")], engines.attach

    def refuse(pipeline, subspace):
        if failures:
            raise failures.pop()
        return attach(pipeline, subspace)

    monkeypatch.setattr(engines, "attach", refuse)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    with pytest.raises(ValueError, match="wrong base"):
        engine.refresh()
    assert list(engine.draw([engine.start.changed(blend="robot:1", steps=1)], keep=False))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert engine.refresh()
    assert list(engine.draw([engine.start.changed(blend="robot:1", steps=1)], keep=False))


def test_a_damaged_file_is_told_of_and_drawing_goes_on(engine, file, page):
    before = spoiled(file)
    engine.look()
    assert list(engine.draw([engine.start.changed(blend="robot:1", steps=1)], keep=False))
    for _ in range(2):
        assert file.name in event(page, "wire_load.load")({})[part(page, "status")]["text"]
    file.write_bytes(before)
    assert engine.refresh()
    assert part(page, "status") not in event(page, "wire_load.load")({})


@pytest.mark.parametrize("spoil", [spoiled, lambda path: path.unlink()])
def test_a_page_fills_whatever_became_of_the_file(engine, file, page, spoil):
    spoil(file)
    filled = event(page, "wire_load.load")({"prompt": "still here", "seed": 10**400})
    assert filled[part(page, "prompt")] == "still here"
    assert part(page, "seed") not in filled
    assert len(filled[part(page, "cards")]["tiles"]) == 8
    told = filled.get(part(page, "status"), {"text": ""})["text"]
    assert (file.name in told) == file.exists()
    assert str(file.parent) not in told


def test_what_the_subspace_knows_is_told_or_why_not(engine, file, page):
    look = event(page, "inside.look")
    assert "A further concept costs" in look()[3]
    before = spoiled(file)
    assert file.name in look()[3]
    file.unlink()
    assert look()[3] == WORDS.gone(file.name)
    file.write_bytes(before)
    for name in [entry["name"] for entry in listing(file).concepts]:
        drop_concept(file, name)
    assert "A further concept costs 0 bytes" in look()[3]
    assert engine.cards == {}


def test_a_lesson_that_was_learned_into_a_broken_file_is_told(engine, file, page):
    spoiled(file)
    with pytest.raises(gr.Error, match=file.name):
        event(page, "create_page.learned")("", "all", "")


# learning


def test_the_shipped_file_is_never_learned_into(engine, file, monkeypatch, tmp_path):
    monkeypatch.chdir(READY_MADE.parents[2])
    monkeypatch.setattr(engines.Job, "start", lambda job: None)
    (tmp_path / "bad.png").write_text("no picture")
    Image.new("RGB", (64, 64)).save(tmp_path / "good.png")
    relative = READY_MADE.relative_to(READY_MADE.parents[2])
    engine.file, own = relative, engine.own_file
    assert engine.own_file == engine.folder.parent / "tiny" / "subspace.safetensors"
    with pytest.raises(ValueError, match=r"bad\.png"):
        engine.learn([str(tmp_path / "bad.png")], "glow", "style", "", 10)
    assert engine.file == relative
    assert not engine.own_file.exists()
    job = engine.learn([str(tmp_path / "good.png")], "glow", "style", "", 10)
    assert job.file == engine.file == engine.own_file
    assert job.file.read_bytes() == READY_MADE.read_bytes()
    assert own == file


def test_whatever_stops_a_lesson_the_button_comes_back(engine, file, page, monkeypatch):
    def full(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(engine, "learn", full)
    told, steps = {}, event(page, "learning.learn")(["a.png"], "glow", "style", "", 10)
    with pytest.raises(gr.Error, match="terminal"):
        told.update(some for step in steps for some in step.items())
    assert told[part(page, "learn-start")].interactive
    assert not told[part(page, "learn-cancel")].interactive
    assert told[part(page, "learn-status")] == {"text": WORDS.unexpected}


# cards


def test_a_card_that_cannot_be_drawn_is_tried_once_and_stops_no_other(engine, file, monkeypatch, caplog):
    done, tries = threading.Event(), []

    def draw(card):
        tries.append(card.name)
        if card.name == "watercolor":
            raise KeyError("unet")
        done.set()

    monkeypatch.setattr(engine, "draw_card", draw)
    cards = [engine.cards["watercolor"], engine.cards["robot"]]
    for card in cards:
        engine.pictures.path(card).unlink()
    try:
        assert engine.want_cards(cards) == 2
        assert done.wait(20)
        assert engine.want_cards(cards) == 1
        assert tries.count("watercolor") == 1
        assert "watercolor" in caplog.text
    finally:
        engine.wanted = []
        for card in cards:
            Image.new("RGB", (8, 8)).save(engine.pictures.path(card))


# programs


def test_a_prompts_tags_join_the_blend_of_a_program(engine, file, page):
    path = event(page, "wire_api.blend_api")("a house <share:watercolor:0.8>", "robot:0.5", 7, *QUICK)
    settings = read_settings(path)
    assert (settings["prompt"], settings["blend"]) == ("a house", "robot:0.5 + watercolor:0.8")
    assert read_settings(event(page, "wire_api.blend_api")("a house", "", 7, *QUICK))["blend"] == ""


@pytest.mark.parametrize(("place", "value", "word"), [(2, 10**400, "seed"), (0, "\ud800", "half a character")])
def test_a_program_that_asks_the_impossible_is_told_why(engine, file, page, place, value, word):
    values = ["a house", "", 7, *QUICK]
    values[place] = value
    with pytest.raises(gr.Error, match=word):
        event(page, "wire_api.blend_api")(*values)


# pictures


def drawn(engine, **facts):
    """A picture in the history."""
    return engine.history.add(Image.new("RGB", (64, 64)), "a", 1, Sampling(2, 1.0, "", 64, 64), "robot:1", facts)


def test_two_pictures_are_compared_after_one_was_deleted(engine, file, page):
    choose, (one, other, third) = event(page, "pairs.choose"), (drawn(engine) for _ in range(3))

    def click(name, chosen):
        return choose(gr.EventData(None, {"id": name}), 0, chosen)

    chosen = click(one, [])[2]
    engine.history.remove(one)
    chosen = click(other, chosen)[2]
    assert chosen == [other]
    paths, _, chosen, *_ = click(third, chosen)
    assert [os.path.basename(path) for path in paths] == [f"{other}.png", f"{third}.png"]
    assert chosen == [other, third]


def test_a_sheet_says_that_it_is_one(engine, file, page, tmp_path):
    from app.plans import axis_of, sweep_plan

    wish = engine.start.changed(blend="robot:1")
    plan = sweep_plan(wish, axis_of(wish, "robot", 0, 1, 2), axis_of(wish, "seed", 0, 0, 1))
    sheet, _ = engine.sheet(plan, [Image.new("RGB", (64, 64))] * 2)
    form = ("a", "robot:1", None, "", 0, 1, 2, 1.0, wish.sampler, 64, 64, {})
    assert event(page, "wire_restoring.dropped")(str(sheet), *form)[2] == WORDS.restore_sheet
    broken = ("a", "robot:1 +", None, "", 0, 1, 2, 1.0, wish.sampler, 7, 64, {})
    changes = event(page, "wire_restoring.dropped")(str(engine.history.path(drawn(engine))), *broken)[1]
    assert ["Width", "7", "64"] in changes["rows"]
    assert ["Blend", "robot:1 +", "robot:1"] in changes["rows"]


def test_a_sweep_of_nothing_says_to_choose(engine, file, page):
    form = ("a", "robot:1", None, "", 0, 1, 2, 1.0, engine.start.sampler, 64, 64, {})
    with pytest.raises(gr.Error, match="choose a concept"):
        list(event(page, "run.work", 1)(SimpleNamespace(session_hash="x"), None, 0, 1, 2, "seed", 0, 1, 2, *form))
