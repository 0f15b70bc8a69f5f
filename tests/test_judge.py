"""The judge tells what decoded pictures show; the gate counts what it says; a sheet shows what was judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from share_diffusion.evaluate.gates import Sampling, check_base, compare, generate, sheet, unseen_scenes
from share_diffusion.evaluate.judge import HEADS, UNKNOWN, WEIGHTS, Judge, Network, name_all, write_judge
from share_diffusion.pictures import to_tensor
from share_diffusion.world.characters import CHARACTERS
from share_diffusion.world.render import Rendering, render, render_blend
from share_diffusion.world.scene import BACKGROUNDS, Scene, held_out, sample_scene
from share_diffusion.world.styles import STYLES

BASE = WEIGHTS.parent / "tiny"
ROOT = Path(__file__).parents[1]
needs_judge = pytest.mark.skipif(not WEIGHTS.exists(), reason="no trained judge; train one with python train/judge.py")
needs_base = pytest.mark.skipif(
    not (BASE / "model_index.json").exists(), reason="no embedded base; train one with python train/base.py"
)


def batch(renderings: list[Rendering]) -> Tensor:
    return torch.stack([to_tensor(rendering.picture) for rendering in renderings])


def decoded(renderings: list[Rendering]) -> Tensor:
    """Return what the base's autoencoder makes of the pictures, in [-1, 1]."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(BASE / "vae", torch_dtype=torch.float32)
    with torch.no_grad():
        parts = [vae.decode(vae.encode(part).latent_dist.mean).sample for part in batch(renderings).split(32)]  # type: ignore[union-attr]
    return torch.cat(parts).clamp(-1, 1)


def share_right(said: list[str], truths: list[str]) -> float:
    return sum(one == other for one, other in zip(said, truths, strict=True)) / len(truths)


@pytest.fixture(scope="module")
def untrained() -> Judge:
    torch.manual_seed(0)
    return Judge(Network())


# What the trained judge says


@needs_judge
@needs_base
def test_scenes_of_unseen_combinations_are_told_right() -> None:
    generator = np.random.default_rng(20260)
    renderings = [render(sample_scene(generator, unseen=True)) for _ in range(160)]
    said = Judge.load()(decoded(renderings))
    scenes = [rendering.scene for rendering in renderings]
    assert share_right(said["style"], ["plain"] * len(scenes)) >= 0.98
    assert share_right(said["subject"], [scene.subject for scene in scenes]) >= 0.98
    assert share_right(said["colour"], [scene.colour for scene in scenes]) >= 0.98
    assert share_right(said["background"], [scene.background for scene in scenes]) >= 0.98
    assert share_right(said["count"], [str(scene.count) for scene in scenes]) >= 0.98


@needs_judge
@needs_base
def test_styles_and_characters_are_told_right() -> None:
    generator = np.random.default_rng(20261)
    styled = [render(sample_scene(generator, unseen=True), style) for style in STYLES for _ in range(6)]
    places = [place for place in BACKGROUNDS for _ in range(2)]
    people = [render(Scene(name, "", place, seed=index)) for name in CHARACTERS for index, place in enumerate(places)]
    said = Judge.load()(decoded(styled + people))
    assert share_right(said["style"], [rendering.style for rendering in styled + people]) >= 0.98
    assert share_right(said["subject"][len(styled) :], [rendering.scene.subject for rendering in people]) >= 0.98


@needs_judge
@needs_base
def test_the_true_blend_is_both() -> None:
    pairs = [(style, name) for style in STYLES for name in list(CHARACTERS)[::2]]
    renderings = [render_blend(style, name, "room", seed=7) for style, name in pairs]
    said = Judge.load()(decoded(renderings))
    assert share_right(said["style"], [style for style, _ in pairs]) >= 0.95


@needs_judge
def test_pictures_of_nothing_are_unknown_to_every_head() -> None:
    generator = torch.Generator().manual_seed(0)
    blank = torch.linspace(-1, 1, 12).view(12, 1, 1, 1).expand(12, 3, 64, 64)
    noise = torch.rand(12, 3, 64, 64, generator=generator) * 2 - 1
    said = Judge.load()(torch.cat([blank, noise]))
    for head in ("subject", "colour", "background"):
        assert share_right(said[head], [UNKNOWN] * 24) >= 0.9, head
    # plain black passes for neon and plain white for halftone, whose grounds they are
    assert set(said["style"]) <= {UNKNOWN, "neon", "halftone"}
    assert share_right(said["style"], [UNKNOWN] * 24) >= 0.8


@needs_judge
def test_the_report_beside_the_weights_passes_its_own_gate() -> None:
    report = json.loads(WEIGHTS.with_suffix(".json").read_text(encoding="utf-8"))
    assert set(report["heads"]) == set(HEADS)
    assert all(report["sets"]["scenes"][head] >= 0.98 for head in HEADS)
    assert WEIGHTS.stat().st_size < 1_500_000


# The judge as a component


def test_heads_know_every_word_of_the_world_and_one_for_none() -> None:
    assert set(HEADS["style"]) == {"plain", *STYLES, UNKNOWN}
    assert set(CHARACTERS) < set(HEADS["subject"])
    assert all(labels[-1] == UNKNOWN and len(set(labels)) == len(labels) for labels in HEADS.values())


def test_a_label_needs_half_the_probability() -> None:
    rows = torch.zeros(3, len(HEADS["count"]))
    rows[0, 1] = 0.5
    rows[1, :] = torch.tensor([0.49, 0.3, 0.2, 0.01])
    rows[2, 3] = 1.0
    assert name_all("count", rows) == ["2", UNKNOWN, UNKNOWN]


def test_probabilities_sum_to_one_and_do_not_depend_on_the_batch(untrained: Judge) -> None:
    pictures = torch.rand(150, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    together = untrained.probabilities(pictures)
    alone = untrained.probabilities(pictures[140:141])
    for head, labels in HEADS.items():
        assert together[head].shape == (150, len(labels))
        torch.testing.assert_close(together[head].sum(dim=1), torch.ones(150))
        torch.testing.assert_close(together[head][140:141], alone[head])


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 3, 32, 64), (1, 1, 64, 64)])
def test_pictures_of_another_size_are_refused(untrained: Judge, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"the judge reads \(n, 3, 64, 64\)"):
        untrained(torch.zeros(shape))


def test_a_judge_comes_back_from_its_file(untrained: Judge, tmp_path: Path) -> None:
    write_judge(untrained.network, tmp_path / "judge.safetensors")
    write_judge(untrained.network, tmp_path / "again.safetensors")
    stored = (tmp_path / "judge.safetensors").read_bytes()
    assert stored == (tmp_path / "again.safetensors").read_bytes()
    assert len(stored) < 1_500_000
    again = Judge.load(tmp_path / "judge.safetensors")
    pictures = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1
    for head, table in untrained.probabilities(pictures).items():
        torch.testing.assert_close(again.probabilities(pictures)[head], table, atol=2e-3, rtol=0)


def test_a_missing_or_foreign_judge_says_how_to_get_one(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(ValueError, match=r"no judge at .*; train one with: python train/judge.py"):
        Judge.load(tmp_path / "none.safetensors")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors", metadata={"labels": '{"style": ["a"]}'})
    with pytest.raises(ValueError, match="judges other labels"):
        Judge.load(tmp_path / "other.safetensors")


def test_evaluating_does_not_import_diffusers() -> None:
    code = "import sys, share_diffusion.evaluate.gates; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# The gate


def test_the_gate_asks_for_held_out_combinations_and_repeats_them() -> None:
    scenes = unseen_scenes(60, seed=0)
    assert all(held_out(scene.subject, scene.colour, scene.background) for scene in scenes)
    assert scenes == unseen_scenes(60, seed=0) != unseen_scenes(60, seed=1)
    assert scenes[:20] == unseen_scenes(20, seed=0)


def test_the_gate_counts_by_hand() -> None:
    scenes = [Scene("cat", "red", "city"), Scene("cat", "blue", "room", count=2), Scene("cup", "red", "city")]
    said = {
        "style": ["plain", "ink", "plain"],
        "subject": ["cat", "cup", "cup"],
        "colour": ["red", "blue", UNKNOWN],
        "background": ["city", "room", "city"],
        "count": ["1", "2", "2"],
    }
    measures = compare(said, scenes)
    third, two = 0.3333, 0.6667
    assert measures["pictures"] == 3
    assert measures["accuracy"] == {"subject": two, "colour": two, "background": 1.0, "count": two}
    assert measures["subject, colour and background"] == third
    assert measures["plain"] == two
    assert measures["per label"]["subject"] == {"cat": 0.5, "cup": 1.0}
    assert measures["per label"]["colour"] == {"blue": 1.0, "red": 0.5}
    expected = [["colour", "red", UNKNOWN, 1], ["count", "1", "2", 1], ["subject", "cat", "cup", 1]]
    assert measures["mistakes"] == expected


@needs_judge
@needs_base
def test_a_pipeline_is_drawn_from_seeds_alone_and_judged() -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(BASE, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompts = [scene.describe() for scene in unseen_scenes(3, seed=0)]
    together = torch.stack(list(generate(pipeline, prompts, Sampling(steps=2, batch=3))))
    singly = torch.stack(list(generate(pipeline, prompts, Sampling(steps=2, batch=1))))
    assert together.shape == (3, 3, 64, 64)
    torch.testing.assert_close(together, singly, atol=1e-3, rtol=0)
    pictures, scenes, measures = check_base(pipeline, Judge.load(), 3, Sampling(steps=2, batch=2))
    torch.testing.assert_close(pictures, together, atol=1e-3, rtol=0)
    assert [scene.describe() for scene in scenes] == prompts
    assert measures["pictures"] == 3
    assert measures["broken"] == 0
    assert json.loads(json.dumps(measures)) == measures


# The sheet


def test_a_sheet_shows_every_picture_enlarged_with_its_caption() -> None:
    pictures = torch.stack([torch.full((3, 8, 8), value) for value in (-1.0, 0.0, 1.0)])
    pictures[0, 0, 0, 0] = 1
    page = np.asarray(sheet(pictures, ["one", "", "three words here"], columns=2, scale=3))
    assert page.shape == (6 + 2 * (24 + 28 + 6), 6 + 2 * (24 + 6), 3)
    assert (page[6:9, 6:9] == (255, 0, 0)).all()
    assert (page[9:30, 6:30] == 0).all()
    assert (page[6:30, 36:60] == 128).all()
    assert page[31:57, 6:30].min() < 128  # its caption is there
    assert page[31:57, 36:60].min() == 255  # and there is none
    with pytest.raises(ValueError, match="3 pictures and 1 captions"):
        sheet(pictures, ["one"])
