"""Facts about LoRA files that are refused: every problem at once, each with its layer, and nothing waits."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from lora_files import (
    KOHYA_Q,
    TO_OUT,
    TO_Q,
    pair,
    refusal,
    saved,
)
from torch import Tensor

from share_diffusion.lora import LoRA


def test_all_that_is_wrong_with_a_file_is_said_at_once(tmp_path: Path) -> None:
    up, down = pair(6, 5, 2)
    mid = "lora_unet_mid_block_attentions_0"
    tensors = {
        "lora_unet_input_blocks_4_1_projector.lora_up.weight": up,
        "lora_te3_text_model_layers_0.alpha": torch.tensor(1.0),
        f"{KOHYA_Q}.lora_up.weight": up,
        f"{mid}_proj_in.lora_up.weight": up,
        f"{mid}_proj_in.lora_down.weight": pair(6, 5, 3)[1],
        f"{mid}_proj_out.lora_up.weight": up * math.inf,
        f"{mid}_proj_out.lora_down.weight": down,
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": up,
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": up,
    }
    path = saved(tmp_path, {key: tensor.clone() for key, tensor in tensors.items()})
    message = refusal(lambda: LoRA.read(path))
    assert message.startswith(f"{path}: 7 problems:")
    for words in (
        "lora_unet_input_blocks_4_1_projector.lora_up.weight [6, 2]: not a key of this dialect, or of an unknown layer",
        "lora_te3_text_model_layers_0.alpha []: not a key",
        f"{TO_Q}: has only up; the down matrix is missing",
        "unet.mid_block.attentions.0.proj_in: up (6, 2) and down (3, 5) do not multiply",
        "unet.mid_block.attentions.0.proj_out: holds NaN or infinite values",
        "a second up for text_encoder.text_model.encoder.layers.0.mlp.fc1; keep one of the two",
    ):
        assert words in message


def test_a_long_list_of_problems_is_cut_and_counted(tmp_path: Path) -> None:
    tensors = {f"lora_unet_unknown_{index:03}.alpha": torch.tensor(1.0) for index in range(50)}
    message = refusal(lambda: LoRA.read(saved(tmp_path, tensors)))
    assert "50 problems:" in message
    assert message.endswith("\n  - and 30 more")


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"lora_A.weight": torch.ones(2, 5)}, "has only down; the up matrix is missing"),
        ({"alpha": torch.tensor(1.0)}, "has only alpha; the up and down matrix is missing"),
        ({"lora_A.weight": torch.ones(2, 5), "lora_B.weight": torch.ones(6, 2), "lora_B.bias": torch.ones(6)}, "bias"),
        (
            {"lora_A.weight": torch.ones(2, 5, dtype=torch.int8), "lora_B.weight": torch.ones(6, 2)},
            "down is torch.int8; expected float16, bfloat16 or float32",
        ),
        (
            {"lora_A.weight": torch.ones(2, 5, 1, 1), "lora_B.weight": torch.ones(6, 2)},
            "are no pair; expected (out, r) and (r, in)",
        ),
        (
            {"lora_A.weight": torch.ones(2, 5, 1, 1), "lora_B.weight": torch.ones(6, 2, 3, 3)},
            "or (out, r, 1, 1) and (r, in, kh, kw)",
        ),
        (
            {"lora_A.weight": torch.ones(2, 5), "lora_B.weight": torch.ones(6, 2), "alpha": torch.tensor(0.0)},
            "alpha is 0.0; expected one finite number, not 0",
        ),
        (
            {"lora_A.weight": torch.ones(2, 5), "lora_B.weight": torch.ones(6, 2), "alpha": torch.ones(2)},
            "alpha is of shape (2,); expected one finite number",
        ),
        (
            {"lora_A.weight": torch.ones(2, 5), "lora_B.weight": torch.ones(6, 2), "alpha": torch.tensor(1 + 2j)},
            "alpha is torch.complex64; expected one finite number",
        ),
        ({"lora_A.weight": torch.ones(2, 5) * math.nan, "lora_B.weight": torch.ones(6, 2)}, "holds NaN or infinite"),
    ],
)
def test_a_broken_layer_is_named(tmp_path: Path, parts: dict[str, Tensor], words: str) -> None:
    path = saved(tmp_path, {f"{TO_Q}.{end}": tensor for end, tensor in parts.items()})
    message = refusal(lambda: LoRA.read(path))
    assert message.startswith(f"{path}: 1 problem:\n  - {TO_Q}")
    assert words in message


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        (f"{KOHYA_Q}.dora_scale", "DoRA rescales"),
        (f"{TO_Q}.lora_magnitude_vector", "DoRA rescales"),
        (f"{KOHYA_Q}.oft_blocks", "OFT turns"),
        (f"{KOHYA_Q}.on_input", "IA3 scales"),
        (f"{KOHYA_Q}.diff", "whole-weight difference has full rank"),
        (f"{KOHYA_Q}.w_norm", "normalisation layers are no matrices"),
    ],
)
def test_what_is_no_low_rank_update_is_refused_with_its_layers(tmp_path: Path, key: str, kind: str) -> None:
    up, down = pair(6, 5, 2)
    tensors = {key: torch.ones(2), f"{TO_OUT}.lora_A.weight": down, f"{TO_OUT}.lora_B.weight": up}
    message = refusal(lambda: LoRA.read(saved(tmp_path, tensors)))
    assert kind in message
    assert f"1 tensors, {key}" in message


def test_a_file_without_any_lora_is_refused(tmp_path: Path) -> None:
    message = refusal(lambda: LoRA.read(saved(tmp_path, {"conv_in.weight": torch.ones(2)})))
    assert "no LoRA of a known dialect; its keys: conv_in.weight. Expected those of kohya, diffusers or PEFT" in message
    assert "its keys: none at all" in refusal(lambda: LoRA.read(saved(tmp_path, {})))
    unknown = {"decoder.0.lora_A.weight": torch.ones(1, 2), "decoder.0.lora_B.weight": torch.ones(2, 1)}
    message = refusal(lambda: LoRA.read(saved(tmp_path, unknown)))
    assert "decoder.0.lora_A.weight [1, 2]: not a key of this dialect, or of an unknown layer" in message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.safetensors", b"", "not a safetensors file, or cut short at 0 bytes"),
        ("a.safetensors", b"PK\x03\x04" * 50, "not a safetensors file, or cut short at 200 bytes"),
        ("a.safetensors", (2**63).to_bytes(8, "little") + b"{}", "not a safetensors file, or cut short"),
        ("a.safetensors", (17 * 2**20).to_bytes(8, "little") + bytes(17 * 2**20), "the header has 17825792 bytes"),
        ("a.safetensors", (2).to_bytes(8, "little") + b"[]", "not a valid safetensors file"),
        ("a.pt", b"", "not a file of torch.save since version 1.6"),
        ("A.BIN", b"\x80\x02}q\x00.", 'torch.load(old, map_location="cpu", weights_only=True)'),
    ],
)
def test_a_wrong_file_is_refused_with_one_clear_message(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    message = refusal(lambda: LoRA.read(tmp_path / name))
    assert message.startswith(f"{tmp_path / name}: ")
    assert words in message


def test_numbers_of_an_unknown_kind_are_refused(tmp_path: Path) -> None:
    """safetensors knows kinds of numbers that its own reader for torch does not know, such as those of four bits."""
    header = b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    message = refusal(lambda: LoRA.read(tmp_path / "a.safetensors"))
    assert message.startswith(f"{tmp_path / 'a.safetensors'}: ")
    assert "F4" in message or "no LoRA of a known dialect" in message


def test_a_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, {f"{TO_Q}.lora_A.weight": torch.ones(2, 5), f"{TO_Q}.lora_B.weight": torch.ones(6, 2)})
    path.write_bytes(path.read_bytes()[:-1])
    assert "not a valid safetensors file" in refusal(lambda: LoRA.read(path))


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    assert f"{tmp_path / 'x'}: no such file" in refusal(lambda: LoRA.read(tmp_path / "x"))
    assert "the folder holds neither of adapter_model.safetensors" in refusal(lambda: LoRA.read(tmp_path))
    for name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        (tmp_path / name).touch()
    assert "the folder holds both of" in refusal(lambda: LoRA.read(tmp_path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.timeout(10)
def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    assert "not a regular file" in refusal(lambda: LoRA.read(tmp_path / "a.safetensors"))
