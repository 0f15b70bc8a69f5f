"""Facts about settings: what cannot be meant is refused before any work, and nothing that is asked for is passed over."""

from __future__ import annotations

import os
from pathlib import Path

import flags
import pytest
import sequence
import torch
from flags import ConceptSettings, check
from PIL import Image
from tiny_models import BUILDERS

from share_diffusion import checkpoint
from share_diffusion.cache import Cache, TextCache
from share_diffusion.checkpoint import find_state, list_states, save_state
from share_diffusion.concept import check_name, unknown_concept
from share_diffusion.data import read_dataset
from share_diffusion.models import family_of
from share_diffusion.models.layers import select
from share_diffusion.recipe import find_recipe
from share_diffusion.settings import parse


def refusal(**settings) -> str:
    """What is said of settings that cannot be meant."""
    with pytest.raises(ValueError) as caught:
        check(ConceptSettings(concept="robot", **settings))
    return str(caught.value)


def test_an_optimizer_that_finds_its_rate_gets_one_for_all(monkeypatch):
    monkeypatch.setattr(flags, "optimizer_of", lambda settings: None)  # it need not be installed
    settings = check(ConceptSettings(concept="robot", optimizer="prodigy"))
    assert (settings.learning_rate, settings.factor_learning_rate) == (1.0, 1.0)
    assert check(ConceptSettings(concept="robot", optimizer="Prodigy", learning_rate=0.5)).factor_learning_rate == 0.5
    assert "--text_encoder_lr 0.002: prodigy finds one rate" in refusal(optimizer="prodigy", text_encoder_lr=0.002)


@pytest.mark.parametrize(
    ("name", "words"),
    [("torch:optim", "is no torch.optim.Optimizer"), (".foo:Bar", "give module:Class"), ("torch.optim:LBFGS", "a closure")],
)
def test_what_is_no_optimizer_is_refused(name, words):
    assert words in refusal(optimizer=name)


def test_a_class_prompt_alone_is_refused():
    assert "--class_prompt 'a cat' is of no use without --with_prior_preservation" in refusal(class_prompt="a cat")


def test_a_file_of_flags_is_one_and_names_no_other(tmp_path, capsys):
    for name, text in {"a": "resolution = [64, 64]", "b": "seed = 1", "c": 'config = "a.toml"'}.items():
        (tmp_path / f"{name}.toml").write_text(text)
    assert parse(ConceptSettings, ["--config", str(tmp_path / "a.toml")]).resolution == 64
    wrong = {
        "give one file": ["--config", str(tmp_path / "a.toml"), "--config", str(tmp_path / "b.toml")],
        "names no further one": ["--config", str(tmp_path / "c.toml")],
    }
    for told, words in wrong.items():
        with pytest.raises(SystemExit):
            parse(ConceptSettings, words)
        assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[sample]\nprompts = [1, 2]", "expected a list of texts"),
        ("[data]\npictures = true", "data.pictures is True; expected int"),
        ('name = "other"', "name is 'other', and the file's own is 'mine'"),
    ],
)
def test_a_concept_file_that_cannot_be_meant_is_refused(tmp_path, text, words):
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(ValueError, match=words):
        find_recipe("mine", [tmp_path], tmp_path / "data")


def test_other_pictures_under_a_ready_made_name_are_called_by_their_own_trigger():
    configs = [Path(__file__).parents[1] / "configs/concepts"]
    recipe = find_recipe("dragon", configs, Path("data"), folder="photos", trigger="zork", instance_prompt="a photo of zork")
    assert all("zork" in prompt for prompt in recipe.prompts)


def test_a_name_fits_into_a_file_system():
    assert check_name("猫" * 60)
    with pytest.raises(ValueError, match="bytes in UTF-8"):
        check_name("猫" * 90)
    told = unknown_concept("robo", [f"concept-{index}" for index in range(300)] + ["robot"])
    assert "did you mean 'robot'?" in told
    assert "and 289 more" in told


def test_checkpoints_are_ordered_by_number_and_the_newest_stays(tmp_path):
    for step in (50, 100):
        save_state(tmp_path, step, {}, {}, keep=None)
    save_state(tmp_path, 20, {}, {}, keep=2)  # of another run of the same name
    assert [path.name for path in list_states(tmp_path)] == ["checkpoint-100", "checkpoint-20"]
    state, _ = find_state(tmp_path, "latest")
    assert state is not None
    assert state.step == 20
    (tmp_path / "checkpoint-20/manifest.json").write_text("[1]")
    state, _ = find_state(tmp_path, "latest")
    assert state is not None
    assert state.step == 100
    with pytest.raises(ValueError, match="cannot be used"):
        find_state(tmp_path, str(tmp_path / "checkpoint-20"))
    assert not hasattr(checkpoint, "time")  # clocks step back


def test_a_mask_is_found_however_its_name_is_composed(tmp_path):
    for name in ("e\u0301.png", "\u00e9.mask.png", "a.png", "a.jpg", "a.mask.png"):
        Image.new("L" if "mask" in name else "RGB", (64, 64), 9).save(tmp_path / name)
    dataset = read_dataset(tmp_path, instance_prompt="a photo")
    assert [example.mask is not None for example in dataset.examples] == [True] * 3


def test_captions_without_end_are_held_while_there_is_room(monkeypatch):
    encoded = []

    def encode(caption):
        encoded.append(caption)
        return {"x": torch.zeros(1, 256)}  # 1,024 bytes

    monkeypatch.setattr("share_diffusion.cache.ROOM", 3 * 1024)
    texts = TextCache(encode, "", Cache(), ["own"])
    texts.states(["own", "a", "b", "c", "a", "d", "own", "a", "b"])
    assert encoded == ["own", "a", "b", "c", "d", "b"]
    assert list(texts.cache.held) == [next(iter(texts.cache.held))]
    assert len(texts.recent) == 3


def test_workers_share_cores_and_accelerators(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert sequence.share_of(0, 3)["OMP_NUM_THREADS"] == "2"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert [sequence.share_of(place, 3)["CUDA_VISIBLE_DEVICES"] for place in range(3)] == ["4", "6", "4"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="starts processes by itself"):
        sequence.check(sequence.SequenceSettings(concepts=("robot",), workers=2), [])


def test_an_expression_leaves_out_what_cannot_influence_a_picture():
    pipeline = BUILDERS["sdxl"]()
    chosen, idle = select(pipeline, "text_encoder"), family_of(pipeline).idle(pipeline)
    assert idle
    assert chosen
    assert not any(path.startswith(idle) for path in chosen)
