"""Every shipped config is one that its reader takes, and says on top how it is used."""

import re
import shlex
import unicodedata
from dataclasses import replace
from pathlib import Path

import base
import judge
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from concept import ConceptSettings
from flags import ELSEWHERE, check, comparable

from share_diffusion.recipe import default_trigger, find_recipe
from share_diffusion.settings import parse, spell

ROOT = Path(__file__).resolve().parents[1]
PRESETS = sorted((ROOT / "configs/presets").glob("*.toml"))
ACCELERATE = sorted((ROOT / "configs/accelerate").glob("*.yaml"))


def head(path):
    """The comment on top of a file, as text."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line[1:] for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


def command(path):
    """The command in the comment on top of a file, as words."""
    return shlex.split(
        re.search(r"accelerate launch.*?(?=\n\s*\n|\nNeeds|\n The|\Z)", head(path).replace("\\\n", " "), re.DOTALL)[0]
    )


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_read_and_its_command_works(path):
    text = head(path)
    assert "Needs:" in text
    assert re.search(r"How long: .*(estimate|measured)", text)
    words = command(path)
    assert words[:3] == ["accelerate", "launch", "--config_file"]
    assert (ROOT / words[3]).is_file()
    assert words[4] == "train/concept.py"
    place = words.index("--config") + 1
    assert (ROOT / words[place]) == path
    words[place] = str(path)
    settings = parse(ConceptSettings, words[5:], elsewhere=ELSEWHERE)
    assert check(settings).mixed_precision in ("no", "bf16")
    assert settings.pretrained_model_name_or_path != "tiny" or path.stem == "tiny"


def test_every_base_has_a_preset_for_every_size_of_memory():
    wanted = {f"{base}-{size}gb" for base in ("sd15", "sdxl", "sd35", "flux") for size in (8, 12, 24, 48)}
    assert {path.stem for path in PRESETS} == {*wanted, "tiny"}


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_reads_its_config(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
    words = command(path)
    known = launch_command_parser().parse_args(words[2:])
    assert known.training_script == "train/concept.py"
    parse(ConceptSettings, known.training_script_args, elsewhere=ELSEWHERE)
    assert (config.num_machines > 1) == (path.stem == "multi_node")


def test_settings_spelled_as_flags_are_the_same_settings():
    settings = parse(ConceptSettings, ["--concept", "robot", "--no-sheet", "--optimizer_args", "a=1", "b=2", "--seed", "3"])
    assert parse(ConceptSettings, spell(settings)) == settings


OUT_OF_RANGE = [
    *(("text_encoder_lr", -1.0), ("lr_warmup_steps", -5), ("finetune_steps", -2), ("ema_decay", 0.0), ("ema_decay", 1.5)),
    *(("snr_gamma", float("nan")), ("snr_gamma", 1e300), ("learning_rate", float("inf")), ("preserve_weight", float("inf"))),
    *(("lr_power", -2.0), ("checkpoints_total_limit", -1), ("checkpoints_total_limit", 0), ("seed", 10**20), ("seed", -1)),
    *(("derived_rank", 0), ("max_grad_norm", -1.0), ("max_train_steps", 10**400), ("retain", float("nan"))),
]


def test_every_number_out_of_its_range_is_told_with_its_value_and_its_limits():
    for name, value in OUT_OF_RANGE:
        with pytest.raises(ValueError, match=rf"--{name} is .+; it is (a share )?(above )?[0-9]"):
            check(replace(ConceptSettings(), **{name: value}))
    everything = replace(ConceptSettings(), **dict(OUT_OF_RANGE))
    with pytest.raises(ValueError, match="it is") as told:
        check(everything)
    assert all(f"--{name} is" in str(told.value) for name, _ in OUT_OF_RANGE)


def test_the_ends_of_the_ranges_are_in_them():
    ends = {
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "keep_tokens": 0,
        "lr_warmup_steps": 0,
        "retain": 1.0,
        "seed": 2**63 - 1,
    }
    check(replace(ConceptSettings(), **ends, caption_dropout_rate=1.0, noise_offset=1.0, checkpoints_total_limit=1))


def test_what_acts_in_the_merge_alone_may_change_before_a_run_goes_on():
    limits = {"basis_rank": 60, "budget": "2MB", "retain": 0.9}
    assert comparable(ConceptSettings()) == comparable(replace(ConceptSettings(), **limits))


def test_a_config_in_another_encoding_is_one_message(tmp_path, capsys):
    (tmp_path / "run.toml").write_bytes('trigger = "café"\n'.encode("latin-1"))
    with pytest.raises(SystemExit):
        parse(ConceptSettings, ["--config", str(tmp_path / "run.toml")])
    assert "not TOML" in capsys.readouterr().err


def test_a_name_has_one_spelling_and_a_trigger_its_accents(tmp_path):
    apart = unicodedata.normalize("NFD", "Élan")
    (tmp_path / apart).mkdir()
    found = find_recipe(apart, [], tmp_path)
    assert (found.name, found.trigger, found.folder) == ("Élan", "élan", tmp_path / apart)
    for name, word in (("My Cat_2", "mycat2"), ("写真", "写真"), ("हिन्दी", "हिन्दी"), ("--", "--"), (apart, "élan")):
        assert default_trigger(name, None) == word


@pytest.mark.parametrize(
    ("script", "words", "expected"),
    [
        (judge, ["--pictures", "499"], "--pictures is 499; it is a multiple of 500"),
        (judge, ["--held_out", "3", "--guidance", "nan"], "--held_out is 3; it is 4 to"),
        (judge, ["--vae", "nowhere"], "there is no autoencoder in nowhere"),
        (base, ["--scenes", "0", "--seed", "-1"], "--seed is -1"),
        (base, ["--stages", "denoiser", "--work_dir", "nowhere"], "run the stage autoencoder first"),
    ],
)
def test_the_scripts_that_train_what_is_shipped_refuse_in_one_line(workplace, capsys, script, words, expected):
    assert script.main(words) == 1
    said = capsys.readouterr().err
    assert expected in said
    assert said.count("\n") == 1
    assert not list(workplace.iterdir())


def test_a_stage_that_there_is_not_names_those_that_there_are(workplace, capsys):
    with pytest.raises(SystemExit):
        base.main(["--stages", "nosuch"])
    assert "decoder" in capsys.readouterr().err
