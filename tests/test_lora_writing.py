"""Facts about LoRA files that are written: they read back as what they were, whole or not at all."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from lora_files import (
    CONV,
    KOHYA_Q,
    Q_PROJ,
    TO_OUT,
    TO_Q,
    pair,
    random_lora,
    refusal,
    small_clip,
    small_unet,
)
from safetensors import safe_open
from safetensors.torch import load_file

from share_diffusion.lora import Factors, LoRA

unet = pytest.fixture(scope="module")(small_unet)
clip = pytest.fixture(scope="module")(small_clip)


@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_what_is_written_reads_back_to_the_last_bit_of_its_dtype(tmp_path: Path, unet, clip, dialect: str) -> None:
    lora = random_lora({"unet": unet, "text_encoder": clip}, rank=lambda index: 3)
    lora.write(tmp_path / "a.safetensors", dialect)
    back = LoRA.read(tmp_path / "a.safetensors")
    assert list(back.layers) == list(lora.layers)
    for layer, factors in lora.layers.items():
        assert torch.equal(back.layers[layer].up, factors.up.half().float())
        assert torch.equal(back.layers[layer].down, factors.down.half().float())
        assert back.layers[layer].kernel == factors.kernel


def test_a_kohya_file_holds_nothing_but_down_up_and_alpha(tmp_path: Path) -> None:
    layers = {layer: Factors(*pair(6, 5, 3)) for layer in (TO_Q, Q_PROJ)} | {CONV: Factors(*pair(8, 36, 3), (3, 3))}
    LoRA(layers).write(tmp_path / "my style.safetensors")
    tensors = load_file(tmp_path / "my style.safetensors")
    conv, text = "lora_unet_down_blocks_1_resnets_0_conv1", "lora_te_text_model_encoder_layers_3_self_attn_q_proj"
    assert set(tensors) == {
        f"{stem}.{end}" for stem in (KOHYA_Q, conv, text) for end in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    assert tensors[f"{conv}.lora_down.weight"].shape == (3, 4, 3, 3)
    assert tensors[f"{conv}.lora_up.weight"].shape == (8, 3, 1, 1)
    assert [float(tensors[f"{stem}.alpha"]) for stem in (KOHYA_Q, conv, text)] == [3, 3, 3]
    assert {tensor.dtype for tensor in tensors.values() if tensor.ndim} == {torch.float16}
    with safe_open(tmp_path / "my style.safetensors", "pt") as file:
        assert file.metadata() == {
            "ss_network_module": "networks.lora",
            "ss_network_dim": "3",
            "ss_network_alpha": "3",
            "ss_output_name": "my style",
        }


def test_layers_of_different_rank_share_one_alpha(tmp_path: Path) -> None:
    ranks = {TO_Q: 2, TO_OUT: 2, CONV: 5, Q_PROJ: 1}
    layers = {layer: Factors(*pair(6, 8, rank)) for layer, rank in ranks.items()}
    LoRA(layers).write(tmp_path / "a.safetensors")
    tensors, lora = load_file(tmp_path / "a.safetensors"), LoRA.read(tmp_path / "a.safetensors")
    assert {float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")} == {2.0}
    assert (lora.metadata["ss_network_alpha"], lora.metadata["ss_network_dim"]) == ("2", "5")
    for layer, factors in layers.items():
        torch.testing.assert_close(lora.layers[layer].dense(), factors.dense(), atol=2e-2, rtol=2e-3)


def test_alpha_is_exact_in_a_dtype_that_cannot_count_that_far(tmp_path: Path) -> None:
    LoRA({TO_Q: Factors(*pair(4, 4, 257))}).write(tmp_path / "a.safetensors", dtype=torch.bfloat16)
    assert float(load_file(tmp_path / "a.safetensors")[f"{KOHYA_Q}.alpha"]) == 257


def test_a_diffusers_file_tells_its_ranks_where_they_differ(tmp_path: Path) -> None:
    ranks = {TO_Q: 2, TO_OUT: 2, CONV: 5, Q_PROJ: 1}
    LoRA({layer: Factors(*pair(6, 8, rank)) for layer, rank in ranks.items()}).write(tmp_path / "a.safetensors", "diffusers")
    told = json.loads(LoRA.read(tmp_path / "a.safetensors").metadata["lora_adapter_metadata"])
    assert told["unet.r"] == told["unet.lora_alpha"] == 2
    assert told["unet.rank_pattern"] == told["unet.alpha_pattern"] == {CONV[5:]: 5}
    assert told["text_encoder.r"] == told["text_encoder.lora_alpha"] == 1
    assert told["text_encoder.target_modules"] == ["encoder.layers.3.self_attn.q_proj"]


def test_the_first_text_encoder_is_te_alone_and_te1_beside_a_second(tmp_path: Path) -> None:
    second = Q_PROJ.replace("text_encoder", "text_encoder_2")
    layers = {layer: Factors(*pair(4, 4, 1)) for layer in (Q_PROJ, second)}
    LoRA(layers).write(tmp_path / "a.safetensors")
    assert {key.split("_text_model")[0] for key in load_file(tmp_path / "a.safetensors")} == {"lora_te1", "lora_te2"}
    assert list(LoRA.read(tmp_path / "a.safetensors").layers) == [Q_PROJ, second]


@pytest.mark.parametrize(("words", "prefix"), [(768, "lora_te"), (1024, "lora_te"), (2048, "lora_te1")])
def test_the_first_text_encoder_of_sdxl_is_te1_even_alone(tmp_path: Path, words: int, prefix: str) -> None:
    attention = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    LoRA({Q_PROJ: Factors(*pair(4, 4, 1)), attention: Factors(*pair(4, words, 1))}).write(tmp_path / "a.safetensors")
    stems = {key.split("_text_model")[0] for key in load_file(tmp_path / "a.safetensors") if "_te" in key}
    assert stems == {prefix}
    assert list(LoRA.read(tmp_path / "a.safetensors").layers) == [Q_PROJ, attention]


def test_metadata_goes_along_except_what_described_the_old_file(tmp_path: Path) -> None:
    old = {"ss_base_model_version": "sd_v1", "ss_network_alpha": "99", "sshs_model_hash": "00", "ss_output_name": "old"}
    old |= {"lora_adapter_metadata": '{"unet.lora_alpha": 99}', "adapter_config": "{}"}
    lora = LoRA({TO_Q: Factors(*pair(6, 5, 2))}, old)
    lora.write(tmp_path / "a.safetensors", metadata={"modelspec.title": "A <title>"})
    metadata = LoRA.read(tmp_path / "a.safetensors").metadata
    assert metadata.pop("ss_network_module") == "networks.lora"
    expected = {"ss_base_model_version": "sd_v1", "modelspec.title": "A <title>", "ss_output_name": "a"}
    assert metadata == expected | {"ss_network_dim": "2", "ss_network_alpha": "2"}
    lora.write(tmp_path / "b.safetensors", "diffusers", metadata={"ss_output_name": "mine"})
    metadata = LoRA.read(tmp_path / "b.safetensors").metadata
    assert metadata == {"format": "pt", "ss_base_model_version": "sd_v1", "ss_output_name": "mine"}


def test_the_same_content_is_the_same_bytes(tmp_path: Path) -> None:
    layers = {layer: Factors(*pair(4, 4, 2, seed)) for seed, layer in enumerate([TO_OUT, Q_PROJ, TO_Q])}
    texts = {f"key {index}": "ä" * index for index in range(20)}
    LoRA(layers, texts).write(tmp_path / "a.safetensors")
    first = (tmp_path / "a.safetensors").read_bytes()
    LoRA(dict(reversed(layers.items())), dict(reversed(texts.items()))).write(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == first
    assert LoRA.read(tmp_path / "a.safetensors").metadata["key 19"] == "ä" * 19


def test_views_and_gradients_can_be_written(tmp_path: Path) -> None:
    both = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    factors = Factors(both.T[:, :2], both[:2])
    LoRA({TO_Q: factors}).write(tmp_path / "a.safetensors", dtype=torch.float32)
    torch.testing.assert_close(LoRA.read(tmp_path / "a.safetensors").layers[TO_Q].dense(), factors.dense().detach())


@pytest.mark.parametrize("moment", ["write", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch, moment: str) -> None:
    lora = LoRA({TO_Q: Factors(*pair(6, 5, 2))})
    lora.write(tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync" if moment == "write" else "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        LoRA({TO_OUT: Factors(*pair(6, 5, 2))}).write(tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert (tmp_path / "a.safetensors").read_bytes() == before


@pytest.mark.skipif(os.name != "posix", reason="symbolic links and modes as POSIX has them")
def test_a_link_stays_a_link_and_a_mode_stays(tmp_path: Path) -> None:
    lora = LoRA({TO_Q: Factors(*pair(6, 5, 2))})
    lora.write(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").chmod(0o640)
    (tmp_path / "link.safetensors").symlink_to("a.safetensors")
    LoRA({TO_OUT: Factors(*pair(6, 5, 2))}).write(tmp_path / "link.safetensors")
    assert (tmp_path / "link.safetensors").is_symlink()
    assert list(LoRA.read(tmp_path / "a.safetensors").layers) == [TO_OUT]
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640


def test_all_that_is_wrong_with_a_request_is_said_at_once(tmp_path: Path) -> None:
    lora = LoRA({TO_Q: Factors(torch.full((2, 1), math.nan), torch.zeros(1, 2))}, {"steps": 3})  # type: ignore
    given = {"ss_network_dim": "8"}
    message = refusal(lambda: lora.write(tmp_path / "no" / "a.pt", "ldm", torch.int8, given))
    for words in (
        "dialect 'ldm' is unknown; expected one of kohya, diffusers",
        "dtype torch.int8 is not written",
        "'a.pt' must end in .safetensors",
        "no is not a folder; create it first",
        "metadata 'ss_network_dim' is computed from the layers",
        f"{TO_Q}: holds NaN or infinite values",
        "metadata 'steps' is 3; expected text",
    ):
        assert words in message
    assert "there are no layers" in refusal(lambda: LoRA({}).write(tmp_path / "a.safetensors"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [1e5, 3e38, 1e-9])
def test_values_out_of_the_range_of_float16_are_refused(tmp_path: Path, value: float) -> None:
    lora = LoRA({TO_Q: Factors(torch.full((2, 1), value), torch.ones(1, 2))})
    message = refusal(lambda: lora.write(tmp_path / "a.safetensors"))
    assert f"a.safetensors: not written, 1 problem:\n  - {KOHYA_Q}.lora_up.weight (largest value {value:.2g})" in message
    assert "out of float16's range; write dtype=torch.float32" in message
    lora.write(tmp_path / "a.safetensors", dtype=torch.float32)
    torch.testing.assert_close(LoRA.read(tmp_path / "a.safetensors").layers[TO_Q].up, lora.layers[TO_Q].up)


def test_a_layer_that_kohya_cannot_name_is_refused_with_the_way_out(tmp_path: Path) -> None:
    layers = ["transformer.transformer_blocks.0.motion.to_q", "unet.down_blocks.0.motion_modules.0.proj_in"]
    lora = LoRA({layer: Factors(*pair(4, 4, 1)) for layer in layers})
    message = refusal(lambda: lora.write(tmp_path / "a.safetensors"))
    assert all(f"{layer}: has no name in kohya's dialect; write dialect='diffusers'" in message for layer in layers)
    lora.write(tmp_path / "a.safetensors", "diffusers")
    assert list(LoRA.read(tmp_path / "a.safetensors").layers) == layers
