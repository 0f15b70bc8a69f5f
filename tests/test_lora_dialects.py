"""Facts about LoRA files from elsewhere: each dialect against the program that owns it, or against a dense dW.

The references are diffusers' own converters (for the block names of SDXL and FLUX), peft's LoHa and LoKr, the modules of
real models, dense products, and files found in the wild.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from share_diffusion.lora import Factors, LoRA
from share_diffusion.lora.cloneofsimo import order
from share_diffusion.lora.dialects import WRITERS, parse
from share_diffusion.lora.native import unet_path
from share_diffusion.subspace import Subspace

REAL = Path(__file__).resolve().parents[2] / "shared" / "real-loras"


def noise(*shape: int, seed: int = 0) -> Tensor:
    """A random tensor."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def read(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None, most: int = 128) -> dict[str, Factors]:
    """The layers of a file with these tensors."""
    return parse(tensors, metadata or {}, most)[0]


def plain(stem: str, out: int, into: int, rank: int = 2, ends: tuple[str, str] = ("lora_down", "lora_up")) -> dict[str, Tensor]:
    """A LoRA of one module."""
    seed = len(stem)
    return {
        f"{stem}.{ends[0]}.weight": noise(rank, into, seed=seed),
        f"{stem}.{ends[1]}.weight": noise(out, rank, seed=seed + 1),
    }


def close(ours: dict[str, Factors], theirs: dict[str, Factors]) -> None:
    """Two files say the same."""
    assert set(ours) == set(theirs)
    for layer, factors in ours.items():
        torch.testing.assert_close(factors.dense(), theirs[layer].dense(), atol=1e-5, rtol=1e-5)


# Block names of the original programs


def sgm_modules() -> list[str]:
    """Every linear and convolution of a small UNet of SDXL's shape, by sgm's names, made from diffusers' own table."""
    names = []
    for block in (*range(1, 9),):
        if block in (3, 6):
            names.append(f"input_blocks_{block}_0_op")
            continue
        names += [f"input_blocks_{block}_0_{part}" for part in ("in_layers_2", "out_layers_3", "emb_layers_1")]
        if block >= 4:
            names += [f"input_blocks_{block}_1_{part}" for part in ("proj_in", "transformer_blocks_0_attn1_to_q")]
    names += [f"middle_block_{index}_in_layers_2" for index in (0, 2)] + ["middle_block_1_transformer_blocks_3_attn2_to_out_0"]
    for block in range(9):
        names.append(f"output_blocks_{block}_0_skip_connection")
        names += [f"output_blocks_{block}_1_transformer_blocks_1_ff_net_0_proj"] if block < 6 else []
        names += [f"output_blocks_{block}_2_conv"] if block in (2, 5) else []
    return names


def test_sgm_blocks_are_where_diffusers_says() -> None:
    from types import SimpleNamespace

    from diffusers import StableDiffusionXLPipeline

    tensors = {}
    for name in sgm_modules():
        tensors |= plain(f"lora_unet_{name}", 4, 4) | {f"lora_unet_{name}.alpha": torch.tensor(2.0)}
    config = SimpleNamespace(layers_per_block=2)
    theirs, _ = StableDiffusionXLPipeline.lora_state_dict(dict(tensors), unet_config=config)
    close(read(tensors), read(theirs))
    assert len(read(tensors)) == len(sgm_modules())


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("input_blocks.1.1.transformer_blocks.0.attn1.to_q", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"),
        ("output_blocks.2.1.conv", "up_blocks.0.upsamplers.0.conv"),
        ("output_blocks.11.0.in_layers.2", "up_blocks.3.resnets.2.conv1"),
        ("middle_block.2.emb_layers.1", "mid_block.resnets.1.time_emb_proj"),
    ],
)
def test_blocks_of_stable_diffusion_1_have_the_same_rule(name: str, layer: str) -> None:
    assert unet_path(name) == layer
    tensors = plain(f"model.diffusion_model.{name}", 4, 4, ends=("lora_A", "lora_B"))
    assert list(read(tensors)) == [f"unet.{layer}"]


def flux_modules(width: int = 8) -> dict[str, tuple[int, int]]:
    """Modules of FLUX by their original names with (out, in)."""
    shapes = {}
    for stream in ("img", "txt"):
        root = f"double_blocks.0.{stream}"
        shapes |= {f"{root}_attn.qkv": (3 * width, width), f"{root}_attn.proj": (width, width)}
        shapes |= {
            f"{root}_mlp.0": (4 * width, width),
            f"{root}_mlp.2": (width, 4 * width),
            f"{root}_mod.lin": (6 * width, width),
        }
    root = "single_blocks.7"
    shapes |= {
        f"{root}.linear1": (7 * width, width),
        f"{root}.linear2": (width, 5 * width),
        f"{root}.modulation.lin": (3 * width, width),
    }
    return shapes


def test_flux_of_kohya_is_what_diffusers_reads() -> None:
    from diffusers import FluxPipeline

    tensors = {}
    for name, (out, into) in flux_modules().items():
        stem = f"lora_unet_{name.replace('.', '_')}"
        tensors |= plain(stem, out, into) | {f"{stem}.alpha": torch.tensor(1.0)}
    stem = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    tensors |= plain(stem, 4, 4) | {f"{stem}.alpha": torch.tensor(1.0)}
    # diffusers splits linear1 by FLUX's true widths whatever the file has; so it is asked about the double blocks.
    asked = {key: tensor.clone() for key, tensor in tensors.items() if "single_blocks" not in key}
    ours, theirs = read(tensors), read(FluxPipeline.lora_state_dict(asked))
    close({layer: factors for layer, factors in ours.items() if ".single_" not in layer}, theirs)
    single = {layer: factors for layer, factors in ours.items() if ".single_" in layer}
    whole = torch.cat(
        [
            single[f"transformer.single_transformer_blocks.7.{name}"].dense()
            for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        ]
    )
    down, up = (tensors[f"lora_unet_single_blocks_7_linear1.lora_{side}.weight"] for side in ("down", "up"))
    torch.testing.assert_close(whole, up @ down * 0.5)
    assert single["transformer.single_transformer_blocks.7.proj_out"].shape == (8, 40)
    assert single["transformer.single_transformer_blocks.7.norm.linear"].shape == (24, 8)


def test_flux_in_its_own_spelling_and_kohyas_are_the_same() -> None:
    one = {f"lora_unet_{name.replace('.', '_')}": shape for name, shape in flux_modules().items()}
    kohya, bfl, bare = {}, {}, {}
    for (stem, (out, into)), name in zip(one.items(), flux_modules(), strict=True):
        tensors = plain(stem, out, into)
        down, up = tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"]
        kohya |= tensors
        bfl |= {f"diffusion_model.{name}.lora_A.weight": down, f"diffusion_model.{name}.lora_B.weight": up}
        bare |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    close(read(kohya), read(bfl))
    close(read(kohya), read(bare))


def test_flux_of_xlabs_is_what_diffusers_reads() -> None:
    from diffusers import FluxPipeline

    tensors, ends = {}, ("down", "up")
    for stream in (1, 2):
        tensors |= plain(f"double_blocks.0.processor.qkv_lora{stream}", 24, 8, ends=ends)
        tensors |= plain(f"double_blocks.0.processor.proj_lora{stream}", 8, 8, ends=ends)
    tensors |= plain("single_blocks.3.processor.qkv_lora", 24, 8, ends=ends)
    tensors |= plain("single_blocks.3.processor.proj_lora", 8, 40, ends=ends)
    close(read(tensors), read(FluxPipeline.lora_state_dict(dict(tensors))))
    assert len(read(tensors)) == 3 + 1 + 3 + 1 + 3 + 1


def test_a_fused_layer_that_was_joined_from_three_comes_apart_at_their_rank() -> None:
    ups, downs = [noise(4, 2, seed=n) for n in range(3)], [noise(2, 4, seed=9 + n) for n in range(3)]
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{stem}.lora_up.weight": torch.block_diag(*ups), f"{stem}.lora_down.weight": torch.cat(downs)}
    layers = read(tensors)
    for name, up, down in zip(("to_q", "to_k", "to_v"), ups, downs, strict=True):
        factors = layers[f"transformer.transformer_blocks.0.attn.{name}"]
        assert factors.rank == 2
        assert torch.equal(factors.dense(), up @ down)


def test_sd3_of_kohya_reads_as_its_layers() -> None:
    root = "lora_unet_joint_blocks_5"
    tensors = {}
    for stem, shape in {
        f"{root}_x_block_attn_qkv": (12, 4),
        f"{root}_x_block_attn2_qkv": (12, 4),
        f"{root}_context_block_attn_qkv": (12, 4),
        f"{root}_x_block_attn_proj": (4, 4),
        f"{root}_context_block_mlp_fc1": (16, 4),
        f"{root}_context_block_adaLN_modulation_1": (8, 4),
        "lora_te2_text_model_encoder_layers_0_mlp_fc1": (4, 4),
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q": (4, 4),
    }.items():
        tensors |= plain(stem, *shape)
    layers = read(tensors)
    block = "transformer.transformer_blocks.5"
    assert set(layers) == {
        *(f"{block}.attn.{name}" for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0")),
        *(f"{block}.attn2.{name}" for name in ("to_q", "to_k", "to_v")),
        f"{block}.ff_context.net.0.proj",
        f"{block}.norm1_context.linear",
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
        "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q",
    }
    stem = f"{root}_context_block_adaLN_modulation_1"
    up, down = tensors[f"{stem}.lora_up.weight"], tensors[f"{stem}.lora_down.weight"]
    # The last block has only shift and scale, which diffusers holds the other way round.
    assert torch.equal(layers[f"{block}.norm1_context.linear"].dense(), torch.cat([up[4:], up[:4]]) @ down)


def test_the_modules_of_flux_and_sd3_keep_their_names() -> None:
    """Every linear of small real transformers, as one underscored word and back."""
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    sizes = {
        "num_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 8,
    }
    flux = FluxTransformer2DModel(in_channels=4, num_single_layers=1, axes_dims_rope=(2, 2, 4), **sizes, guidance_embeds=True)
    sd3 = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, caption_projection_dim=16, dual_attention_layers=(0,), **sizes
    )
    for model in (flux, sd3):
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        assert len(names) > 20
        tensors = {}
        for name in names:
            tensors |= plain(f"lora_transformer_{name.replace('.', '_')}", 4, 4)
        assert set(read(tensors)) == {f"transformer.{name}" for name in names}


def test_the_t5_of_flux_is_its_second_text_encoder() -> None:
    tensors = plain("lora_te3_encoder_block_1_layer_1_DenseReluDense_wi_0", 4, 4)
    assert next(iter(read(tensors))).startswith("text_encoder_3.")
    both = tensors | plain("lora_unet_double_blocks_0_img_attn_proj", 4, 4)
    assert "text_encoder_2.encoder.block.1.layer.1.DenseReluDense.wi_0" in read(both)


# LoCon, LoHa, LoKr


def test_a_locon_with_a_core_is_three_convolutions() -> None:
    stem = "lora_unet_down_blocks_0_resnets_0_conv1"
    down, mid, up = noise(3, 4, 1, 1), noise(3, 3, 3, 3, seed=1), noise(6, 3, 1, 1, seed=2)
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_mid.weight": mid, f"{stem}.lora_up.weight": up}
    factors = read(tensors | {f"{stem}.alpha": torch.tensor(6.0)})["unet.down_blocks.0.resnets.0.conv1"]
    image = noise(1, 4, 8, 8, seed=3)
    thrice = nn.functional.conv2d(nn.functional.conv2d(nn.functional.conv2d(image, down), mid), up)
    torch.testing.assert_close(nn.functional.conv2d(image, factors.dense()), 2 * thrice, atol=1e-4, rtol=1e-4)
    assert (factors.rank, factors.lost) == (3, 0.0)


def small_model() -> nn.Module:
    """A linear and a convolution by the names of a UNet."""
    model = nn.Module()
    model.mid_block = nn.Module()
    model.mid_block.proj_in = nn.Linear(24, 36)
    model.mid_block.conv1 = nn.Conv2d(16, 24, 3)
    return model


@pytest.mark.parametrize("kind", ["loha", "lokr"])
@pytest.mark.parametrize("tucker", [False, True])
def test_loha_and_lokr_are_what_peft_adds(kind: str, tucker: bool) -> None:
    peft = pytest.importorskip("peft")
    options = {"r": 2, "alpha": 6, "target_modules": ["proj_in", "conv1"], "use_effective_conv2d": tucker}
    config = peft.LoHaConfig(**options) if kind == "loha" else peft.LoKrConfig(**options, decompose_both=False)
    model = peft.get_peft_model(small_model(), config)
    tensors, expected = {}, {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            path = name.removeprefix("base_model.model.")
            for index, (key, parameter) in enumerate(module.named_parameters()):
                if key.startswith(("hada", "lokr")):
                    nn.init.normal_(parameter, generator=torch.Generator().manual_seed(index))
                    tensors[f"lora_unet_{path.replace('.', '_')}.{key.removesuffix('.default')}"] = parameter.detach()
            tensors[f"lora_unet_{path.replace('.', '_')}.alpha"] = torch.tensor(6.0)
            expected[f"unet.{path}"] = module.get_delta_weight("default").detach()
    layers = read(tensors)
    assert set(layers) == set(expected)
    for layer, delta in expected.items():
        assert layers[layer].lost <= 1e-9 * layers[layer].energy
        torch.testing.assert_close(layers[layer].dense(), delta, atol=1e-4, rtol=1e-4)


def loha(stem: str, out: int, into: int) -> dict[str, Tensor]:
    """A LoHa of one module."""
    sides = {"hada_w1_a": (out, 2), "hada_w1_b": (2, into), "hada_w2_a": (out, 2), "hada_w2_b": (2, into)}
    return {f"{stem}.{name}": noise(*shape, seed=number) for number, (name, shape) in enumerate(sides.items())}


def test_a_loha_of_an_upsampler_keeps_its_kernel(tmp_path: Path) -> None:
    save_file(loha("lora_unet_output_blocks_2_2_conv", 8, 8 * 9), tmp_path / "loha.safetensors")
    lora = LoRA.read(tmp_path / "loha.safetensors")
    assert lora.layers["unet.up_blocks.0.upsamplers.0.conv"].kernel == (3, 3)
    lora.write(tmp_path / "again.safetensors")
    down = load_file(tmp_path / "again.safetensors")["lora_unet_up_blocks_0_upsamplers_0_conv.lora_down.weight"]
    assert down.shape[1:] == (8, 3, 3)


@pytest.mark.parametrize(("words", "kernel"), [(768, (1, 1)), (1024, None), (2048, None)])
@pytest.mark.parametrize("block", ["down_blocks_0_attentions_0", "input_blocks_1_1"])
def test_projections_are_convolutions_in_stable_diffusion_1_alone(
    block: str, words: int, kernel: tuple[int, int] | None
) -> None:
    projections = {**loha(f"lora_unet_{block}_proj_in", 8, 8), **loha(f"lora_unet_{block}_proj_out", 8, 8)}
    layers = read({**projections, **loha(f"lora_unet_{block}_transformer_blocks_0_attn2_to_k", 8, words)})
    path = "unet.down_blocks.0.attentions.0"
    assert [layers[f"{path}.{name}"].kernel for name in ("proj_in", "proj_out")] == [kernel, kernel]
    assert layers[f"{path}.transformer_blocks.0.attn2.to_k"].kernel is None


def test_a_loha_and_a_lora_of_stable_diffusion_1_fit_one_subspace() -> None:
    block = "lora_unet_down_blocks_0_attentions_0"
    words = f"{block}_transformer_blocks_0_attn2_to_k"
    first = read({**loha(f"{block}_proj_in", 8, 8), **loha(words, 8, 768)})
    convolution = {f"{block}_proj_in.lora_down.weight": noise(2, 8, 1, 1), f"{block}_proj_in.lora_up.weight": noise(8, 2, 1, 1)}
    second = read({**convolution, **plain(words, 8, 768)})
    assert set(Subspace.fit({"a": LoRA(first), "b": LoRA(second)}).concepts) == {"a", "b"}


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_what_a_conversion_leaves_out_is_told(kind: str) -> None:
    stem, layer = "lora_unet_mid_block_attentions_0_proj_in", "unet.mid_block.attentions.0.proj_in"
    if kind == "loha":
        sides = {"w1_a": (40, 4), "w1_b": (4, 30), "w2_a": (40, 4), "w2_b": (4, 30)}
        parts = {name: noise(*shape, seed=index) for index, (name, shape) in enumerate(sides.items())}
        dense = (parts["w1_a"] @ parts["w1_b"]) * (parts["w2_a"] @ parts["w2_b"])
        tensors = {f"{stem}.hada_{name}": tensor for name, tensor in parts.items()}
    else:
        first, second = noise(4, 5), noise(10, 6, seed=1)
        dense = torch.kron(first, second)
        tensors = {f"{stem}.lokr_w1": first, f"{stem}.lokr_w2": second}
    exact, cut = read(tensors)[layer], read(tensors, most=5)[layer]
    torch.testing.assert_close(exact.dense(), dense, atol=1e-4, rtol=1e-4)
    missing = float((dense - cut.dense()).square().sum())
    best = float(torch.linalg.svdvals(dense.double())[5:].square().sum())
    assert cut.rank == 5
    assert cut.lost == pytest.approx(missing, rel=1e-3)
    assert best * 0.999 < cut.lost < best * 1.02
    lora = LoRA({layer: cut})
    assert lora.lost == pytest.approx(missing / float(dense.square().sum()), rel=1e-3)
    assert LoRA({layer: exact}).lost < 1e-9


def test_a_loha_too_wide_to_multiply_out_is_truncated_nearly_as_well_as_can_be() -> None:
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    parts = {
        name: noise(*shape, seed=n)
        for n, (name, shape) in enumerate({"w1_a": (90, 9), "w1_b": (9, 80), "w2_a": (90, 9), "w2_b": (9, 80)}.items())
    }
    dense = (parts["w1_a"] @ parts["w1_b"]) * (parts["w2_a"] @ parts["w2_b"]) / 9 * 3
    tensors = {f"{stem}.hada_{name}": tensor for name, tensor in parts.items()} | {f"{stem}.alpha": torch.tensor(3.0)}
    (cut,) = read(tensors, most=16).values()
    best = float(torch.linalg.svdvals(dense.double())[16:].square().sum())
    assert best * 0.999 < cut.lost < 1.01 * best


def test_a_lycoris_layer_with_a_part_missing_is_named() -> None:
    tensors = {"lora_unet_mid_block_attentions_0_proj_in.lokr_w1": noise(4, 4)}
    with pytest.raises(ValueError, match=r"proj_in: has only lokr_w1; lokr_w2_a, lokr_w2_b is missing"):
        read(tensors)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"lokr_w1": (4, 4), "lokr_w2_a": (4, 2), "lokr_w2_b": (3, 4)}, "do not fit together: lokr_w1"),
        ({"hada_w1_a": (4, 2), "hada_w1_b": (2, 5), "hada_w2_a": (6, 2), "hada_w2_b": (2, 5)}, "do not fit together"),
        ({"lokr_w1_a": (2**17, 1), "lokr_w1_b": (1, 2**17), "lokr_w2": (2, 2)}, "131072 x 131072 numbers"),
        (
            {"hada_w1_a": (2**17, 1), "hada_w1_b": (1, 2**17), "hada_w2_a": (2**17, 1), "hada_w2_b": (1, 2**17)},
            "no layer needs",
        ),
        ({"lokr_w1": (4, 4), "lokr_w2": (4, 4), "lora_up.weight": (4, 1)}, "has up of a LoRA beside lokr_w1"),
        (
            {"hada_w1_a": (4, 0), "hada_w1_b": (0, 5), "hada_w2_a": (4, 0), "hada_w2_b": (0, 5), "alpha": (1,)},
            r"hada_w1_a \(4, 0\), .* are empty; leave out a layer that has no update",
        ),
        ({"lokr_w1": (4, 4), "lokr_w2_a": (4, 0), "lokr_w2_b": (0, 4), "alpha": (1,)}, "are empty"),
    ],
)
def test_broken_products_are_refused_before_they_take_memory(parts: dict[str, tuple[int, ...]], words: str) -> None:
    tensors = {f"lora_unet_mid_block_attentions_0_proj_in.{name}": noise(*shape) for name, shape in parts.items()}
    with pytest.raises(ValueError, match=words):
        read(tensors)


# cloneofsimo


def enumerated(classes: tuple[str, ...]) -> tuple[list[str], list[tuple[int, int]]]:
    """Names and shapes of a true SD 1.x UNet's adapted layers, in the order in which cloneofsimo's code walks them."""
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel

    with init_empty_weights():
        unet = UNet2DConditionModel(cross_attention_dim=768)
    names, shapes = [], []
    for path, module in unet.named_modules():
        if type(module).__name__ in classes:
            for name, layer in module.named_modules():
                if isinstance(layer, nn.Linear):
                    names.append(f"unet.{path}.{name}")
                    shapes.append((layer.out_features, layer.in_features))
    return names, shapes


@pytest.mark.parametrize("classes", [("Attention",), ("Attention", "GEGLU")])
def test_numbers_follow_the_modules_of_a_true_unet(classes: tuple[str, ...]) -> None:
    names, shapes = enumerated(classes)
    assert order("unet", shapes) == names
    assert len(names) == (128 if len(classes) == 1 else 144)


@pytest.mark.parametrize("middle", ["last", "between"])
@pytest.mark.parametrize("second", ["attn2", "ff"])
def test_the_shapes_decide_between_the_orders(middle: str, second: str) -> None:
    """The 2023 order has ff before attn2, and old models had the middle block last."""
    names, shapes = enumerated(("Attention", "GEGLU"))
    place = {"down": 0, "mid": 1 if middle == "between" else 2, "up": 2 if middle == "between" else 1}
    part = {"attn1": 0, second: 1}

    def key(index: int) -> tuple[int, int, int]:
        name = names[index]
        inner = next((rank for word, rank in part.items() if f".{word}." in name), 2)
        block = name.partition(".transformer_blocks")[0]
        return (
            place[name.split(".")[1].partition("_")[0]],
            sorted({n.partition(".transformer_blocks")[0] for n in names}).index(block),
            inner,
        )

    indices = sorted(range(len(names)), key=key)
    assert order("unet", [shapes[index] for index in indices]) == [names[index] for index in indices]


def test_numbers_of_an_unknown_model_are_refused() -> None:
    with pytest.raises(ValueError, match="in none of the known orders"):
        read({"unet:0:up": noise(8, 2), "unet:0:down": noise(2, 4)})
    with pytest.raises(ValueError, match="numbered without a gap"):
        read({"unet:1:up": noise(8, 2), "unet:1:down": noise(2, 4)})


def test_embeddings_beside_a_lora_are_told() -> None:
    tensors = plain("lora_unet_mid_block_attentions_0_proj_in", 4, 4) | {"<s1>": noise(8), "<s2>": noise(8)}
    layers, notes = parse(tensors, {})
    assert len(layers) == 1
    assert "2 textual-inversion embeddings (<s1>, <s2>)" in notes[0]


# Pickles


def test_a_list_of_a_text_encoder_is_read(tmp_path: Path) -> None:
    pairs = [noise(6, 2), noise(2, 6, seed=1)] * 4
    torch.save([nn.Parameter(tensor) for tensor in pairs], tmp_path / "a.pt")
    lora = LoRA.read(tmp_path / "a.pt")
    assert [layer.rpartition(".")[2] for layer in lora.layers] == ["k_proj", "out_proj", "q_proj", "v_proj"]
    assert not any(factors.up.requires_grad for factors in lora.layers.values())


def test_a_state_dict_in_a_bin_is_read(tmp_path: Path) -> None:
    tensors = plain("unet.mid_block.attentions.0.proj_in", 4, 6, ends=("lora_A", "lora_B"))
    torch.save({"state_dict": tensors}, tmp_path / "a.bin")
    assert LoRA.read(tmp_path / "a.bin").layers["unet.mid_block.attentions.0.proj_in"].shape == (4, 6)


class Runs:
    """A pickle that would write a file when it is opened by the wrong loader."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("archive", [True, False])
def test_code_in_a_pickle_never_runs(tmp_path: Path, archive: bool) -> None:
    held = {"a.lora_A.weight": Runs(tmp_path / "ran")}
    if archive:
        torch.save(held, tmp_path / "a.pt")
    else:
        (tmp_path / "a.pt").write_bytes(pickle.dumps(held))
    with pytest.raises(ValueError, match=r"a\.pt: not "):
        LoRA.read(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


def rezipped(source: Path, target: Path, change) -> Path:
    """A copy of an archive with its members changed by `change(name, data)`."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(*change(member.filename, old.read(member)))
    return target


def test_a_compressed_archive_is_not_opened(tmp_path: Path) -> None:
    torch.save([torch.zeros(4, 2), torch.zeros(2, 4)] * 4, tmp_path / "a.pt")
    path = rezipped(
        tmp_path / "a.pt", tmp_path / "bomb.pt", lambda name, data: (name, data + bytes(10**7 * ("data/0" in name)))
    )
    assert path.stat().st_size < 10**6
    with pytest.raises(ValueError, match=r"compressed .* which torch never does; it is not opened"):
        LoRA.read(path)


def test_parts_that_claim_more_than_the_file_has_are_not_read(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/data.pkl", b"x" * 1000)
        first = archive.infolist()[0]
        archive.filelist += [first] * 99  # overlapping members: one body, a hundred times
    (tmp_path / "a.pt").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="its parts claim 100,000 bytes"):
        LoRA.read(tmp_path / "a.pt")


def test_a_tensor_larger_than_its_memory_is_refused(tmp_path: Path) -> None:
    """Expanding one number costs nothing to save and everything to use."""
    huge = torch.zeros(1).expand(10**6, 10**6)
    torch.save({"mid_block.attentions.0.proj_in.lora_A.weight": huge}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="not plain tensors of their own"):
        LoRA.read(tmp_path / "a.pt")


def test_an_encrypted_archive_is_refused(tmp_path: Path) -> None:
    torch.save([torch.zeros(4, 2), torch.zeros(2, 4)] * 4, tmp_path / "a.pt")
    data = bytearray((tmp_path / "a.pt").read_bytes())
    place = -1
    while (place := data.find(b"PK\x01\x02", place + 1)) >= 0:  # the central directory: the flag says encrypted
        data[place + 8] |= 1
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.pt: .*parts are encrypted .*; it is not opened"):
        LoRA.read(tmp_path / "a.pt")


def test_a_state_dict_that_holds_itself_is_refused(tmp_path: Path) -> None:
    held: dict[str, object] = {}
    held["state_dict"] = held
    torch.save(held, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: holds a dict; expected tensors by name"):
        LoRA.read(tmp_path / "a.pt")


@pytest.mark.parametrize("part", ["archive", "pickle"])
def test_a_damaged_pickle_is_a_value_error_that_names_the_file(tmp_path: Path, part: str) -> None:
    """Bytes of the archive, or of the pickle inside it (with its checksum made right), set at random."""
    whole, path, random, said = tmp_path / "whole.pt", tmp_path / "a.pt", np.random.default_rng(0), []
    torch.save(plain("unet.mid_block.attentions.0.proj_in", 4, 6, ends=("lora_A", "lora_B")), whole)
    for _ in range(600):
        data = bytearray(whole.read_bytes())
        if part == "archive":
            data[random.integers(len(data))] = random.integers(256)
            path.write_bytes(data[: random.integers(1, 2 * len(data))])
        else:
            with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w") as new:
                for member in old.infolist():
                    content = bytearray(old.read(member))
                    if member.filename.endswith(".pkl"):
                        for _ in range(random.integers(1, 4)):
                            content[random.integers(len(content))] = random.integers(256)
                    new.writestr(member.filename, bytes(content))
        try:
            LoRA.read(path)
        except ValueError as error:
            said.append(str(error))
    assert len(said) > 100
    assert [message for message in said if not message.startswith(f"{path}: ")] == []


def test_other_things_in_a_pickle_are_refused(tmp_path: Path) -> None:
    for held in ({"a": 1}, [1, 2], 5, {}, [torch.ones(1)]):
        torch.save(held, tmp_path / "a.pt")
        with pytest.raises(ValueError, match="expected tensors by name, or a list"):
            LoRA.read(tmp_path / "a.pt")


def test_a_header_that_says_two_things_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, path)
    path.write_bytes(path.read_bytes().replace(b'"b":', b'"a":'))
    with pytest.raises(ValueError, match="a key is there twice"):
        LoRA.read(path)


# Round trips


@pytest.mark.parametrize("dialect", WRITERS)
@pytest.mark.parametrize("ranks", [(3, 3, 3, 3), (1, 5, 6, 3), (7, 64, 4, 4), (6, 6, 6, 1)])
def test_reading_what_was_written_is_exact_to_the_last_bit(tmp_path: Path, dialect: str, ranks: tuple[int, ...]) -> None:
    names = (
        "unet.mid_block.attentions.0.proj_in",
        "unet.conv_in",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "unet.conv_out",
    )
    layers = {}
    for name, rank in zip(names, ranks, strict=True):
        conv = "conv" in name
        layers[name] = Factors(noise(9, rank, seed=rank), noise(rank, 18, seed=rank + 1), (3, 3) if conv else None)
    LoRA(layers).write(tmp_path / "a.safetensors", dialect, torch.float32)
    back = LoRA.read(tmp_path / "a.safetensors")
    assert list(back.layers) == sorted(names)
    for name, factors in layers.items():
        again, rank = back.layers[name], factors.rank
        assert torch.equal(again.up[:, :rank], factors.up)
        assert torch.equal(again.down[:rank], factors.down)
        assert not again.up[:, rank:].any()
        assert not again.down[rank:].any()
        assert again.kernel == factors.kernel


# Files from the wild that are more than one list of matrices


def real(name: str) -> Path:
    """A file from the wild, or a skip that says where it was looked for."""
    if not (REAL / name).exists():
        pytest.skip(f"real LoRA files are not here: {REAL / name}")
    return REAL / name


@pytest.mark.real
@pytest.mark.parametrize(("name", "norm", "notes"), [("analog_svd_rank4", 1.7, 0), ("lora_disney", 132.84, 1)])
def test_real_numbered_files_have_all_their_layers(name: str, norm: float, notes: int) -> None:
    lora = LoRA.read(real(f"cloneofsimo_lora/{name}.safetensors"))
    assert lora.components == {"text_encoder": 48, "unet": 144}
    assert lora.norm == pytest.approx(norm, abs=0.0051)
    assert len(lora.notes) == notes


@pytest.mark.real
def test_the_real_lokr_is_exact() -> None:
    path = real("kohakublueleaf_lycoris/smart_falcon_8_lokr.safetensors")
    lora = LoRA.read(path)
    assert lora.components == {"text_encoder": 72, "unet": 278}
    assert lora.lost < 1e-9
    assert max(factors.rank for factors in lora.layers.values()) == 64
    from safetensors.torch import load_file

    tensors = load_file(path)
    for stem, layer in {
        "lora_unet_up_blocks_1_resnets_0_conv1": "unet.up_blocks.1.resnets.0.conv1",
        "lora_te_text_model_encoder_layers_5_mlp_fc1": "text_encoder.text_model.encoder.layers.5.mlp.fc1",
    }.items():
        parts = {key.rpartition(".")[2]: value.double() for key, value in tensors.items() if key.startswith(f"{stem}.")}
        dense = torch.kron(parts["lokr_w1_a"] @ parts["lokr_w1_b"], parts["lokr_w2_a"] @ parts["lokr_w2_b"])
        dense *= float(parts["alpha"]) / parts["lokr_w1_b"].shape[0]
        error = (lora.layers[layer].dense().flatten(1).double() - dense).norm() / dense.norm()
        assert float(error) < 1e-5
    assert lora.layers["unet.up_blocks.1.resnets.0.conv1"].kernel == (3, 3)
    assert math.isfinite(lora.norm)
    assert json.loads(lora.metadata["ss_network_args"])["algo"] == "lokr"


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_transformers_are_written_under_the_original_names_and_read_back(tmp_path: Path, kind: str) -> None:
    """Every linear layer of a small real model, each with factors of its own, and a text encoder of each sort."""
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    sizes = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 16}
    sizes |= {"pooled_projection_dim": 8, "in_channels": 4}
    with torch.device("meta"):
        model = (
            FluxTransformer2DModel(num_single_layers=1, axes_dims_rope=(2, 2, 4), **sizes, guidance_embeds=True)
            if kind == "flux"
            else SD3Transformer2DModel(
                sample_size=8, patch_size=2, caption_projection_dim=16, dual_attention_layers=(0,), **sizes
            )
        )
    shapes = {
        f"transformer.{name}": (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    t5 = "text_encoder_2" if kind == "flux" else "text_encoder_3"
    shapes |= {f"{t5}.encoder.block.0.layer.0.SelfAttention.q": (4, 4)}
    shapes |= {"text_encoder.text_model.encoder.layers.0.mlp.fc1": (8, 4)}
    if kind == "sd3":
        shapes |= {"text_encoder_2.text_model.encoder.layers.0.mlp.fc1": (8, 4)}
    lora = LoRA({layer: Factors(torch.randn(out, 2), torch.randn(2, into)) for layer, (out, into) in shapes.items()})
    lora.write(tmp_path / "a.safetensors", "kohya", dtype=torch.float32)
    again = LoRA.read(tmp_path / "a.safetensors")
    assert set(again.layers) == set(lora.layers)
    for layer, factors in lora.layers.items():
        assert torch.equal(again.layers[layer].dense(), factors.dense()), layer
    stems = {key.partition(".")[0] for key in load_file(tmp_path / "a.safetensors")}
    first = "double_blocks_1_img" if kind == "flux" else "joint_blocks_1_x_block"
    assert {f"lora_unet_{first}_attn_qkv", "lora_te3_encoder_block_0_layer_0_SelfAttention_q"} <= stems
    assert {"lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_unet_final_layer_linear"} <= stems
    assert not [stem for stem in stems if "transformer_blocks" in stem]


@pytest.mark.parametrize(
    ("module", "out", "into", "stem"),
    [
        ("ff.net.0.proj", 8, 3072, "double_blocks_0_img_mlp_0"),
        ("ff_context.net.2", 3072, 8, "double_blocks_0_txt_mlp_2"),
        ("attn.add_k_proj", 3072, 3072, "double_blocks_0_txt_attn_qkv"),
        ("attn.to_out.0", 3072, 3072, "double_blocks_0_img_attn_proj"),
        ("attn.to_add_out", 3072, 3072, "double_blocks_0_txt_attn_proj"),
        ("ff.net.0.proj", 6144, 1536, "joint_blocks_0_x_block_mlp_fc1"),
        ("norm1_context.linear", 3072, 1536, "joint_blocks_0_context_block_adaLN_modulation_1"),
    ],
)
def test_the_width_of_one_layer_tells_flux_from_sd3(tmp_path: Path, module: str, out: int, into: int, stem: str) -> None:
    layer = f"transformer.transformer_blocks.0.{module}"
    LoRA({layer: Factors(noise(out, 1), noise(1, into))}).write(tmp_path / "a.safetensors")
    assert {key.partition(".")[0] for key in load_file(tmp_path / "a.safetensors")} == {f"lora_unet_{stem}"}


def test_parts_of_a_fused_layer_with_one_input_side_keep_their_rank(tmp_path: Path) -> None:
    down, block = torch.randn(2, 8), "transformer.single_transformer_blocks.3"
    parts = {"attn.to_q": 8, "attn.to_v": 8, "proj_mlp": 32}
    lora = LoRA({f"{block}.{name}": Factors(torch.randn(out, 2), down) for name, out in parts.items()})
    lora.write(tmp_path / "a.safetensors", "kohya", dtype=torch.float32)
    tensors = load_file(tmp_path / "a.safetensors")
    stem = "lora_unet_single_blocks_3_linear1"
    assert tensors[f"{stem}.lora_down.weight"].shape == (2, 8)
    assert tensors[f"{stem}.lora_up.weight"].shape == (56, 2)
    again = LoRA.read(tmp_path / "a.safetensors").layers
    for layer, factors in lora.layers.items():
        assert torch.equal(again[layer].dense(), factors.dense())
    assert again[f"{block}.attn.to_k"].energy == 0  # the part that was not adapted
