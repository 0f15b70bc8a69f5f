"""Facts about bases that a seed or the base's weights give back, which no byte is stored for."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from merging import ALL, DERIVED, ROUNDING, SHAPES, correlated, draw, error, refusal, stored_bytes, truths
from torch import Tensor

from share_diffusion.basis import Basis
from share_diffusion.capacity import Capacity
from share_diffusion.file import pack
from share_diffusion.lora import Factors, LoRA
from share_diffusion.subspace import Origin, Subspace


def derived(kind: str, weights: Mapping[str, Tensor] | None, loras: Mapping[str, LoRA], **settings) -> Subspace:
    return Subspace.fit(loras, basis=kind, basis_seed=5, derived_rank=4, weights=weights, **settings)


@pytest.mark.parametrize(("kind", "weights"), DERIVED)
def test_derived_columns_cost_no_bytes(kind: str, weights: Mapping[str, Tensor] | None) -> None:
    subspace = derived(kind, weights, {"a": draw(0)}, capacity=ALL)
    tensors = pack(subspace)[0]
    for layer, (out, width, _) in SHAPES.items():
        assert subspace.layers[layer].rank == (min(6, width), min(6, out))
        assert tensors[f"{layer}.share_alpha"].shape == (width, subspace.layers[layer].rank[0] - 4)
        assert tensors[f"{layer}.share_beta"].shape == (out, subspace.layers[layer].rank[1] - 4)


@pytest.mark.parametrize(("kind", "weights"), DERIVED)
def test_a_file_gives_derived_columns_back(tmp_path, kind: str, weights: Mapping[str, Tensor] | None) -> None:
    lora = draw(0)
    subspace = derived(kind, weights, {"a": lora})
    subspace.save(tmp_path / "s.safetensors")
    halves = {layer: weight.half() for layer, weight in (weights or {}).items()}
    for again in (
        Subspace.load(tmp_path / "s.safetensors", weights),
        Subspace.load(tmp_path / "s.safetensors", halves),
    ):
        for layer, basis in again.layers.items():
            torch.testing.assert_close(basis.alpha, subspace.layers[layer].alpha, atol=5e-4, rtol=0)
            torch.testing.assert_close(basis.beta[:, :4], subspace.layers[layer].beta[:, :4], atol=1e-6, rtol=0)
        assert truths(again, "a", lora)[0] > 0.999 - 1e-5
        assert again.basis_version == subspace.basis_version


def test_the_seed_decides_the_random_basis() -> None:
    first, again = (derived("random", None, {"a": draw(i)}) for i in range(2))
    other = Subspace.fit({"a": draw(0)}, basis="random", basis_seed=6, derived_rank=4)
    for layer, basis in first.layers.items():
        assert torch.equal(basis.alpha[:, :4], again.layers[layer].alpha[:, :4])
        assert (basis.alpha[:, :4] - other.layers[layer].alpha[:, :4]).abs().max() > 0.01
    assert not torch.equal(first.layers["unet.z"].alpha[:, :4], first.layers["unet.z"].beta[:, :4])


@pytest.mark.parametrize(("kind", "weights"), DERIVED)
@pytest.mark.parametrize("capacity", [ALL, Capacity(retain=0.9), Capacity(rank=6), Capacity(budget=5500)])
def test_learned_columns_extend_the_derived_ones(kind: str, weights, capacity: Capacity) -> None:
    """Through growth and truncation alike: derived columns are never turned, learned ones orthogonal to them."""
    loras = correlated(4, 4, 1.0)
    first = {layer: Origin(kind, 4, 5 if kind == "random" else 0).derive(layer, SHAPES[layer][:2], weights) for layer in SHAPES}
    subspace = derived(kind, weights, {"c0": loras["c0"]}, capacity=capacity)
    for name in list(loras)[1:]:
        subspace = subspace.merge({name: loras[name]}, capacity=capacity, weights=weights)
        for layer, basis in subspace.layers.items():
            for side, start in ((basis.alpha, first[layer].alpha), (basis.beta, first[layer].beta)):
                assert torch.equal(side[:, :4], start)
                assert (side.T @ side - torch.eye(side.shape[1])).abs().max() < 1e-5
        for held in subspace.concepts:
            assert subspace[held].retention <= min(truths(subspace, held, loras[held])) + ROUNDING
    if capacity == ALL:
        assert all(error(subspace, name, lora) < 3e-6 for name, lora in loras.items())


def test_an_update_inside_the_derived_columns_needs_no_learned_one() -> None:
    """And coefficients use derived and learned columns together."""
    start = Origin("random", 4, 5).derive("unet.a", (20, 12))
    inside = LoRA({"unet.a": Factors(start.beta @ torch.randn(4, 2), torch.randn(2, 4) @ start.alpha.T)})
    subspace = Subspace.fit({"a": inside}, basis="random", basis_seed=5, derived_rank=4, capacity=ALL)
    assert subspace.layers["unet.a"].rank == (4, 4)
    assert error(subspace, "a", inside) < 3e-6
    assert stored_bytes(subspace) == 2 * (4 + 4) + 2 * 2 * 2  # 8 bits a coefficient, 16 a column's scale


def test_a_derived_basis_wider_than_a_layer_is_all_of_it() -> None:
    lora = draw(0, {"unet.a": (3, 50, None)})
    subspace = Subspace.fit({"a": lora}, basis="random", derived_rank=8, capacity=ALL)
    assert subspace.layers["unet.a"].rank == (5, 3)  # 3 derived a side, 2 learned
    assert error(subspace, "a", lora) < 3e-6


def test_a_cap_below_the_derived_columns_is_refused() -> None:
    """It would leave no learned column at all."""
    assert "4 columns that never change" in refusal(lambda: derived("random", None, {"a": draw(0)}, capacity=Capacity(rank=3)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"basis": "svd"}, "basis is 'svd'; it is one of adapters, random, weights"),
        ({"basis": "random"}, "a basis of origin random cannot have 0 derived columns"),
        ({"derived_rank": 3}, "a basis of origin adapters cannot have 3 derived columns"),
        ({"basis": "weights", "derived_rank": 3}, "comes from the base's weights"),
    ],
)
def test_an_origin_that_cannot_be_is_refused(arguments: dict, words: str) -> None:
    assert words in refusal(lambda: Subspace.fit({"a": draw(0)}, **arguments))


def test_the_version_of_the_bases_survives_another_machines_rounding() -> None:
    """Derived columns are equal to rounding only, so they cannot be a part of the digest."""
    subspace = derived("random", None, {"a": draw(0)})
    layers = {
        layer: Basis(basis.alpha + torch.finfo().eps * basis.alpha.sign() * (torch.arange(basis.rank[0]) < 4), basis.beta)
        for layer, basis in subspace.layers.items()
    }
    shaken = Subspace(origin=subspace.origin, layers=layers, concepts=subspace.concepts)
    assert shaken.basis_version == subspace.basis_version
    assert subspace.merge({"b": draw(1)}).basis_version != subspace.basis_version
