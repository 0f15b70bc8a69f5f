"""Facts about coefficients in 8 bits: what rounding costs, that it happens once, and that the file tells of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from share_diffusion import file, storage
from share_diffusion.basis import Coefficients
from share_diffusion.capacity import Capacity
from share_diffusion.concept import Concept
from share_diffusion.lora import Factors, LoRA
from share_diffusion.packed import STEPS, Packed, distance, packed, settled, stored_bytes, unit_of
from share_diffusion.storage import StorageError
from share_diffusion.subspace import Origin, Subspace

SHAPES = {"unet.a": (96, 64), "unet.b": (64, 160), "text_encoder.c": (80, 80)}


def inside(seed: int, rank: int = 4, scale: float = 1.0) -> LoRA:
    """An update within the 48 columns that a seed gives, its layers of very different strengths."""
    generator, layers = torch.Generator().manual_seed(seed), {}
    for number, (layer, shape) in enumerate(sorted(SHAPES.items())):
        basis = Origin("random", 48).derive(layer, shape)
        up = scale * 10.0**-number * basis.beta @ torch.randn(48, rank, generator=generator)
        layers[layer] = Factors(up, torch.randn(rank, 48, generator=generator) @ basis.alpha.mT)
    return LoRA(layers)


def held(**loras: LoRA) -> Subspace:
    """A subspace of these concepts in columns of a seed."""
    return Subspace.fit(loras, basis="random", derived_rank=48)


def truth(subspace: Subspace, name: str, original: LoRA) -> float:
    """The share of an update's energy that a subspace really keeps, 1 - |difference|^2 / |update|^2."""
    lora, lost = subspace.lora(name), 0.0
    for layer, entry in original.layers.items():
        kept = lora.layers[layer].up.double() @ lora.layers[layer].down.double()
        lost += float((entry.up.double() @ entry.down.double() - kept).square().sum())
    return 1 - lost / original.norm**2


def same_bits(one: Concept, other: Concept) -> bool:
    """Whether two concepts' coefficients are equal to the last bit."""
    pairs = [(one.coefficients[layer], other.coefficients[layer]) for layer in other.coefficients]
    equal = all(torch.equal(a.alpha, b.alpha) and torch.equal(a.beta, b.beta) for a, b in pairs)
    return equal and set(one.coefficients) == set(other.coefficients)


def test_eight_bits_cost_less_than_a_ten_thousandth_of_the_energy(tmp_path: Path) -> None:
    subspace = held(a=inside(0)).save(tmp_path / "s")
    assert 1e-6 < 1 - truth(subspace, "a", inside(0)) < 1e-4
    assert subspace["a"].numbers == 3 * 2 * 48 * 4
    assert stored_bytes(subspace["a"], True) == 3 * 2 * 48 * 4 + 2 * 3 * 2 * 4


def test_what_was_saved_is_what_is_read_to_the_bit(tmp_path: Path) -> None:
    saved = held(a=inside(0), b=inside(1)).save(tmp_path / "s")
    read = Subspace.load(tmp_path / "s")
    assert same_bits(saved["a"], read["a"])
    assert same_bits(saved["b"], read["b"])


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_rounding_happens_once(tmp_path: Path, scale: float) -> None:
    """Rounding what was rounded gives the same bytes, whatever the scale, and no reading or writing lowers a retention."""
    once = held(a=inside(0, scale=scale)).save(tmp_path / "s")
    stored = once["a"].coefficients
    assert isinstance(stored, Packed)
    again = packed(dict(stored.items()), once["a"].norm, True, "a")
    assert again.scales is not None
    assert stored.scales is not None
    assert torch.equal(again.row, stored.row)
    assert torch.equal(again.scales, stored.scales)
    for _ in range(3):
        once = Subspace.load(tmp_path / "s").save(tmp_path / "s")
    assert once["a"].retention == Subspace.load(tmp_path / "s")["a"].retention == pytest.approx(1 - 7e-5, abs=3e-5)


def test_a_columns_largest_number_takes_all_steps_and_a_column_of_nothing_stays_nothing() -> None:
    alpha = torch.randn(48, 3)
    alpha[:, 1] = 0
    entry = Coefficients(alpha, 1e-3 * torch.randn(48, 3))
    stored = packed({"unet.a": entry}, 2.0, True, "a")
    whole = stored.row.int().reshape(2, 48, 3).abs().amax(1)
    assert whole.tolist() == [[STEPS, 0, STEPS], [STEPS] * 3]
    assert stored.row.dtype == torch.int8
    assert stored["unet.a"].alpha[:, 1].abs().max() == 0
    torch.testing.assert_close(stored["unet.a"].alpha, alpha, atol=float(alpha.abs().max()) / STEPS / 1.9, rtol=0)


def test_the_stored_retention_never_overstates(tmp_path: Path) -> None:
    """Neither after rounding alone, nor where learned columns are cut away and coefficients are rounded again."""
    generator = torch.Generator().manual_seed(9)
    outside = [
        LoRA({layer: Factors(torch.randn(out, 6, generator=generator), torch.randn(6, width, generator=generator))
              for layer, (out, width) in SHAPES.items()}) for _ in range(5)
    ]  # fmt: skip
    originals = {"a": inside(0)} | {f"b{i}": lora for i, lora in enumerate(outside)}
    subspace = held(a=originals["a"]).save(tmp_path / "s")
    for name in list(originals)[1:]:
        merged = subspace.merge({name: originals[name]}, capacity=Capacity(rank=56))
        subspace = merged.save(tmp_path / "s")
        for known in subspace.concepts:
            assert subspace[known].retention <= truth(subspace, known, originals[known]) + 1e-6
    assert subspace["a"].retention > 0.999


def test_a_half_precision_concept_stays_what_it_was_beside_new_ones(tmp_path: Path) -> None:
    """A file from before 8 bits goes on: its concepts keep their bytes, new ones take the smaller form."""
    first = held(a=inside(0))
    older = replace(first, concepts={"a": settled(first["a"], eight_bits=False)}).save(tmp_path / "s")
    both = Subspace.load(tmp_path / "s").merge({"b": inside(1)}).save(tmp_path / "s")
    tensors = storage.read(tmp_path / "s")[1]
    assert tensors["concept.00000"].dtype == torch.float16
    assert "scales.00000" not in tensors
    assert tensors["concept.00001"].dtype == torch.int8
    assert tensors["scales.00001"].dtype == torch.bfloat16
    assert same_bits(older["a"], both["a"])
    assert both["a"].retention == pytest.approx(older["a"].retention, abs=1e-6)
    assert stored_bytes(both["a"], True) == 2 * both["a"].numbers


def test_learned_columns_keep_half_precision(tmp_path: Path) -> None:
    Subspace.fit({"a": inside(0)}).save(tmp_path / "s")
    assert storage.read(tmp_path / "s")[1]["concept.00000"].dtype == torch.float16


def test_numbers_and_scales_that_disagree_with_the_layout_are_refused(tmp_path: Path) -> None:
    tensors, metadata = file.pack(held(a=inside(0)))
    wrong = {
        "no scales": {"scales.00000": None},
        "scales that are too few": {"scales.00000": tensors["scales.00000"][1:]},
        "numbers that are too few": {"concept.00000": tensors["concept.00000"][1:]},
        "half precision with scales": {"concept.00000": tensors["concept.00000"].half()},
    }
    for name, change in wrong.items():
        content = {key: tensor for key, tensor in {**tensors, **change}.items() if tensor is not None}
        storage.write(tmp_path / name, content, metadata, expected_generation=None)
        with pytest.raises(StorageError, match="not a subspace file"):
            Subspace.load(tmp_path / name)


def test_the_distance_of_two_concepts_is_that_of_their_updates() -> None:
    subspace = held(a=inside(0), b=inside(1))
    dense = 0.0
    for layer in SHAPES:
        one, other = (subspace.lora(name).layers[layer] for name in ("a", "b"))
        dense += float((one.up.double() @ one.down.double() - other.up.double() @ other.down.double()).square().sum())
    assert distance(subspace["a"].coefficients, subspace["b"].coefficients) == pytest.approx(dense**0.5, rel=1e-5)
    assert unit_of(4.0) == 2.0
    assert unit_of(0.0) == 1.0
