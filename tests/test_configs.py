"""Every shipped config is one that its reader takes, and says on top how it is used."""

import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from concept import ConceptSettings
from flags import ELSEWHERE, check

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
