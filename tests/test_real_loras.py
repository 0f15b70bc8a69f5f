"""Facts about real adapters: seven LoRAs of Stable Diffusion 1.x by seven people, 128 attention layers of rank 4 each.

They lie outside the repository, in ../shared/real-loras; where they are absent every test here is skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from share_diffusion.basis import energy, thin_svd
from share_diffusion.capacity import Capacity
from share_diffusion.lora import LoRA
from share_diffusion.subspace import Subspace

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "real-loras"
FILES = {
    "weapon": "catundchat_sd15_lora/weapon_lora_v2.safetensors",
    "pokemon": "huggingface_diffusers_pr8283/pokemon.safetensors",
    "skin lesion": "hyper07_skin_lesion/adapter_model.safetensors",
    "pokemon final": "jordanhilado_diffusers/pokemon_final.safetensors",
    "sketch": "jordanhilado_diffusers/sketch_sd15_ckpt500.bin",
    "expansion joint": "mvclab_chiang7777777/expansion_joint.safetensors",
    "logos": "prushto_cs236/logos_gptdesc_final15000.safetensors",
}
# rank -> (mean, worst) lost energy of the seven
OURS = {4: (0.539, 0.873), 8: (0.333, 0.522), 16: (0.110, 0.186), 24: (0.011, 0.028)}
APART = {4: (0.569, 0.875), 8: (0.359, 0.540), 16: (0.118, 0.186), 24: (0.011, 0.028)}  # each side for itself
PER_LAYER = {4: (0.608, 0.975), 8: (0.393, 0.651), 16: (0.140, 0.183), 24: (0.014, 0.041)}
PAPER = {4: (0.981, 1.000), 8: (0.874, 0.992), 16: (0.464, 0.979), 24: (0.049, 0.318)}

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not FOLDER.is_dir(), reason="the real LoRAs are not there: expected in ../shared/real-loras"),
]


@pytest.fixture(scope="module")
def loras() -> dict[str, LoRA]:
    return {name: LoRA.read(FOLDER / file) for name, file in FILES.items()}


def reference(loras: dict[str, LoRA], rank: int, vectors: Callable[[str, str], tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """(mean, worst) lost energy with the top left singular vectors of the stacked (alpha, beta) vectors as bases."""
    kept = dict.fromkeys(loras, 0.0)
    for layer in loras["weapon"].layers:
        sides = zip(*(vectors(name, layer) for name in loras), strict=True)
        alpha, beta = (torch.linalg.svd(torch.cat(side, 1), full_matrices=False)[0][:, :rank] for side in sides)
        for name, lora in loras.items():
            entry = lora.layers[layer]
            kept[name] += float(((beta.T @ entry.up.double()) @ (entry.down.double() @ alpha)).square().sum())
    lost = [1 - kept[name] / lora.norm**2 for name, lora in loras.items()]
    return sum(lost) / len(lost), max(lost)


def lost(subspace: Subspace) -> tuple[float, float]:
    """(mean, worst) lost energy that a subspace tells."""
    each = [1 - concept.retention for concept in subspace.concepts.values()]
    return sum(each) / len(each), max(each)


def test_they_are_what_the_measurements_were_made_on(loras: dict[str, LoRA]) -> None:
    assert {len(lora.layers) for lora in loras.values()} == {128}
    assert {entry.rank for lora in loras.values() for entry in lora.layers.values()} == {4}
    norms = [lora.norm for lora in loras.values()]
    assert norms == pytest.approx([4.73, 23.89, 5.89, 131.65, 13.35, 95.13, 50.48], rel=1e-3)


@pytest.mark.parametrize("rank", OURS)
def test_what_a_fit_of_fixed_rank_loses(loras: dict[str, LoRA], rank: int) -> None:
    subspace = Subspace.fit(loras, capacity=Capacity(retain=None, rank=rank))
    assert lost(subspace) == pytest.approx(OURS[rank], abs=0.002)
    assert max(lost(subspace)[place] - APART[rank][place] for place in (0, 1)) < 1e-3
    assert all(basis.rank <= (rank, rank) for basis in subspace.layers.values())


def test_the_retention_told_is_the_one_held(loras: dict[str, LoRA]) -> None:
    subspace = Subspace.fit(loras, capacity=Capacity(retain=None, rank=8))
    for name, lora in loras.items():
        held, missing = subspace.lora(name), 0.0
        for layer, entry in lora.layers.items():
            up, down = entry.up, entry.down
            if layer in held.layers:  # a layer of zeros is not
                up, down = torch.cat([up, -held.layers[layer].up], 1), torch.cat([down, held.layers[layer].down])
            missing += float(energy(up, down))
        assert 1 - missing / lora.norm**2 == pytest.approx(subspace[name].retention, abs=1e-5)


@pytest.mark.parametrize("rank", [8, 16])
def test_one_norm_a_concept_beats_one_norm_a_layer(loras: dict[str, LoRA], rank: int) -> None:
    """What is equalised is the concept: a layer that matters little to it need not be kept as well as the others."""

    def weighed(per_layer: bool) -> Callable[[str, str], tuple[Tensor, Tensor]]:
        def vectors(name: str, layer: str) -> tuple[Tensor, Tensor]:
            left, values, right = thin_svd(loras[name].layers[layer].up, loras[name].layers[layer].down)
            values = values / max(float(values.norm()) if per_layer else loras[name].norm, 1e-30)
            return right * values, left * values

        return vectors

    a_layer, a_concept = (reference(loras, rank, weighed(per_layer)) for per_layer in (True, False))
    assert a_layer == pytest.approx(PER_LAYER[rank], abs=0.01)
    assert a_concept == pytest.approx(APART[rank], abs=0.002)
    assert a_concept[0] < a_layer[0] - 0.02


@pytest.mark.parametrize("rank", [8, 16])
def test_stacking_raw_factors_erases_the_quiet(loras: dict[str, LoRA], rank: int) -> None:
    """The paper's own fit, which depends on how each trainer scaled its factors."""
    found = reference(
        loras,
        rank,
        lambda name, layer: (loras[name].layers[layer].down.T.double(), loras[name].layers[layer].up.double()),
    )
    assert found == pytest.approx(PAPER[rank], abs=0.01)
    assert found[0] > 2 * OURS[rank][0]
    assert found[1] > 0.97 > OURS[rank][1]


def test_growth_keeps_what_is_asked_and_changes_nothing(loras: dict[str, LoRA]) -> None:
    subspace, first = Subspace(), None
    for name in ("skin lesion", "weapon", "sketch"):
        subspace = subspace.merge({name: loras[name]}, capacity=Capacity(retain=0.99))
        first = first or subspace
        assert subspace[name].retention >= 0.99 - 1e-6
    assert first is not None
    for layer, entry in first["skin lesion"].coefficients.items():
        assert torch.equal(entry.alpha, subspace["skin lesion"].coefficients[layer].alpha)
        assert torch.equal(first.layers[layer].beta, subspace.layers[layer].beta[:, : first.layers[layer].rank[1]])


def test_a_file_of_them_reads_back(tmp_path: Path, loras: dict[str, LoRA]) -> None:
    """The skin lesions leave a quarter of their layers at zero."""
    subspace = Subspace.fit({"skin lesion": loras["skin lesion"]})
    assert sum(basis.rank == (0, 0) for basis in subspace.layers.values()) >= 32
    subspace.save(tmp_path / "s.safetensors")
    again = Subspace.load(tmp_path / "s.safetensors")
    assert again["skin lesion"].retention == pytest.approx(subspace["skin lesion"].retention, abs=1e-6)
    assert again.lora("skin lesion").norm == pytest.approx(subspace.lora("skin lesion").norm, rel=1e-3)
