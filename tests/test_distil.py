"""Facts about distilling: what an effect is, that projecting is where it starts, and that learning goes beyond it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import BUILDERS

from share_diffusion.__main__ import main
from share_diffusion.adapt import Adaptation, make_learner
from share_diffusion.attached import Attached
from share_diffusion.base import load_base
from share_diffusion.capacity import Capacity
from share_diffusion.distil import Distillation, Lesson, default_prompts, distil, start
from share_diffusion.file import load
from share_diffusion.layer import Update
from share_diffusion.learning import freeze
from share_diffusion.lora import Factors, LoRA
from share_diffusion.models.identity import identify
from share_diffusion.models.layers import select, shape_of
from share_diffusion.subspace import Subspace

QUICK = Distillation(steps=12, batch=4, rate=5e-2, latents=4, drawing_steps=2, directions=0)
PROMPTS = ("a red house", "a blue cat", "a green tree", "a dog at night")


@pytest.fixture(scope="module")
def pipeline() -> Any:
    pipeline = load_base("tiny")
    freeze(pipeline)
    return pipeline


@pytest.fixture(scope="module")
def shapes(pipeline) -> dict[str, tuple[int, int]]:
    """Every other attention layer, which is quicker."""
    return {path: shape_of(module)[0] for path, module in list(select(pipeline).items())[::2]}


def random_lora(shapes: dict[str, tuple[int, int]], seed: int, rank: int = 4) -> LoRA:
    generator = torch.Generator().manual_seed(seed)
    return LoRA(
        {
            path: Factors(
                0.15 * torch.randn(out, rank, generator=generator), torch.randn(rank, into, generator=generator) / into**0.5
            )
            for path, (out, into) in shapes.items()
        }
    )


@pytest.fixture(scope="module")
def subspace(pipeline, shapes) -> Subspace:
    """Bases of 12 columns, of three random updates."""
    loras = {name: random_lora(shapes, seed) for seed, name in enumerate("abc")}
    return Subspace.fit(loras, base=identify(pipeline, "tiny"), capacity=Capacity(retain=None, rank=12))


def test_an_effect_is_one_for_the_teacher_and_nothing_for_nobody(pipeline, shapes) -> None:
    lora = random_lora(shapes, 5)
    with Attached(pipeline, sorted(shapes)) as attached:
        lesson = Lesson(pipeline, attached, lora, PROMPTS, QUICK)
        assert lesson.effect(lesson.teacher) == 1.0
        assert lesson.effect({}) == 0.0
        doubled = {path: [Update(one.alpha, (), 2 * one.beta)] for path, (one,) in lesson.teacher.items()}
        assert lesson.effect(doubled) < 0.9
        assert all(layer.updates == () for layer in attached.layers.values())


def test_what_lies_in_the_bases_is_there_without_learning(pipeline, shapes, subspace) -> None:
    lora = random_lora(shapes, 1)
    with Attached(pipeline, sorted(shapes)) as attached:
        lesson = Lesson(pipeline, attached, lora, PROMPTS, QUICK)
        learner = start(attached, dict(subspace.layers), lora, QUICK)
        assert lesson.effect(learner.updates()) == pytest.approx(1, abs=1e-4)
        assert learner.lora().norm == pytest.approx(lora.norm, rel=1e-4)


def test_learning_goes_beyond_projecting(pipeline, shapes, subspace) -> None:
    heard = []
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    student = distil(pipeline, subspace, random_lora(shapes, 9), PROMPTS, QUICK, lambda *step: heard.append(step))
    assert student.functional > student.projected + 0.05
    assert student.weights < 0.7
    assert student.columns == 0
    assert [step for step, _, _ in heard] == list(range(1, 13))
    after = pipeline.unet.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    # It lies in the bases, so merging it adds no column and keeps all of it.
    merged = subspace.merge({"new": student.lora}, capacity=Capacity(retain=0.999))
    assert {path: basis.rank for path, basis in merged.layers.items()} == {p: b.rank for p, b in subspace.layers.items()}
    assert merged["new"].retention > 0.999


def test_directions_are_added_only_where_the_bases_fall_short(pipeline, shapes, subspace) -> None:
    settings = Distillation(steps=2, batch=2, latents=2, drawing_steps=1, directions=2, effect=0.99)
    inside = distil(pipeline, subspace, random_lora(shapes, 1), PROMPTS, settings)
    assert inside.columns == 0
    outside = distil(pipeline, subspace, random_lora(shapes, 9), PROMPTS, settings)
    assert outside.columns == 2
    merged = subspace.merge({"new": outside.lora}, capacity=Capacity(retain=1.0))
    gained = [merged.layers[path].rank[0] - basis.rank[0] for path, basis in subspace.layers.items()]
    assert max(gained) <= 2


def test_a_student_starts_alive_where_the_projection_is_nothing(pipeline, shapes, subspace) -> None:
    path = next(iter(shapes))
    out, into = shapes[path]
    zero = LoRA({path: Factors(torch.zeros(out, 2), torch.zeros(2, into))})
    with Attached(pipeline, [path]) as attached:
        learner = start(attached, {path: subspace.layers[path]}, zero, QUICK)
        (entry,) = learner.coefficients().values()
        assert not entry.beta.any()
        assert (entry.alpha.abs().sum(0) > 0).all()
        fresh = make_learner(dict(attached.layers), {path: subspace.layers[path]}, Adaptation("coefficients", 4), {}, 0)
        assert fresh.trainables == learner.trainables


@pytest.mark.parametrize("family", ["flux", "flux-schnell", "sd3", "sdxl"])
def test_every_family_distils(family: str) -> None:
    pipeline = BUILDERS[family]()
    freeze(pipeline)
    some = {path: shape_of(module)[0] for path, module in list(select(pipeline).items())[::4]}
    bases = Subspace.fit({"a": random_lora(some, 0)}, base=identify(pipeline, family))
    done = distil(pipeline, bases, random_lora(some, 1), PROMPTS, replace(QUICK, steps=2, batch=2))
    assert set(done.lora.layers) <= set(some)
    assert torch.isfinite(torch.tensor([done.projected, done.functional])).all()


def test_what_cannot_be_distilled_is_refused(pipeline, shapes, subspace) -> None:
    elsewhere = LoRA({"unet.down_blocks.9.attn1.to_q": Factors(torch.ones(4, 1), torch.ones(1, 4))})
    with pytest.raises(ValueError, match="1 layers of the LoRA are not in this base"):
        distil(pipeline, subspace, elsewhere, PROMPTS, QUICK)
    with pytest.raises(ValueError, match="no basis in any layer"):
        distil(pipeline, Subspace(), random_lora(shapes, 0), PROMPTS, QUICK)
    with pytest.raises(ValueError, match=r"steps is 0.*effect is 2.*source is 'x'"):
        Distillation(steps=0, effect=2, source="x")


def test_prompts_have_the_trigger_in_half_of_them() -> None:
    assert sum("inkish" in prompt for prompt in default_prompts("inkish", "style")) == 8
    assert "a rex" in default_prompts("rex", "subject")
    assert not any("rex" in prompt for prompt in default_prompts("", "subject"))


def test_the_command_tells_both_retentions_and_writes_the_student(tmp_path: Path, shapes, subspace, capsys) -> None:
    random_lora(shapes, 9).write(tmp_path / "ink.safetensors")
    subspace.save(tmp_path / "s.safetensors")
    (tmp_path / "prompts.txt").write_text("a red house\n\na blue cat\n")
    words = ["merge", str(tmp_path / "s.safetensors"), str(tmp_path / "ink.safetensors"), "--distil", "--distil_steps", "1"]
    words += ["--distil_prompts", str(tmp_path / "prompts.txt"), "--distil_directions", "0"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "ink: projected, the bases keep 0." in said
    assert "of its effect; distilled, 0." in said or "of its effect; distilled, -" in said
    details = load(tmp_path / "s.safetensors")["ink"].details
    assert details["source"] == "ink.safetensors"
    assert -1 < details["functional_retention"] < 1
    assert main(["show", str(tmp_path / "s.safetensors")]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("concept", "ink "))]
    assert shown[0].endswith("  effect")
    assert float(shown[1].split()[-1]) == pytest.approx(details["functional_retention"], abs=1e-3)
    assert main(words) == 1
    assert "ink: already in the file" in capsys.readouterr().err
    (tmp_path / "prompts.txt").write_text("one\n")
    assert main(words) == 1
    assert "1 prompts; at least 2 are needed" in capsys.readouterr().err
