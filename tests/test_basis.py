"""Facts about the algebra of a shared subspace, each against dense linear algebra on matrices small enough for it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from share_diffusion import basis
from share_diffusion.basis import Basis, Coefficients

EXACT = 1e-12


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(side: int, rank: int, seed: int = 0) -> Tensor:
    """A random orthonormal (side, rank)."""
    return torch.linalg.qr(normal(side, rank, seed=seed))[0]


def gauge(matrix: Tensor) -> Tensor:
    """How far columns are from orthonormal."""
    return (matrix.mT @ matrix - torch.eye(matrix.shape[-1], dtype=matrix.dtype)).abs().max()


def small_basis(out: int = 9, width: int = 7, rank: tuple[int, int] = (3, 4)) -> Basis:
    return Basis(alpha=orthonormal(width, rank[0], 1), beta=orthonormal(out, rank[1], 2))


# One update


sizes = st.integers(1, 9)


@settings(deadline=None, max_examples=40)
@given(sizes, sizes, st.integers(1, 12), st.integers(0, 99))
def test_thin_svd_is_the_svd_of_the_dense_update(out: int, width: int, rank: int, seed: int) -> None:
    up, down = normal(out, rank, seed=seed), normal(rank, width, seed=seed + 100)
    left, values, right = basis.thin_svd(up, down)
    torch.testing.assert_close(left * values @ right.mT, up @ down, atol=1e-10, rtol=0)
    torch.testing.assert_close(values, torch.linalg.svdvals(up @ down)[: len(values)], atol=1e-10, rtol=0)
    assert max(gauge(left), gauge(right)) < EXACT


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1.0, 1e12])
def test_thin_svd_of_a_deficient_update_is_exact_at_every_scale(scale: float) -> None:
    up, down = scale * normal(8, 2) @ normal(2, 5, seed=1), normal(5, 6, seed=2)
    left, values, right = basis.thin_svd(up, down)
    torch.testing.assert_close(left * values @ right.mT, up @ down, atol=scale * 1e-12, rtol=0)
    assert (values[2:] <= scale * 1e-12).all()
    assert max(gauge(left), gauge(right)) < EXACT


def test_a_batch_of_layers_equals_the_layers_one_by_one() -> None:
    ups, downs = normal(5, 8, 3), normal(5, 3, 6, seed=1)
    left, values, right = basis.thin_svd(ups, downs)
    for index in range(5):
        alone = basis.thin_svd(ups[index], downs[index])
        torch.testing.assert_close(values[index], alone[1])
        torch.testing.assert_close(left[index] * values[index] @ right[index].mT, ups[index] @ downs[index])
    torch.testing.assert_close(basis.energy(ups, downs), values.square().sum(-1))


@settings(deadline=None, max_examples=30)
@given(sizes, sizes, st.integers(1, 12), st.integers(0, 99))
def test_energy_is_the_squared_norm_of_the_dense_update(out: int, width: int, rank: int, seed: int) -> None:
    up, down = normal(out, rank, seed=seed), normal(rank, width, seed=seed + 100)
    assert basis.energy(up, down) == pytest.approx(float((up @ down).square().sum()), rel=1e-10)


# What a basis spans


def test_outside_splits_vectors_into_orthogonal_parts() -> None:
    frame, vectors = orthonormal(9, 4), normal(9, 3, seed=1)
    rest = basis.outside(frame, vectors)
    assert (frame.mT @ rest).abs().max() < EXACT
    torch.testing.assert_close(rest, vectors - frame @ frame.mT @ vectors)
    assert basis.outside(frame, frame @ normal(4, 3)).abs().max() < EXACT


def test_outside_is_accurate_for_a_basis_in_single_precision() -> None:
    frame, vectors = orthonormal(40, 8).float().double(), normal(8, 3, seed=1)
    assert basis.outside(frame, frame @ vectors).abs().max() < EXACT


def test_principal_directions_are_the_eigenvectors_of_the_dense_second_moment() -> None:
    vectors = normal(7, 12)
    directions, energies = basis.principal_directions(vectors, vectors.norm())
    values, eigenvectors = torch.linalg.eigh(vectors @ vectors.T)
    torch.testing.assert_close(energies, values.flip(0))
    torch.testing.assert_close((directions.T @ eigenvectors.flip(-1)).abs(), torch.eye(7, dtype=torch.float64))


def test_rounding_is_not_a_direction() -> None:
    vectors = torch.cat([normal(9, 2), 1e-9 * normal(9, 3, seed=1)], dim=1)
    assert (basis.principal_directions(vectors, vectors.norm())[1] > 0).sum() == 2
    tiny = 1e-12 * normal(9, 3)
    assert (basis.principal_directions(tiny, tiny.norm())[1] > 0).sum() == 3
    assert (basis.principal_directions(torch.zeros(9, 3, dtype=torch.float64), torch.tensor(0.0))[1] == 0).all()


# One update in a basis


def test_the_core_is_the_orthogonal_projection_of_the_dense_update() -> None:
    shared, up, down = small_basis(), normal(9, 5), normal(5, 7, seed=3)
    core = basis.project(shared, up, down)
    held = shared.beta @ core @ shared.alpha.T
    torch.testing.assert_close(core, shared.beta.T @ (up @ down) @ shared.alpha)
    assert ((up @ down - held) * held).sum().abs() < 1e-10  # the loss is orthogonal to what is held
    assert (up @ down - held).square().sum() == pytest.approx(
        float((up @ down).square().sum() - core.square().sum()), rel=1e-12
    )


def test_coefficients_of_a_core_lose_exactly_the_singular_values_left_out() -> None:
    core = normal(5, 4)
    values = torch.linalg.svdvals(core)
    for rank in range(5):
        entry = basis.factor_core(core, rank)
        assert (entry.alpha.shape, entry.beta.shape) == ((4, rank), (5, rank))
        lost = float((core - entry.core()).square().sum())
        assert lost == pytest.approx(float(values[rank:].square().sum()), abs=1e-12)


def test_coefficients_carry_the_singular_values_evenly_on_both_sides() -> None:
    entry = basis.factor_core(normal(5, 4), 3)
    torch.testing.assert_close(entry.alpha.T @ entry.alpha, entry.beta.T @ entry.beta)
    torch.testing.assert_close(
        (entry.alpha.T @ entry.alpha).diagonal(), torch.linalg.svdvals(normal(5, 4))[:3], atol=1e-12, rtol=0
    )


def test_reconstruction_is_basis_core_basis() -> None:
    shared, entry = small_basis(), Coefficients(alpha=normal(3, 2), beta=normal(4, 2, seed=1))
    up, down = basis.reconstruct(shared, entry)
    assert (up.shape, down.shape) == ((9, 2), (2, 7))
    torch.testing.assert_close(up @ down, shared.beta @ entry.core() @ shared.alpha.T)


def test_rows_missing_at_the_end_are_zero() -> None:
    shared, short = small_basis(), Coefficients(alpha=normal(2, 2), beta=normal(1, 2, seed=1))
    core = short.core(shared.rank)
    assert core.shape == (4, 3)
    assert (core[1:] == 0).all()
    assert (core[:, 2:] == 0).all()
    up, down = basis.reconstruct(shared, short)
    torch.testing.assert_close(up @ down, shared.beta @ core @ shared.alpha.T)


def test_a_turned_basis_with_turned_coefficients_is_the_same_update() -> None:
    shared, short = small_basis(), Coefficients(alpha=normal(2, 2), beta=normal(4, 2, seed=1))
    turns = orthonormal(3, 3, 5), orthonormal(4, 4, 6)
    moved = basis.rotate(short, *turns)
    turned = Basis(shared.alpha @ turns[0], shared.beta @ turns[1])
    up, down = basis.reconstruct(shared, short)
    new_up, new_down = basis.reconstruct(turned, moved)
    torch.testing.assert_close(new_up @ new_down, up @ down)


# Bases that cost nothing


def test_a_random_basis_is_orthonormal_and_a_function_of_its_seed() -> None:
    frame = basis.random_basis(20, 6, seed=3)
    assert gauge(frame) < EXACT
    before = torch.random.get_rng_state()
    assert torch.equal(frame, basis.random_basis(20, 6, seed=3))
    assert torch.equal(before, torch.random.get_rng_state())
    assert (frame - basis.random_basis(20, 6, seed=4)).abs().max() > 0.1


def test_a_random_basis_is_gram_schmidt_of_the_generators_numbers() -> None:
    """So that its signs do not depend on whose QR it was."""
    for seed in range(5):
        frame: list[Tensor] = []
        for column in normal(8, 3, seed=seed).T:
            rest = column - sum((other * (other @ column) for other in frame), torch.zeros_like(column))
            frame.append(rest / rest.norm())
        torch.testing.assert_close(basis.random_basis(8, 3, seed), torch.stack(frame, 1))


def test_the_random_basis_of_a_seed_never_changes() -> None:
    """Every file of origin `random` depends on these numbers."""
    expected = [[-0.0743015, 0.5155433], [0.4792415, -0.2752968], [0.8558072, 0.3526333], [-0.1800025, 0.7308054]]
    drawn = basis.random_basis(4, 2, seed=7)
    torch.testing.assert_close(drawn, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


def weight_of(spectrum: Tensor, out: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight with this spectrum, and its left and right singular vectors."""
    left, right = orthonormal(out, len(spectrum), 1), orthonormal(width, len(spectrum), 2)
    return left * spectrum @ right.T, left, right


@pytest.mark.parametrize(("out", "width"), [(30, 20), (20, 30)])
def test_the_basis_of_a_weight_is_its_top_singular_vectors(out: int, width: int) -> None:
    weight, left, right = weight_of(0.8 ** torch.arange(20.0, dtype=torch.float64), out, width)
    found = basis.weight_basis(weight, 4)
    assert max(gauge(found.alpha), gauge(found.beta)) < EXACT
    # The weight is rounded to half precision, which moves the vectors by about as much.
    assert ((found.alpha.T @ right[:, :4]).abs() - torch.eye(4)).abs().max() < 3e-3
    assert ((found.beta.T @ left[:, :4]).abs() - torch.eye(4)).abs().max() < 3e-3
    core = found.beta.T @ weight @ found.alpha
    assert (core.diagonal() > 0).all()  # the two sides' signs belong together
    assert (found.alpha.gather(0, found.alpha.abs().argmax(0, keepdim=True)) > 0).all()  # and are always the same


def test_a_weight_in_half_precision_has_the_same_basis_as_in_single() -> None:
    weight = 0.02 * normal(24, 16).float()
    single, half = basis.weight_basis(weight, 5), basis.weight_basis(weight.half(), 5)
    torch.testing.assert_close(single.alpha, half.alpha, atol=1e-6, rtol=0)
    torch.testing.assert_close(single.beta, half.beta, atol=1e-6, rtol=0)
    brain = basis.weight_basis(weight.bfloat16(), 5)
    assert torch.linalg.svdvals(single.alpha.T @ brain.alpha).min() > 0.99


@pytest.mark.parametrize("weight", [torch.zeros(6, 4), torch.ones(6, 4), torch.eye(6)[:, :4]])
def test_a_degenerate_weight_still_gives_an_orthonormal_basis(weight: Tensor) -> None:
    found = basis.weight_basis(weight, 9)  # more than there is: 4
    assert found.rank == (4, 4)
    assert max(gauge(found.alpha), gauge(found.beta)) < EXACT
