"""The page without a browser: what is asked for is checked, names are never paths or markup, one address answers.

Facts, not clicks: the browser tests in `tests/browser/` do the clicking.
"""

import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from app.cards import Card, CardPictures, found, page_of
from app.comparing import of_blend
from app.export import FORMATS, write_blend
from app.history import History
from app.job import Job, Lesson
from app.knowledge import byte_facts, read_reports, report_files, spectrum_rows
from app.masks import read_mask, write_mask
from app.mix import mixer_of, newest, taken_from, with_concept, without_concept
from app.plans import axis_of, strip_plan, sweep_plan, with_and_without
from app.preview import montage, noise_levels
from app.prompt import with_trigger, without_trigger
from app.regions import layers_of
from app.remember import form_from
from app.restoring import changes_of, settings_of
from app.security import Guard, blocked, launch_settings, prepare
from app.speak import plain
from app.wish import Limits, Wish, checked, restored
from share_diffusion.blend import Blend
from share_diffusion.describe import describe
from share_diffusion.drawing import Sampling, png_info, save_png
from share_diffusion.lora import Factors, LoRA
from share_diffusion.progress import ProgressFile, read_progress
from share_diffusion.subspace import Subspace

LIMITS = Limits(64, ("DDIM", "Euler"))
KNOWN = ["watercolor", "robot"]


def card(name="watercolor", kind="style", trigger="watercolor", prompts=()):
    return Card(name, kind, trigger, 0.999, 1.0, tuple(prompts), "0" * 24)


def problems_of(**values):
    with pytest.raises(ValueError) as caught:
        Wish.of(values, LIMITS, KNOWN)
    return str(caught.value)


# what is asked for


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", "NaN"),
        ("seed", -1),
        ("seed", 2**60),
        ("seed", True),
        ("count", 17),
        ("count", 1.5),
        ("steps", 10**6),
        ("steps", 0),
        ("guidance_scale", float("inf")),
        ("guidance_scale", "1e9"),
        ("width", 16_384),
        ("width", 65),
        ("height", "tall"),
        ("sampler", "../../etc"),
        ("prompt", "x" * 10_001),
        ("prompt", "a\0b"),
        ("prompt", ["a list"]),
        ("blend", "watercolor:1e9"),
        ("blend", "watercolor:nan"),
        ("blend", "nobody:1"),
        ("blend", "watercolor:1 ++ robot"),
        ("blend", "robot[region=@hat]"),
        ("blend", " + ".join(f"robot:1[steps={n / 100}..1]" for n in range(70))),
        ("masks", {"hat": "not a picture"}),
        ("masks", {"hat": "A" * 9000}),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(field, value):
    assert field in problems_of(**{field: value}) or "blend" in field or field == "masks"


def test_all_problems_are_told_at_once():
    text = problems_of(steps=0, width=17, blend="nobody:99", seed=-4)
    assert all(word in text for word in ("steps", "width", "nobody", "seed", "beyond 10"))


def test_a_wish_of_many_pictures_is_one_wish_a_seed():
    wish = Wish.of({"prompt": "a", "seed": 5, "count": 3}, LIMITS, KNOWN)
    assert [(one.seed, one.count) for one in wish.each()] == [(5, 1), (6, 1), (7, 1)]


# settings in a picture, and back


def written_picture(path, **facts):
    info = png_info(
        "a robot", 7, Sampling(12, 2.5, "fog", 64, 64), "robot:0.5 + watercolor:-0.25", {"sampler": "Euler", **facts}
    )
    save_png(Image.new("RGB", (64, 64)), path, info)
    return path


def test_a_picture_gives_back_every_setting(tmp_path):
    wish, notes = restored(settings_of(str(written_picture(tmp_path / "a.png"))), Wish(count=4), LIMITS, KNOWN)
    assert notes == []
    assert (wish.prompt, wish.seed, wish.steps, wish.guidance_scale, wish.negative_prompt) == ("a robot", 7, 12, 2.5, "fog")
    assert (wish.blend, wish.sampler, wish.count) == ("robot:0.5 + watercolor:-0.25", "Euler", 1)


def test_a_picture_of_the_command_line_brings_the_bases_own_sampler_and_another_base_is_told():
    settings = {"prompt": "a", "steps": 12, "base": "sdxl"}
    wish, notes = restored(settings, Wish(sampler="Euler"), LIMITS, KNOWN, "tiny")
    assert wish.sampler == LIMITS.samplers[0]
    assert len(notes) == 1
    assert "'sdxl', not 'tiny'" in notes[0]


def test_what_a_picture_says_wrongly_is_left_out_and_told(tmp_path):
    settings = {"prompt": 7, "steps": 10**9, "blend": "robot:1 + stranger:2", "seed": 3, "width": "<img>", "unknown": 1}
    wish, notes = restored(settings, Wish(prompt="mine", steps=25), LIMITS, KNOWN)
    assert (wish.prompt, wish.steps, wish.seed, wish.blend) == ("mine", 25, 3, "robot:1")
    assert any("stranger" in note for note in notes)
    assert any("steps" in note for note in notes)


def test_only_differences_are_shown_before_they_are_taken_over():
    rows = changes_of(Wish(prompt="a", seed=1), Wish(prompt="b", seed=1))
    assert [row[1:] for row in rows] == [["a", "b"]]


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_what_is_no_picture_of_ours_has_no_settings(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    assert settings_of(str(tmp_path / "x.png")) == {}


def test_a_text_bomb_in_a_picture_is_no_settings(tmp_path):
    info = png_info("a", 1, Sampling(1, 1.0, "", 64, 64), "", {"filler": "x" * 80_000})
    save_png(Image.new("RGB", (64, 64)), tmp_path / "x.png", info)
    assert settings_of(str(tmp_path / "x.png")) == {}


def test_the_history_survives_a_restart_and_serves_only_its_own(tmp_path):
    history = History(tmp_path / "history")
    sampling = Sampling(12, 2.5, "", 64, 64)
    names = [history.add(Image.new("RGB", (64, 64), (n, 0, 0)), f"p{n}", n, sampling, "", {"base": "tiny"}) for n in range(3)]
    again = History(tmp_path / "history")
    assert sorted(again.ids()) == sorted(names)
    assert again.settings(names[1])["prompt"] == "p1"
    (tmp_path / "history" / "evil.html.png").write_bytes(b"x")
    for strange in ("../secret", "/etc/passwd", "evil.html", "", None, "20260101-000000-000000-ffff"):
        with pytest.raises(ValueError, match="not in the history"):
            again.path(strange)
    assert len(again.ids()) == 3


def test_nothing_of_this_machine_is_written_into_a_picture(tmp_path):
    history = History(tmp_path)
    name = history.add(Image.new("RGB", (64, 64)), "p", 1, Sampling(1, 1.0, "", 64, 64), "", {"base": "tiny", "subspace": "s"})
    content = history.path(name).read_bytes()
    assert str(tmp_path).encode() not in content
    assert str(Path.home()).encode() not in content


# blend, sliders, text, prompt


def moved(mixer, **weights):
    """The mixer's value after sliders were moved, by concept."""
    rows = [{**row, "weight": weights.get(row["name"], row["weight"])} for row in mixer["rows"]]
    return {**mixer, "rows": rows, "clock": mixer.get("clock", 0) + len(weights)}


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.floats(-9, 9)), unique_by=lambda pair: pair[0]))
def test_sliders_and_text_say_the_same(pairs):
    written = str(Blend(dict(pairs)))
    mixer = moved(mixer_of(written), **{name: 0.25 for name, _ in pairs})
    text = newest(written, mixer)
    assert Blend.parse(text).weights == {name: 0.25 for name, _ in pairs}
    assert mixer_of(text, mixer)["rows"] == mixer_of(text)["rows"] == mixer["rows"]


def test_a_slider_keeps_a_terms_options():
    written = "robot:0.6[blocks=down,mid][steps=0.2..1] + watercolor:1 | ties density=0.5"
    assert newest(written, moved(mixer_of(written), robot=-0.5)) == str(Blend.parse(written.replace("0.6", "-0.5")))


def test_a_concept_in_two_regions_has_two_sliders():
    written = "robot:0.6[region=left] + watercolor:1 + robot:0.3[region=right]"
    mixer = mixer_of(written)
    mixer["rows"][2]["weight"] = 1.0
    assert newest(written, mixer) == str(Blend.parse(written.replace("0.3", "1")))


@pytest.mark.parametrize("weight", [None, "1", True, float("nan"), float("inf"), {}])
def test_a_browser_that_sends_nonsense_changes_nothing(weight):
    assert newest("robot:0.5", moved(mixer_of("robot:0.5"), robot=weight) | {"clock": 1}) == "robot:0.5"


@pytest.mark.parametrize("mixer", [None, [], {}, {"of": 3, "rows": []}, {"of": "a:", "rows": [{}]}, {"of": "a", "rows": 3}])
def test_a_mixer_that_cannot_be_read_leaves_the_text(mixer):
    assert newest("robot:0.5", mixer) == "robot:0.5"
    assert mixer_of("robot:0.5", mixer)["rows"] == mixer_of("robot:0.5")["rows"]


def test_text_and_sliders_that_changed_before_they_agreed_are_both_kept():
    mixer = moved(mixer_of("robot:0.5 + watercolor:1"), robot=1.5)
    assert newest("robot:0.5 + watercolor:1", mixer) == "robot:1.5 + watercolor:1"
    assert newest("robot:0.5 + watercolor:0.2", mixer) == "robot:1.5 + watercolor:0.2"  # typed and moved
    assert newest("ink:1 + robot:0.5", mixer) == "ink:1 + robot:1.5"  # typed in front of it
    assert newest("robot:0.7", moved(mixer, robot=0.5)) == "robot:0.7"  # typed alone: the slider is where the text had it
    assert newest("robot:0.5 + ", mixer) == "robot:0.5 + "  # while it is being typed
    late = mixer_of("robot:0.5 + watercolor:0.2", mixer)  # the answer to what was typed, which had not seen the slider's text
    assert [row["weight"] for row in late["rows"]] == [1.5, 0.2]
    assert late["clock"] == mixer["clock"]
    assert newest("robot:0.5 + watercolor:0.2", late) == "robot:1.5 + watercolor:0.2"


def test_adding_and_removing_a_concept_restores_prompt_and_blend():
    for kind in ("style", "subject"):
        one = card(kind=kind)
        for prompt in ("a house on a beach", "a cat, at night"):
            assert without_trigger(with_trigger(prompt, one), one.trigger) == prompt
        assert without_concept(with_concept("robot:0.5", "watercolor", 0.8), "watercolor") == "robot:0.5"


def test_an_empty_prompt_becomes_the_concepts_example():
    example = "watercolor painting of a fish"
    assert with_trigger("", card(prompts=[example])) == example
    assert with_trigger(example, card(prompts=[example])) == example


@pytest.mark.parametrize("trigger", ["a.b", "c++", "(x)", "\\d", "robot"])
def test_a_trigger_is_text_and_never_a_pattern(trigger):
    one = card("x", "subject", trigger)
    assert without_trigger(with_trigger("red house", one), trigger) == "red house"


def test_tags_in_a_prompt_join_the_blend():
    assert taken_from("a robot <share:watercolor:0.8>", "robot:0.5") == ("a robot", "robot:0.5 + watercolor:0.8")
    assert taken_from("a < b", "robot:0.5") == ("a < b", "robot:0.5")


# cards: ten thousand stay usable


def test_ten_thousand_concepts_are_searched_and_paged_quickly(tmp_path):
    cards = [card(f"concept-{n:05d}", ("style", "subject")[n % 2], f"trg{n}") for n in range(10_000)]
    pictures = CardPictures(tmp_path)
    found(cards, "warm up")
    started = time.perf_counter()
    chosen = found(cards, "concept-0999", "style")
    shown, number, pages = page_of(found(cards), 10**9)
    missing = pictures.missing(shown)
    assert time.perf_counter() - started < 0.5
    assert [one.name for one in chosen] == ["concept-09990", "concept-09992", "concept-09994", "concept-09996", "concept-09998"]
    assert (len(shown), number, pages, len(missing)) == (16, 416, 417, 16)


def test_a_search_finds_names_whatever_their_case_and_accents():
    assert found([card("Straße"), card("Café")], "CAFE\u0301") == [card("Café")]


# plans


def test_with_and_without_differ_by_one_concept_alone():
    plan = with_and_without(Wish(prompt="a", blend="robot:0.5 + watercolor:1", seed=3, count=4), "watercolor")
    one, other = plan.wishes
    assert one.changed(blend="") == other.changed(blend="")
    assert (one.blend, other.blend) == ("robot:0.5 + watercolor:1", "robot:0.5")


def test_a_sweep_has_every_pair_once_and_a_strip_both_ends():
    wish = Wish(blend="robot:1", seed=10)
    plan = sweep_plan(wish, axis_of(wish, "robot", 0, 1, 3), axis_of(wish, "seed", 0, 0, 2))
    assert [(one.blend, one.seed) for one in plan.wishes] == [(f"robot:{w}", s) for s in (10, 11) for w in ("0", "0.5", "1")]
    ends = strip_plan(wish, "robot:1", "watercolor:1", 5).wishes
    assert Blend.parse(ends[0].blend).weights == {"robot": 1, "watercolor": 0}
    assert Blend.parse(ends[-1].blend).weights == {"robot": 0, "watercolor": 1}
    with pytest.raises(ValueError, match="too many"):
        sweep_plan(wish, axis_of(wish, "robot", 0, 1, 20), axis_of(wish, "seed", 0, 0, 20))


# previews


def test_two_latents_of_one_trajectory_give_the_picture_between_them():
    from types import SimpleNamespace

    from app.preview import Previewer

    alphas = torch.linspace(0.99, 0.01, 1000)
    scheduler = SimpleNamespace(alphas_cumprod=alphas, timesteps=torch.tensor([900, 500, 100]), init_noise_sigma=1.0)
    previewer = Previewer(SimpleNamespace(scheduler=scheduler))
    picture, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)

    def at(time):
        return alphas[time] ** 0.5 * picture + (1 - alphas[time]) ** 0.5 * noise

    previewer.see(0, at(500))  # after the first step
    levels = noise_levels(scheduler, 1)
    assert levels is not None
    torch.testing.assert_close(previewer.see(1, at(100)), picture, rtol=1e-3, atol=1e-3)


def test_a_montage_holds_every_picture():
    assert montage([Image.new("RGB", (64, 64))] * 5).size == (521, 346)


# painted regions


def test_a_painted_region_survives_being_text():
    mask = Image.new("L", (512, 256))
    mask.paste(255, (0, 0, 256, 256))
    again = read_mask(write_mask(mask))
    assert again.size == (64, 32)
    assert again.getpixel((5, 5)) == 255
    assert again.getpixel((60, 5)) == 0


# export


@pytest.fixture
def subspace():
    generator = torch.Generator().manual_seed(0)

    def factors():
        return Factors(torch.randn(12, 2, generator=generator), torch.randn(2, 8, generator=generator))

    def lora():
        where = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
        return LoRA({f"{where}.{name}": factors() for name in ("to_q", "to_k")})

    return Subspace.fit({"watercolor": lora(), "robot": lora()})


def test_the_exported_lora_is_the_blended_update(subspace, tmp_path):
    blend = Blend({"watercolor": 0.7, "robot": -1.3})
    path = write_blend(subspace, str(blend), "", next(iter(FORMATS)), tmp_path)
    assert (path.name, list(tmp_path.iterdir())) == ("watercolor robot.safetensors", [path])
    for layer, factors in LoRA.read(path).layers.items():
        wanted = sum(
            weight * (entry.up @ entry.down).double()
            for name, weight in blend.weights.items()
            for entry in [subspace.lora(name).layers[layer]]
        )
        error = (factors.up.double() @ factors.down.double() - wanted).norm() / wanted.norm()
        assert error < 2e-3  # the file is in half precision


def test_every_format_is_one_file_to_download(subspace, tmp_path):
    made = {form: write_blend(subspace, "robot:1", form, label, tmp_path) for label, form in FORMATS.items()}
    assert sorted(tmp_path.iterdir()) == sorted(made.values())
    assert {form for form, path in made.items() if path.suffix == ".zip"} == {"peft", "comfyui"}
    with zipfile.ZipFile(made["comfyui"]) as packed:
        assert "models/loras/comfyui.safetensors" in packed.namelist()


@pytest.mark.parametrize(
    ("written", "word"),
    [
        ("robot:1[region=left]", "robot: .*region"),
        ("robot:1[steps=0.2..1]", "robot: .*steps"),
        ("robot:0", "nothing to export"),
        ("", "nothing to export"),
        ("nobody:1", "nobody"),
    ],
)
def test_what_no_lora_can_hold_is_refused_and_nothing_is_left(subspace, tmp_path, written, word):
    with pytest.raises(ValueError, match=word):
        write_blend(subspace, written, "", next(iter(FORMATS)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_blend_that_is_not_named_is_called_by_its_concepts(subspace, tmp_path):
    assert write_blend(subspace, "robot:1", None, next(iter(FORMATS)), tmp_path).name == "robot.safetensors"


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "C:\\x", "..", "CON", "aux.txt", "a" * 300, "\u202egnp", " "])
def test_an_export_stays_in_its_folder_whatever_it_is_called(subspace, tmp_path, name):
    path = write_blend(subspace, "robot:1", name, next(iter(FORMATS)), tmp_path / "exports")
    assert path.parent == tmp_path / "exports"
    assert path.name.isprintable()
    assert [entry.name for entry in tmp_path.iterdir()] == ["exports"]


# learning


def test_a_lesson_tells_all_its_problems():
    with pytest.raises(ValueError) as caught:
        Lesson.of([], "a/b", "painting", "x" * 200, 10**9, [])
    assert all(word in str(caught.value) for word in ("a/b", "painting", "trigger", "pictures", "steps"))
    with pytest.raises(ValueError, match="already"):
        Lesson.of(["a.png"], "Robot", "subject", "", 10, ["robot"])


def test_a_file_that_is_no_picture_stops_a_lesson_before_it_starts(tmp_path):
    (tmp_path / "bad.png").write_text("<svg onload=alert(1)>")
    lesson = Lesson.of([str(tmp_path / "bad.png")], "x", "subject", "", 10, [])
    job = Job(lesson, tmp_path / "s.safetensors", "tiny", tmp_path / "lessons")
    with pytest.raises(ValueError, match=r"bad\.png"):
        job.take_pictures()
    assert list((tmp_path / "lessons").iterdir()) == []


def test_a_lesson_loads_the_base_as_the_page_did_and_ends_as_the_file_says(subspace, tmp_path):
    lesson = Lesson.of(["a.png"], "robot", "subject", "", 10, [])
    job = Job(lesson, tmp_path / "s.safetensors", "tiny", tmp_path / "lessons", ["--cpu", "--local_files_only"])
    assert job.command(tmp_path)[-2:] == ["--cpu", "--local_files_only"]
    job.folder.mkdir(parents=True)
    (job.folder / "log.txt").write_text("stopped")
    for held, state in ((False, "cancelled"), (True, "done")):  # a stop that comes after the merge
        if held:
            subspace.save(job.file)
        job.process, job.cancelled = subprocess.Popen([sys.executable, "-c", ""]), True
        assert list(job.watch())[-1].state == state


def test_progress_is_read_line_by_line_while_it_grows(tmp_path):
    path = tmp_path / "p.jsonl"
    writer = ProgressFile(path)
    writer.tell(step=1, loss=0.5)
    lines, position = read_progress(path)
    with path.open("a") as file:
        file.write('{"step": 2')
    assert [line["step"] for line in lines] == [1]
    assert read_progress(path, position) == ([], position)
    with path.open("a") as file:
        file.write(', "loss": 0.4}\n')
    assert [line["step"] for line in read_progress(path, position)[0]] == [2]


# what the subspace knows


def test_the_spectrum_starts_whole_and_ends_empty():
    rows = spectrum_rows("up", [torch.tensor([3.0, 1.0], dtype=torch.float64)])
    assert rows == [(0, 1.0, "up"), (1, 0.25, "up"), (2, 0.0, "up")]


def test_the_bytes_are_those_that_the_command_line_shows(subspace, tmp_path):
    saved = subspace.save(tmp_path / "s.safetensors")
    told = describe(saved, tmp_path / "s.safetensors")["bytes"]
    ours = byte_facts(saved, tmp_path / "s.safetensors")
    assert {**ours, "per_concept_mean": round(ours["per_concept_mean"], 1)} == told


def test_broken_reports_are_passed_over(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "report.json").write_text("{")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "report.json").write_text(json.dumps({"concept": "b", "retention": {"after": {"b": 0.5}}}))
    paths = report_files(tmp_path / "s.safetensors", tmp_path / "absent")
    assert len(paths) == 2
    assert read_reports([*paths, tmp_path / "gone.json"], ["b"]) == {"b": {"b": 0.5}}


def test_reports_are_looked_for_only_where_training_writes_them(tmp_path):
    lesson, beside = tmp_path / "lessons" / "20260101-000000-a" / "tiny" / "a", tmp_path / "tiny" / "b"
    elsewhere = tmp_path / "tiny" / "photos" / "deep" / "er"
    for folder in (lesson, beside, elsewhere):
        folder.mkdir(parents=True)
        (folder / "report.json").write_text("{}")
    found = report_files(tmp_path / "tiny" / "subspace.safetensors", tmp_path / "lessons")
    assert found == [beside / "report.json", lesson / "report.json"]


# what is chosen on a tab


def test_a_choice_stays_while_the_blend_holds_it():
    assert layers_of(["robot", "owl"], ["owl", None, None]) == ["owl", "robot", None]
    assert layers_of(["ink"], ["owl", "ink", None]) == [None, "ink", None]
    assert of_blend("robot + owl", "owl").value == "owl"
    assert of_blend("robot + owl", "ink").value == "robot"


# the form in the browser


def test_what_the_browser_kept_is_checked(tmp_path):
    class Engine:
        limits, start = LIMITS, Wish()

    values, mixer = form_from({"prompt": "a", "steps": 10**9, "blend": "robot:1[steps=", "seed": "x", "strange": 1}, Engine())
    assert values == {"prompt": "a", "blend": ""}
    assert mixer == mixer_of("")
    assert form_from("<script>", Engine()) == ({}, mixer_of(""))
    painted = "robot:0.5[region=@painted1 soft=0.1] + watercolor[region=left]"
    assert form_from({"blend": painted}, Engine())[0]["blend"] == "robot:0.5 + watercolor:1[region=left]"
    assert checked({}, LIMITS) == ({}, [])


# who may ask


def allowed(**headers):
    guard = Guard(None)
    return guard.allows({name.encode(): value.encode() for name, value in headers.items()})


def test_only_this_machines_names_are_answered():
    assert allowed(host="127.0.0.1:7860")
    assert allowed(host="localhost:7860", origin="http://localhost:7860")
    assert allowed(host="localhost:9000", origin="http://localhost:9000")  # an ssh tunnel from another port
    for host in ("evil.example", "evil.example:7860", "127.0.0.1.evil.example:7860", "localhost:x", "x@localhost:7860", ""):
        assert not allowed(host=host)
    for origin in ("null", "http://evil.example", "https://127.0.0.1:7860", "http://127.0.0.1:1", "http://127.0.0.1.evil:7860"):
        assert not allowed(host="127.0.0.1:7860", origin=origin)
    assert not allowed(host="evil.example:7860", origin="http://evil.example:7860")  # a name that was bound to this machine
    assert not allowed(host="localhost:7860", origin="http://localhost:3000")  # another program's page on this machine


def test_the_page_is_served_with_the_narrowest_settings(tmp_path):
    settings = launch_settings(7860, [tmp_path])
    assert settings["server_name"] == "127.0.0.1"
    assert settings["allowed_paths"] == [str(tmp_path.resolve())]
    assert not any(
        settings[name] for name in ("share", "show_error", "mcp_server", "enable_monitoring", "ssr_mode", "run_history")
    )
    assert "/etc" in blocked([tmp_path])


def test_sharing_over_the_internet_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_SHARE", "True")
    with pytest.raises(ValueError, match="GRADIO_SHARE"):
        prepare(tmp_path)


def test_uploads_are_private(tmp_path, monkeypatch):
    monkeypatch.delenv("GRADIO_SHARE", raising=False)
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "")
    prepare(tmp_path)
    assert (tmp_path / "uploads").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("path", ["/home/someone/secret/file.png", "/tmp/x/y/bad.png", "C:\\Users\\someone\\bad.png"])
def test_no_message_holds_a_path(path):
    shown = plain(f"cannot read {path}: broken")
    assert "someone" not in shown
    assert "/tmp" not in shown
    assert "broken" in shown
