"""The README is true: its Python runs, its commands exist, its names are the public ones."""

import re
import shlex
from pathlib import Path

import concept
import pytest
import sequence
from PIL import Image

import share_diffusion
from share_diffusion.__main__ import build
from share_diffusion.recipe import read_recipe_file
from share_diffusion.settings import parse
from share_diffusion.subspace import Subspace

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    lines = [part.split("#")[0].strip() for line in text.splitlines() for part in line.split("&&")]
    return [shlex.split(line) for line in lines if line]


@pytest.mark.slow
def test_the_first_python_lines_draw_a_blend(workplace):
    fast = ["--max_train_steps", "2", "--train_batch_size", "2", "--gradient_batches", "1", "--no-sheet", "--cpu"]
    for name in ("watercolor", "robot"):
        assert concept.main([*fast, "--concept", name]) == 0
    exec(blocks("python")[0], {})
    assert (workplace / "robot.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_script_of_ones_own_learns_two_concepts(workplace):
    (workplace / "photos").mkdir()
    Image.new("RGB", (80, 80), "orange").save(workplace / "photos/1.png")
    one, two = (block for block in blocks("python") if "share_diffusion.loop" in block)
    assert len([line for line in two.splitlines() if line and not line.startswith(("import", "from"))]) <= 15
    exec(one.replace("steps=200", "steps=1"), {})
    exec(two.replace("200", "1"), {})
    assert list(Subspace.load("mine.safetensors").concepts) == ["mycat", "mydog"]


def test_every_command_parses():
    known = 0
    for words in commands():
        if words[:2] == ["accelerate", "launch"]:
            settings = {"train/concept.py": concept.ConceptSettings, "train/sequence.py": sequence.SequenceSettings}[words[2]]
            parse(settings, words[3:])
            known += 1
        elif words[0] == "share-diffusion":
            build().parse_args(words[1:])
            known += 1
    assert known >= 6


def test_the_public_names_are_listed():
    missing = [name for name in share_diffusion.__all__ if f"`{name}`" not in README]
    assert missing == []
    assert all(getattr(share_diffusion, name) is not None for name in share_diffusion.__all__)


def test_every_ready_made_concept_is_complete():
    files = sorted((ROOT / "configs/concepts").glob("*.toml"))
    recipes = [read_recipe_file(path) for path in files]
    assert sum(recipe["kind"] == "style" for recipe in recipes) >= 10
    assert sum(recipe["kind"] == "subject" for recipe in recipes) >= 6
    for path, recipe in zip(files, recipes, strict=True):
        assert recipe["name"] == path.stem
        assert len(recipe["sample"]["prompts"]) == 4
        assert "[trigger]" in recipe["data"]["caption"]
