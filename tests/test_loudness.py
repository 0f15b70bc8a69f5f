"""Facts about how loud a concept is: the closed form, what a blend makes of it, and what is said where it is not known."""

from dataclasses import replace
from math import exp, log

import pytest
import torch

from share_diffusion.active import Active
from share_diffusion.attached import attach
from share_diffusion.basis import Coefficients
from share_diffusion.blend import Blend
from share_diffusion.concept import Concept
from share_diffusion.cores import CoreTable
from share_diffusion.loudness import evened, half_weight, loudest
from share_diffusion.subspace import Origin, Subspace


def concept(name: str, half: object = None, seed: int = 0) -> Concept:
    """A concept of one layer that may have been measured."""
    generator = torch.Generator().manual_seed(seed)
    sides = [torch.randn(4, 2, generator=generator) for _ in range(2)]
    return Concept(name, {"unet.a": Coefficients(*sides)}, 1.0, details={} if half is None else {"half_weight": half})


@pytest.mark.parametrize("steepness", [0.5, 2, 5, 9])
def test_the_half_weight_of_an_exponential_is_its_closed_form(steepness):
    asked = []

    def loss(weight):
        asked.append(weight)
        return exp(-steepness * weight)

    expected = -log((1 + exp(-steepness)) / 2) / steepness
    assert half_weight(loss, loss(0), loss(1)) == pytest.approx(expected, abs=0.01)
    assert len(asked) <= 6


def test_what_does_not_help_has_no_half_weight():
    assert half_weight(lambda weight: weight, 0.0, 1.0) is None
    assert half_weight(lambda weight: 0.3, 0.3, 0.3) is None
    assert half_weight(lambda weight: float("nan"), 0.3, float("nan")) is None


def test_a_loss_that_rises_first_still_has_a_weight_between_nothing_and_all():
    found = half_weight(lambda weight: 1 + weight - 2 * weight**4, 1.0, 0.0)
    assert 0 < found < 1
    assert 1 + found - 2 * found**4 == pytest.approx(0.5, abs=0.1)


def test_the_quietest_keeps_its_weight_and_equals_are_left_alone():
    assert evened([concept("loud", 0.2), concept("quiet", 0.4)], 1) == {"loud": 0.5, "quiet": 1.0}
    assert evened([concept("loud", 0.2), concept("quiet", 0.4)]) == pytest.approx({"loud": 0.5**0.5, "quiet": 1.0})
    assert evened([concept("loud", 0.2), concept("quiet", 0.4)], 0) == {"loud": 1.0, "quiet": 1.0}
    assert evened([concept("a", 0.3), concept("b", 0.3)]) == {"a": 1.0, "b": 1.0}
    assert evened([concept("a")]) == {"a": 1.0}
    assert evened([]) == {}


@pytest.mark.parametrize("half", [None, 0, -1, 1.5, True, "0.3"])
def test_what_was_not_measured_is_named_with_a_way_out(half):
    with pytest.raises(ValueError, match=r"how loud b is.*norm-equalised"):
        evened([concept("a", 0.3), concept("b", half)])


def test_a_blend_of_even_loudness_is_the_sum_at_other_weights():
    held = {name: concept(name, half, seed) for seed, (name, half) in enumerate({"a": 0.2, "b": 0.4, "c": 0.5}.items())}
    subspace = replace(Subspace(origin=Origin("random", 4)).cover({"unet.a": ((8, 8), None)}), concepts=held)
    table = CoreTable(subspace, {"unet.a": ("all", "down")})

    def row(text):
        active = Active([Blend.parse(text)], table, {})
        return active.flat(active.moment(0.5), 0, table.width)

    pairs = [
        ("a + b:-0.5 | loss-equalised strength=1", "a:0.5 + b:-0.5"),
        ("a + b + c | loss-equalised strength=1", "a:0.4 + b:0.8 + c"),
        ("a + b + c:0 | loss-equalised strength=1", "a:0.5 + b"),  # who is absent is not heard
        ("a:0.7 | loss-equalised", "a:0.7"),
        ("a + b | loss-equalised strength=0", "a + b"),
    ]
    for even, plain in pairs:
        torch.testing.assert_close(row(even), row(plain))
    assert str(Blend.parse("a + b | loss-equalised")) == "a:1 + b:1 | loss-equalised strength=0.5"


def test_a_blend_with_a_concept_that_was_not_measured_changes_nothing():
    from share_diffusion.base import load_base

    pipeline = load_base("tiny")
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    held = {name: replace(concept(name, half), coefficients={layer: Coefficients(torch.ones(4, 1), torch.ones(4, 1))})
            for name, half in {"a": 0.2, "b": None}.items()}  # fmt: skip
    side = pipeline.unet.get_submodule(layer.removeprefix("unet.")).in_features
    subspace = replace(Subspace(origin=Origin("random", 4)).cover({layer: ((side, side), None)}), concepts=held)
    with attach(pipeline, subspace) as handle:
        handle.set_blend("a")
        before = str(handle.active.blends[0])
        with pytest.raises(ValueError, match="how loud b is"):
            handle.set_blend("a + b | loss-equalised")
        assert str(handle.active.blends[0]) == before


def test_who_drowns_whom_is_told_where_it_matters():
    assert loudest([concept("a", 0.2), concept("b", 0.5), concept("c")]) == ("a", "b", pytest.approx(2.5))
    assert loudest([concept("a", 0.3), concept("b", 0.4)]) is None
    assert loudest([concept("a", 0.3), concept("b")]) is None
