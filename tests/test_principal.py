"""Columns measured on the base: what a file holds of them, and what is made of it again."""

import math
from dataclasses import replace

import pytest
import torch
from drawn_columns import draw_principal, draw_side

from share_diffusion.basis import Coefficients
from share_diffusion.lora import Factors, LoRA
from share_diffusion.principal import LEVELS, Principal, Side, pack, patterns, rounded, unpack
from share_diffusion.storage import StorageError
from share_diffusion.subspace import Capacity, Origin, Subspace

SHAPES = {"unet.conv": (6, 5 * 9), "unet.lin": (7, 9), "unet.skip": (4, 4)}
KERNELS = {"unet.conv": (3, 3)}


def draw_columns():
    """Columns of two layers of the three."""
    return draw_principal({layer: SHAPES[layer] for layer in ("unet.conv", "unet.lin")}, KERNELS)


def subspace(principal, concepts=True):
    """A subspace with measured columns in two layers of three, and a concept inside of them."""
    origin = Origin("activations", 2, principal=principal)
    empty = Subspace(origin=origin).cover({layer: (shape, KERNELS.get(layer)) for layer, shape in SHAPES.items()})
    if not concepts:
        return empty
    generator = torch.Generator().manual_seed(9)
    layers = {}
    for layer, basis in empty.layers.items():
        entry = Coefficients(*(torch.randn(side.shape[1], 2, generator=generator) for side in (basis.alpha, basis.beta)))
        layers[layer] = Factors(basis.beta @ entry.beta, (basis.alpha @ entry.alpha).mT, KERNELS.get(layer))
    return empty.merge({"ink": LoRA(layers, {})})


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (1, 3), (5, 2)])
def test_patterns_are_orthonormal_cosines_that_begin_with_the_mean(kernel):
    waves = patterns(kernel)
    assert torch.allclose(waves.mT @ waves, torch.eye(math.prod(kernel), dtype=waves.dtype), atol=1e-12)
    assert torch.allclose(waves[:, 0], torch.full_like(waves[:, 0], math.prod(kernel) ** -0.5))
    changes = [(wave.reshape(kernel).sign().diff(dim=0).abs().sum() + wave.reshape(kernel).sign().diff(dim=1).abs().sum())
               for wave in waves.mT]  # fmt: skip
    assert changes[0] == 0
    assert all(change > 0 for change in changes[1:])


@pytest.mark.parametrize(("channels", "stored", "columns", "kernel"), [(5, 3, 8, (3, 3)), (9, 5, 5, (1, 1)), (4, 4, 4, (1, 1))])
def test_columns_are_orthonormal_and_the_first_ones_span_the_strongest_pairs(channels, stored, columns, kernel):
    side = draw_side(channels, stored, columns, kernel)
    made = side.columns()
    assert made.shape == (channels * math.prod(kernel), columns)
    assert torch.allclose(made.mT @ made, torch.eye(columns), atol=1e-5)
    waves, count = patterns(kernel), math.prod(kernel)
    for place, pair in enumerate(side.pairs.tolist()):
        wanted = torch.outer(side.directions[:, pair // count].double(), waves[:, pair % count]).flatten()
        inside = made[:, : place + 1].double()
        assert torch.allclose(inside @ (inside.mT @ wanted), wanted, atol=1e-4)


def test_a_column_sees_a_convolution_as_unfolding_orders_it():
    """The inputs of a convolution's matrix are channel by channel, place by place."""
    side = Side(torch.tensor([[0], [7]], dtype=torch.int8), torch.tensor([0], dtype=torch.int16), (3, 3))
    picture = torch.arange(2 * 9.0).reshape(1, 2, 3, 3)
    seen = torch.nn.functional.unfold(picture, (3, 3))[0, :, 0] @ side.columns()
    assert torch.allclose(seen, picture[0, 1].sum() / 3)


def test_rounding_to_four_bits_turns_a_direction_by_little_and_whole_numbers_not_at_all():
    directions = torch.linalg.qr(torch.randn(64, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    numbers = rounded(directions)
    assert numbers.abs().max() <= LEVELS
    cosines = torch.nn.functional.cosine_similarity(directions, numbers.double(), dim=0)
    assert cosines.min() > 0.985
    whole = torch.tensor([[7.0, 1.0], [-3.0, 0.0], [2.0, -7.0]], dtype=torch.float64)
    assert torch.equal(rounded(whole / 11), whole.to(torch.int8))
    assert torch.equal(rounded(torch.zeros(3, 1, dtype=torch.float64)), torch.zeros(3, 1, dtype=torch.int8))


def test_what_is_packed_comes_back_to_the_bit():
    principal, order = draw_columns(), list(SHAPES)
    tensors = pack(principal, order)
    again = unpack(tensors, SHAPES, KERNELS)
    assert again.digest == principal.digest
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) == principal.bytes + 8  # a layer without
    for layer, pair in principal.sides.items():
        for ours, theirs in zip(pair, again.sides[layer], strict=True):
            assert torch.equal(ours.columns(), theirs.columns())


@pytest.mark.parametrize("name", ["principal.numbers", "principal.pairs", "principal.sizes"])
@pytest.mark.parametrize("how", ["short", "long"])
def test_columns_that_are_not_all_there_are_refused(name, how):
    tensors = pack(draw_columns(), list(SHAPES))
    tensors[name] = tensors[name][:-1] if how == "short" else torch.cat([tensors[name], tensors[name][-1:]] * 2)
    with pytest.raises((IndexError, ValueError, RuntimeError)):
        unpack(tensors, SHAPES, KERNELS)


def test_a_pair_beyond_the_stored_directions_is_refused():
    tensors = pack(draw_columns(), list(SHAPES))
    tensors["principal.pairs"][0] = 27
    with pytest.raises(IndexError, match=r"unet\.conv"):
        unpack(tensors, SHAPES, KERNELS)


def test_a_file_gives_back_measured_columns_and_falls_back_to_a_seed_where_nothing_was_measured(tmp_path):
    held = subspace(draw_columns()).save(tmp_path / "s")
    again = Subspace.load(tmp_path / "s")
    assert again.origin == held.origin
    assert again.basis_version == held.basis_version
    assert again.fixed == {"unet.conv": (7, 4), "unet.lin": (4, 4), "unet.skip": (2, 2)}
    for layer, basis in held.layers.items():
        assert torch.equal(basis.alpha, again.layers[layer].alpha)
        assert torch.equal(basis.beta, again.layers[layer].beta)
    seeded = Origin("random", 2).derive("unet.skip", (4, 4))
    assert torch.equal(again.layers["unet.skip"].alpha, seeded.alpha)
    assert again["ink"].retention > 0.9998  # it lies inside, and no column was added for it
    assert again.layers["unet.conv"].rank == (7, 4)


def test_later_concepts_change_neither_measured_columns_nor_what_lies_in_them(tmp_path):
    held = subspace(draw_columns()).save(tmp_path / "s")
    generator = torch.Generator().manual_seed(4)
    beyond = LoRA({"unet.lin": Factors(torch.randn(7, 2, generator=generator), torch.randn(2, 9, generator=generator))}, {})
    grown = held.merge({"wide": beyond}, capacity=Capacity(retain=1.0))
    assert grown.layers["unet.lin"].rank > held.layers["unet.lin"].rank
    capped = held.merge({"wide": beyond}, capacity=Capacity(retain=None, rank=7))
    for later in (grown, capped):
        for layer, (alpha, beta) in held.fixed.items():
            assert torch.equal(later.layers[layer].alpha[:, :alpha], held.layers[layer].alpha)
            assert torch.equal(later.layers[layer].beta[:, :beta], held.layers[layer].beta)
        for layer, factors in held.lora("ink").layers.items():
            assert torch.allclose(later.lora("ink").layers[layer].dense(), factors.dense(), atol=1e-6)
    with pytest.raises(ValueError, match="below the 7 columns that never change"):
        held.merge({"wide": beyond}, capacity=Capacity(rank=6))


def test_a_budget_counts_the_measured_columns(tmp_path):
    held = subspace(draw_columns())
    beyond = LoRA({"unet.lin": Factors(torch.randn(7, 4), torch.randn(4, 9))}, {})
    with pytest.raises(ValueError, match=f"take {held.origin.bytes:,} alone"):
        held.merge({"wide": beyond}, capacity=Capacity(budget=held.origin.bytes))
    room = 3250  # for the header and what is told of the concepts as well
    small = held.merge({"wide": beyond}, capacity=Capacity(retain=1.0, budget=held.origin.bytes + room))
    large = held.merge({"wide": beyond}, capacity=Capacity(retain=1.0))
    assert small.layers["unet.lin"].rank < large.layers["unet.lin"].rank


def test_what_was_measured_elsewhere_is_another_basis(tmp_path):
    one, other = subspace(draw_columns(), concepts=False), draw_columns()
    changed = Side(other.sides["unet.lin"][0].directions.clone(), other.sides["unet.lin"][0].pairs)
    changed.directions[1, 1] = -changed.directions[1, 1] or 3
    two = subspace(Principal({**other.sides, "unet.lin": (changed, other.sides["unet.lin"][1])}), concepts=False)
    assert one.origin != two.origin
    assert one.basis_version != two.basis_version


def test_without_the_measured_columns_nothing_is_made_up():
    origin = replace(Origin("activations", 2, principal=draw_columns()), principal=None)
    with pytest.raises(ValueError, match="lie in the file that was learned against"):
        origin.derive("unet.lin", (7, 9))
    with pytest.raises(ValueError, match="share-diffusion measure"):
        Subspace.fit({}, basis="activations", derived_rank=4)


def test_a_damaged_layout_is_one_sentence(tmp_path):
    from share_diffusion import storage

    subspace(draw_columns()).save(tmp_path / "s")
    metadata, tensors, _ = storage.read(tmp_path / "s")
    tensors["principal.sizes"] = tensors["principal.sizes"] * 0 + 9
    storage.write(tmp_path / "broken", tensors, metadata, expected_generation=None)
    with pytest.raises(StorageError, match="is not a subspace file"):
        Subspace.load(tmp_path / "broken")
