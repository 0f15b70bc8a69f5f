"""Facts about how many columns a merge keeps: a share of energy, a budget of bytes, a cap; against dense linear algebra."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging import ALL, ONE, ROUNDING, SHAPES, Shape, dense, draw, moments, only, refusal, same_concept, truths
from torch import Tensor

from share_diffusion import container
from share_diffusion.capacity import Candidates, Capacity, choose, parse_bytes, prices
from share_diffusion.file import pack
from share_diffusion.lora import Factors, LoRA
from share_diffusion.subspace import Origin, Subspace

SLACK = 3500  # bytes that a budget leaves for a base's name and weights and for what concepts tell; three concepts here do not


@pytest.mark.parametrize("retain", [0.5, 0.9, 0.99, 0.999, 1.0])
def test_every_new_concept_keeps_the_asked_share(retain: float) -> None:
    subspace = Subspace()
    for i in range(3):
        loras = {f"{i}/{j}".replace("/", "-"): draw(10 * i + j, rank=6, scale=7.0**j) for j in range(2)}
        subspace = subspace.merge(loras, capacity=Capacity(retain=retain))
        for name, lora in loras.items():
            assert subspace[name].retention >= retain - ROUNDING
            assert truths(subspace, name, lora)[0] >= retain - ROUNDING


def test_the_default_keeps_999_thousandths() -> None:
    assert Capacity() == Capacity(retain=0.999, rank=None, budget=None)
    spectrum = 0.5 ** torch.arange(10.0)
    subspace = Subspace.fit({"a": only(spectrum.diag())})
    share = spectrum.square().cumsum(0) / spectrum.square().sum()
    assert subspace.layers["unet.a"].rank == (int((share < 0.999).sum()) + 1,) * 2


@pytest.mark.parametrize("retain", [0.3, 0.6, 0.8, 0.95])
def test_the_asked_share_is_reached_with_the_fewest_numbers(retain: float) -> None:
    """Against every choice of ranks for two square layers of one concept."""
    spectra = [0.6 ** torch.arange(8.0), 0.4 * 0.9 ** torch.arange(6.0)]
    lora = LoRA({f"unet.{i}": only(spectrum.diag()).layers["unet.a"] for i, spectrum in enumerate(spectra)})
    energies = [torch.cat([torch.zeros(1), spectrum.square().cumsum(0)]) for spectrum in spectra]
    total = sum(float(energy[-1]) for energy in energies)
    enough = [2 * (8 * i + 6 * j) for i in range(9) for j in range(7) if energies[0][i] + energies[1][j] >= retain * total]
    subspace = Subspace.fit({"a": lora}, capacity=Capacity(retain=retain))
    used = sum(basis.alpha.numel() + basis.beta.numel() for basis in subspace.layers.values())
    assert min(enough) <= used <= min(enough) + 2 * 6  # one column a side above the best: prices are level by level


@pytest.mark.parametrize("seed", range(3))
def test_without_the_column_worth_least_the_asked_share_is_missed(seed: int) -> None:
    loras = {f"c{i}": draw(seed * 10 + i, rank=4) for i in range(2)}
    subspace = Subspace.fit(loras, capacity=Capacity(retain=0.9))
    worth = {}  # the spectra behind every kept column: (layer, side) -> worth of the last column kept
    frames = {}
    for layer, basis in subspace.layers.items():
        for side, (moment, frame) in enumerate(zip(moments(loras.values(), layer), (basis.alpha, basis.beta), strict=True)):
            frames[layer, side] = frame.double()
            if frame.shape[1]:
                worth[layer, side] = float(torch.linalg.eigvalsh(moment).flip(0)[frame.shape[1] - 1]) / len(frame)
    last = min(worth, key=lambda key: worth[key])
    frames[last] = frames[last][:, :-1]
    kept = [
        sum(float((frames[layer, 1].T @ dense(lora, layer) @ frames[layer, 0]).square().sum()) for layer in subspace.layers)
        / lora.norm**2
        for lora in loras.values()
    ]
    assert min(kept) < 0.9 <= min(concept.retention for concept in subspace.concepts.values())


def water_level(candidates: Mapping[str, Candidates], widths: Mapping[str, tuple[int, int]]) -> tuple[float, float]:
    """The worth per cost of the worst column kept and of the best left out."""
    kept, left = [math.inf], [0.0]
    for layer, entry in candidates.items():
        for energies, cost, width in zip((entry.alpha, entry.beta), entry.costs, widths[layer], strict=True):
            kept += (energies[:width] / cost).tolist()
            left += (energies[width:] / cost).tolist()
    return min(kept), max(left)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 999), st.integers(1, 5), st.floats(0, 1))
def test_no_column_left_out_is_worth_more_than_one_kept(seed: int, layers: int, place: float) -> None:
    generator = torch.Generator().manual_seed(seed)

    def energies() -> Tensor:
        return torch.rand(5, generator=generator, dtype=torch.float64).sort(descending=True).values

    candidates = {f"l{i}": Candidates(energies(), energies(), (1 + i, 10 - i)) for i in range(layers)}
    levels = prices(candidates)
    worst, best = water_level(candidates, choose(candidates, levels[int(place * (len(levels) - 1))]))
    assert worst >= best - 1e-12


def whole_bytes(subspace: Subspace) -> int:
    """Bytes of the whole file."""
    return sum(map(len, container.pack(*pack(subspace), 1)))


@pytest.mark.parametrize("budget", [6500, 7000, 8500])
def test_a_budget_is_filled_like_water(budget: int) -> None:
    loras = {f"c{i}": draw(i, rank=4, scale=10.0**i) for i in range(3)}
    subspace = Subspace.fit(loras, capacity=Capacity(budget=budget))
    assert budget - SLACK < whole_bytes(subspace) <= budget
    candidates, widths = {}, {}
    for layer, basis in subspace.layers.items():
        spectra = [torch.linalg.eigvalsh(moment).flip(0) for moment in moments(loras.values(), layer)]
        candidates[layer] = Candidates(*spectra, (basis.alpha.shape[0], basis.beta.shape[0]))
        widths[layer] = basis.rank
    worst, best = water_level(candidates, widths)
    assert worst >= best - 1e-9


@pytest.mark.parametrize("budget", range(5000, 10000, 1000))
def test_the_file_keeps_within_the_budget_at_every_merge(budget: int) -> None:
    """Layers of one concept may differ in rank, and the counted bytes must be the written ones."""
    uneven = [
        LoRA({layer: draw(i, rank=1 + 5 * ((i + j) % 3)).layers[layer] for j, layer in enumerate(SHAPES)}) for i in range(5)
    ]
    subspace = Subspace()
    for i, lora in enumerate(uneven):
        subspace = subspace.merge({f"c{i}": lora}, capacity=Capacity(budget=budget), pseudo_rank=3 if i == 2 else None)
        assert whole_bytes(subspace) <= budget


def test_a_budget_that_cannot_be_kept_is_refused() -> None:
    """Rather than that everything held in the touched layers is erased and the budget still exceeded."""
    held = Subspace.fit({"a": draw(0), "b": draw(1)})
    assert "budget" in refusal(lambda: held.merge({"new": draw(2, ONE)}, capacity=Capacity(budget=100)))


@pytest.mark.parametrize("kind", ["adapters", "random"])
def test_a_budget_counts_the_bytes_that_the_file_has(tmp_path, kind: str) -> None:
    """Half precision, 8 bits with scales, header and details: what the merge promises is what the disk holds, nearly all."""
    shapes: dict[str, Shape] = {f"unet.{index}": (640, 320, None) for index in range(12)}
    loras = {f"c{index}": draw(index, shapes, rank=8) for index in range(3)}
    start = Subspace(origin=Origin(kind, 8, 1) if kind == "random" else Origin())
    for limit in (150_000, 220_000):
        subspace = start
        for name, lora in loras.items():
            about = {name: {"kind": "subject", "trigger": "ärger", "details": {"prompts": ["a photo of it in a meadow"] * 4}}}
            subspace = subspace.merge({name: lora}, capacity=Capacity(budget=limit), about=about)
            subspace.save(tmp_path / "s", replace=True)
            subspace = Subspace.load(tmp_path / "s")
            assert (tmp_path / "s").stat().st_size <= limit
        assert (tmp_path / "s").stat().st_size > 0.85 * limit  # axes that the other side has no use for are left out
        assert sum(concept.retention for concept in subspace.concepts.values()) > 0


def test_a_budget_that_leaves_nothing_names_the_least_that_leaves_something() -> None:
    said = refusal(lambda: Subspace.fit({"a": draw(0)}, capacity=Capacity(budget=1)))
    least = int(said.partition("takes ")[2].partition(" ")[0].replace(",", ""))
    assert Subspace.fit({"a": draw(0)}, capacity=Capacity(budget=least))["a"].retention > 0
    assert "raise it" in refusal(lambda: Subspace.fit({"a": draw(0)}, capacity=Capacity(budget=least - 1)))


@pytest.mark.parametrize("text", ["inf", "1e400", "nan", "60 parsecs"])
def test_a_budget_that_is_no_size_is_refused(text: str) -> None:
    assert "is not a size" in refusal(lambda: parse_bytes(text))


def test_a_smaller_pseudo_rank_buys_only_the_columns_that_it_uses() -> None:
    lora = draw(3, rank=6)
    subspace = Subspace.fit({"a": lora}, pseudo_rank=2)
    assert all(max(basis.rank) <= 2 for basis in subspace.layers.values())
    whole = Subspace.fit({"a": lora})
    values = {layer: torch.linalg.svdvals(dense(lora, layer).double()) for layer in SHAPES}
    kept = sum(float(value[:2].square().sum()) for value in values.values()) / lora.norm**2
    assert subspace["a"].retention == pytest.approx(kept, abs=1e-5)
    assert whole["a"].retention > 0.999


def test_room_within_the_budget_is_not_a_truncation() -> None:
    before = Subspace.fit({"a": draw(0)})
    after = before.merge({"b": draw(1)}, capacity=Capacity(budget=10**6))
    assert same_concept(before, after, "a")
    assert after["b"].retention >= 0.999


def test_a_cap_holds_on_both_sides_and_only_where_it_is_reached() -> None:
    before = Subspace.fit({"a": draw(0, rank=4)})
    after = before.merge({"b": draw(1, ONE, rank=4)}, capacity=Capacity(rank=6))
    assert after.layers["unet.a"].rank == (6, 6)
    for layer in SHAPES.keys() - {"unet.a"}:
        assert after.layers[layer] is before.layers[layer]
        assert after["a"].coefficients[layer] is before["a"].coefficients[layer]
    assert after["a"].retention < before["a"].retention


def test_a_cap_keeps_no_column_that_holds_nothing() -> None:
    held = Subspace.fit({"gone": draw(0, ONE, rank=4), "stays": draw(1, ONE, rank=2)}, capacity=ALL).drop("gone")
    after = held.merge({"new": draw(2, ONE, rank=5)}, capacity=Capacity(retain=None, rank=10))
    assert after.layers["unet.a"].rank == (7, 7)


def test_a_layer_that_loses_all_of_its_columns_is_held_by_nobody(tmp_path) -> None:
    generator = torch.Generator().manual_seed(0)

    def one(scale: float) -> LoRA:
        sides = {"unet.strong": 1.0, "unet.weak": scale}
        return LoRA(
            {
                path: Factors(torch.randn(16, 2, generator=generator) * size, torch.randn(2, 16, generator=generator))
                for path, size in sides.items()
            }
        )

    subspace = Subspace.fit({"a": one(1e-3)}, capacity=Capacity(retain=None))
    for budget in range(6_000, 2_000, -200):
        try:
            merged = subspace.merge({"b": one(1e-3)}, capacity=Capacity(budget=budget))
        except ValueError:
            break
        merged.save(tmp_path / "s", replace=True)
        held = Subspace.load(tmp_path / "s")
        for concept in held.concepts.values():
            assert all(min(held.layers[layer].rank) for layer in concept.coefficients)
        if min(min(basis.rank) for basis in held.layers.values()) == 0:
            break
    else:
        pytest.fail("no budget was tight enough")
