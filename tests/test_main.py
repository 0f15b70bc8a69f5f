"""Facts about the command line: stable JSON, reproducible pictures with their settings inside, one message for bad input."""

import json

import pytest
import torch
from PIL import Image

from share_diffusion.__main__ import main
from share_diffusion.base import TINY, load_base
from share_diffusion.drawing import read_settings
from share_diffusion.lora import Factors, LoRA
from share_diffusion.models.identity import identify
from share_diffusion.models.layers import select, shape_of
from share_diffusion.subspace import Origin, Subspace

DRAW = ("generate", "--prompt", "a cat")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A subspace of two random concepts on the embedded base, of which one is a subject."""
    pipeline, generator = load_base("tiny"), torch.Generator().manual_seed(0)

    def lora():
        layers = {}
        for path, module in select(pipeline).items():
            out, width = shape_of(module)[0]
            up, down = torch.randn(out, 3, generator=generator), torch.randn(3, width, generator=generator)
            layers[path] = Factors(up * 0.05, down * 0.05)
        return LoRA(layers)

    about = {"robot": {"kind": "subject", "trigger": "robot"}}
    subspace = Subspace(base=identify(pipeline, "tiny")).merge({"watercolor": lora(), "robot": lora()}, about=about)
    path = tmp_path_factory.mktemp("file") / "two.safetensors"
    subspace.save(path)
    return path


def test_show_json_has_the_stable_keys(file, capsys):
    assert main(["show", str(file), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {"format_version", "base", "basis_version", "layers", "basis_rank", "bytes", "concepts"} <= set(facts)
    assert set(facts["basis_rank"]) == {"min", "max", "mean"}
    assert {"basis", "per_concept_mean", "total", "as_separate_loras", "break_even_concepts"} == set(facts["bytes"])
    keys = {"name", "kind", "trigger", "pseudo_rank", "retention", "bytes"}
    assert all(keys <= set(concept) for concept in facts["concepts"])
    assert facts["bytes"]["total"] == file.stat().st_size
    numbers = sum(concept["bytes"] for concept in facts["concepts"]) + facts["bytes"]["basis"]
    assert numbers < facts["bytes"]["total"] < numbers + 60_000


def test_show_prints_a_page(file, capsys):
    assert main(["show", str(file)]) == 0
    said = capsys.readouterr().out
    assert "shared basis" in said
    assert "overlap" in said
    assert "robot       subject" in said


def test_a_basis_of_a_seed_makes_the_file_the_smaller_one_from_the_first_concept_on(tmp_path, capsys):
    empty = Subspace(origin=Origin("random", 8)).cover({"unet.a": ((64, 64), None)})
    basis = empty.layers["unet.a"]
    lora = LoRA({"unet.a": Factors(basis.beta @ torch.randn(8, 2), torch.randn(2, 8) @ basis.alpha.T)})
    file = tmp_path / "one.safetensors"
    empty.merge({"watercolor": lora}).save(file)
    assert main(["show", str(file)]) == 0
    assert "from the first concept on" in capsys.readouterr().out
    assert main(["show", str(file), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["bytes"]
    assert (facts["basis"], facts["break_even_concepts"]) == (0, 1)


def test_generate_is_reproducible_and_its_png_tells_how(file, tmp_path, capsys):
    words = ["generate", "--subspace", str(file), "--prompt", "a red house", "--steps", "2", "--seed", "5", "--device", "cpu"]
    blend = ["--blend", "watercolor:0.8 + robot:-0.5"]
    assert main([*words, *blend, "--output", str(tmp_path / "one.png")]) == 0
    assert main([*words, *blend, "--output", str(tmp_path / "two.png")]) == 0
    assert main([*words, "--output", str(tmp_path / "base.png")]) == 0
    assert main(["generate", *words[3:], "--output", str(tmp_path / "without.png")]) == 0
    pixels = {name: Image.open(tmp_path / f"{name}.png").tobytes() for name in ("one", "two", "base", "without")}
    assert pixels["one"] == pixels["two"] != pixels["base"]
    assert pixels["base"] == pixels["without"]
    settings = read_settings(tmp_path / "one.png")
    assert settings["prompt"] == "a red house"
    assert settings["blend"] == "watercolor:0.8 + robot:-0.5"
    assert (settings["seed"], settings["steps"], settings["base"]) == (5, 2, "tiny")
    assert "parameters" in Image.open(tmp_path / "one.png").text


def test_a_prompt_and_flags_make_one_blend(file, tmp_path):
    (mask := Image.new("L", (8, 8))).paste(255, (0, 0, 4, 8))
    mask.save(tmp_path / "half.png")
    words = ["generate", "--subspace", str(file), "--steps", "2", "--device", "cpu", "--output", str(tmp_path / "x.png")]
    prompt = ["--prompt", "a red <share:robot:0.5[steps=0..0.5]> house"]
    more = ["--blend", "watercolor", "--regions", "watercolor=@half soft=0.1", "--masks", f"half={tmp_path / 'half.png'}"]
    assert main([*words, *prompt, *more, "--method", "ties density=0.4"]) == 0
    settings = read_settings(tmp_path / "x.png")
    assert settings["prompt"] == "a red house"
    written = "watercolor:1[region=@half soft=0.1] + robot:0.5[steps=0..0.5] | ties density=0.4"
    assert settings["blend"] == written
    first = (tmp_path / "x.png").read_bytes()
    again = ["--prompt", "a red house", "--blend", written, "--masks", f"half={tmp_path / 'half.png'}"]
    assert main([*words, *again]) == 0
    assert (tmp_path / "x.png").read_bytes() == first


def test_grid_writes_a_sheet_its_cells_and_a_film(file, tmp_path, capsys):
    words = ["grid", "--subspace", str(file), "--prompt", "a cat", "--steps", "1", "--device", "cpu"]
    places = ["--output", str(tmp_path / "g.png"), "--cells", str(tmp_path / "cells"), "--gif", str(tmp_path / "g.gif")]
    assert main([*words, *places, "--blend", "robot:0.5", "--x", "watercolor=0..1/3", "--y", "seed=1,2"]) == 0
    assert [cell["seed"] for cell in read_settings(tmp_path / "g.png")["cells"]] == [1, 1, 1, 2, 2, 2]
    assert read_settings(tmp_path / "cells" / "frame-004.png")["blend"] == "robot:0.5 + watercolor:0.5"
    assert Image.open(tmp_path / "g.gif").n_frames == 10
    assert main([*words, "--output", str(tmp_path / "s.png"), "--strip", "robot", "watercolor:0.5", "--frames", "3"]) == 0
    assert read_settings(tmp_path / "s.png")["cells"][1]["blend"] == "robot:0.5 + watercolor:0.25"
    capsys.readouterr()
    assert main([*words, "--output", "x.jpg", "--y", "seed=1", "--gif", "x.png"]) == 1
    said = capsys.readouterr().err
    assert all(text in said for text in ("either --x", "--y needs --x", "end in .png", "end in .gif"))


def test_pictures_tell_the_name_of_their_base_and_no_folder_of_this_computer(file, tmp_path):
    (folder := tmp_path / "private" / "mine").parent.mkdir()
    folder.symlink_to(TINY)
    words = ["--subspace", str(file), "--prompt", "a cat", "--steps", "1", "--device", "cpu", "--base", str(folder)]
    assert main(["generate", *words, "--output", str(tmp_path / "one.png")]) == 0
    places = ["--output", str(tmp_path / "grid.png"), "--cells", str(tmp_path / "cells")]
    assert main(["grid", *words, *places, "--x", "robot=0..1/2"]) == 0
    for path in (tmp_path / "one.png", tmp_path / "grid.png", tmp_path / "cells" / "frame-000.png"):
        assert read_settings(path)["base"] == "mine"
        assert not [text for text in Image.open(path).text.values() if "private" in text]


def test_where_nothing_can_be_drawn_to_is_told_before_anything_is_loaded(file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("share_diffusion.base.load_base", lambda *_, **__: pytest.fail("the base was loaded"))
    (tmp_path / "file").write_text("mine")
    inside, long = str(tmp_path / "file" / "x.png"), str(tmp_path / f"{'x' * 250}.png")
    assert main(["generate", "--prompt", "a cat", "--output", inside]) == 1
    assert "file is no folder; choose another place" in capsys.readouterr().err
    assert main(["generate", "--prompt", "a cat", "--output", long, "--seed", str(2**64)]) == 1
    said = capsys.readouterr().err
    assert "its name has 254 bytes, at most 230" in said
    assert "it is 0 to 2**63 - 1001" in said
    words = ["grid", "--subspace", str(file), "--prompt", "a cat", "--strip", "robot", "watercolor", "--blend", "robot"]
    assert main([*words, "--cells", str(tmp_path / "file"), "--gif", str(tmp_path / "file" / "a.gif")]) == 1
    said = capsys.readouterr().err
    assert all(text in said for text in ("--cells", "--gif", "say nothing about --strip"))


def test_a_device_that_is_not_there_is_told_with_those_that_are(tmp_path, capsys):
    for device in ("nonsense", "cuda:99"):
        assert main(["generate", "--prompt", "a cat", "--device", device, "--output", str(tmp_path / "x.png")]) == 1
        assert f"device '{device}' cannot be used here; there are: cpu" in capsys.readouterr().err


def test_a_base_in_half_precision_draws_nearly_the_same(file, tmp_path):
    words = [*DRAW, "--subspace", str(file), "--blend", "robot:0.2", "--steps", "2", "--device", "cpu"]
    for precision in ("float32", "bfloat16"):
        assert main([*words, "--precision", precision, "--output", str(tmp_path / f"{precision}.png")]) == 0
    full, half = (torch.tensor(list(Image.open(tmp_path / f"{name}.png").tobytes())) for name in ("float32", "bfloat16"))
    assert 0 < (full - half).abs().float().mean() < 4


def test_one_concept_goes_into_one_region(file, capsys):
    words = [*DRAW, "--subspace", str(file), "--blend", "robot", "--regions", "robot=left", "robot=right"]
    assert main(words) == 1
    assert "--regions names 'robot' twice" in capsys.readouterr().err


def test_a_mask_of_a_monstrous_size_is_refused(file, tmp_path, capsys, monkeypatch):
    Image.new("L", (64, 64)).save(tmp_path / "m.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    words = [*DRAW, "--subspace", str(file), "--blend", "robot", "--regions", "robot=@m"]
    assert main([*words, "--masks", f"m={tmp_path / 'm.png'}", "--output", str(tmp_path / "x.png")]) == 1
    assert "no picture of a usable size" in capsys.readouterr().err


def test_overlap_is_told_as_text_and_as_json(file, capsys):
    assert main(["overlap", str(file)]) == 0
    assert "watercolor and robot overlap" in capsys.readouterr().out
    assert main(["overlap", str(file), "robot", "watercolor", "--json"]) == 0
    (pair,) = json.loads(capsys.readouterr().out)
    assert {"one", "other", "cosine", "groups", "advice"} == set(pair)
    assert set(pair["groups"]) == {"down", "mid", "up", "text"}


def test_several_pictures_are_numbered(file, tmp_path, capsys):
    words = ["generate", "--prompt", "a cat", "--steps", "1", "--count", "2", "--device", "cpu"]
    assert main([*words, "--output", str(tmp_path / "new folder" / "x.png")]) == 0
    assert sorted(path.name for path in (tmp_path / "new folder").iterdir()) == ["x-000.png", "x-001.png"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--blend", "watercolour"], "holds: watercolor, robot"),
        (["--blend", "watercolor:x"], "'x' of 'watercolor' is not a number"),
        (["--output", "x.jpg"], "must end in .png"),
        (["--width", "70"], "width is 70"),
        (["--steps", "0"], "steps is 0"),
        (["--count", "0"], "count is 0"),
        (["--method", "mean"], "unknown method 'mean'"),
        (["--regions", "robot=left"], "of a concept in the blend"),
        (["--blend", "robot", "--regions", "robot=middle"], "unknown region 'middle'"),
        (["--blend", "robot", "--masks", "hat=nowhere.png"], "cannot read 'nowhere.png'"),
        (["--blend", "robot[region=@hat]"], "give --masks hat=FILE"),
        (["--blend", "robot[blocks=early]"], "no adapted layer is in block group early"),
    ],
)
def test_bad_requests_are_one_message_and_no_file(file, tmp_path, monkeypatch, capsys, words, expected):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--subspace", str(file), "--prompt", "x", *words]) == 1
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_missing_or_foreign_file_is_one_message(tmp_path, capsys):
    (tmp_path / "other.safetensors").write_bytes(b"no")
    for name in ("nothing.safetensors", "other.safetensors"):
        for command in ("show", "verify"):
            assert main([command, str(tmp_path / name)]) == 1
            assert name in capsys.readouterr().err


def test_drop_keeps_the_others_and_a_backup(file, tmp_path, capsys):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(file.read_bytes())
    before = Subspace.load(copy)
    assert main(["drop", str(copy), "nobody"]) == 1
    assert "holds: watercolor, robot" in capsys.readouterr().err
    assert main(["drop", str(copy), "robot"]) == 0
    after = Subspace.load(copy)
    assert list(after.concepts) == ["watercolor"]
    layer, entry = next(iter(after["watercolor"].coefficients.items()))
    assert torch.equal(entry.beta, before["watercolor"].coefficients[layer].beta)
    assert list(Subspace.load(copy.with_name(copy.name + ".bak")).concepts) == ["watercolor", "robot"]
    assert main(["verify", str(copy)]) == 0


def test_doctor_names_what_is_there(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in said
    assert "base tiny      present" in said


def test_measure_begins_a_file_and_never_touches_one_that_is_there(tmp_path, capsys):
    file = tmp_path / "new file.safetensors"
    assert main(["measure", str(file)]) == 0
    assert "come with the package" in capsys.readouterr().out
    begun = Subspace.load(file)
    assert (begun.origin.kind, begun.base.name, len(begun.layers), len(begun.concepts)) == ("activations", "tiny", 112, 0)
    before = file.read_bytes()
    assert main(["measure", str(file)]) == 1
    assert "is there already" in capsys.readouterr().err
    assert file.read_bytes() == before
    other, few = tmp_path / "few.safetensors", ["--pictures", "2", "--draws", "4", "--batch", "2", "--gradient_checkpointing"]
    words = ["--derived_rank", "6", "--targets", "attention", "--no-train_text_encoder", *few]
    assert main(["measure", str(other), *words]) == 0
    said = capsys.readouterr().out
    assert "pictures of its own" in said
    few = Subspace.load(other)
    assert all(layer.startswith("unet") for layer in few.layers)
    columns = sum(sum(few.origin.principal.widths(layer)) for layer in few.layers)
    assert f"{columns:,} columns" in said
    assert columns <= 6 * 2 * len(few.layers)
    bad = [str(tmp_path / "no" / "x")], [str(tmp_path / "y"), "--derived_rank", "0"], [str(tmp_path / "y"), "--batch", "0"]
    bad = *bad, [str(tmp_path / "y"), "--pictures", "8"]  # nothing is drawn for the embedded base
    for words in bad:
        assert main(["measure", *words]) == 1
        assert capsys.readouterr().err.startswith("error: ")
