"""Facts about LoRA files: what a dialect says, no more and no less, and that other programs hear the same.

The references are dense updates dW, diffusers and peft themselves on small real models, and files found in the wild.
"""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from share_diffusion.lora import Factors, LoRA
from share_diffusion.lora.names import VOCABULARIES, apart, canonical, dotted, underscored
from share_diffusion.lora.peft import write_peft

TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TO_OUT = "unet.up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_out.0"
Q_PROJ = "text_encoder.text_model.encoder.layers.3.self_attn.q_proj"
OUT_PROJ = "text_encoder.text_model.encoder.layers.3.self_attn.out_proj"
CONV = "unet.down_blocks.1.resnets.0.conv1"

Pair = tuple[Tensor, Tensor]


def pair(out: int, into: int, rank: int, seed: int = 0) -> Pair:
    """A random (up, down)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, rank, generator=generator), torch.randn(rank, into, generator=generator)


def saved(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """A file with these tensors."""
    path = folder / "one.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path


def refusal(action: Callable[[], object]) -> str:
    """The message of the ValueError that an action must raise."""
    with pytest.raises(ValueError) as caught:
        action()
    return str(caught.value)


# Factors


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(0, 99))
def test_energy_is_the_squared_norm_of_the_dense_update(out: int, into: int, rank: int, seed: int) -> None:
    factors = Factors(*pair(out, into, rank, seed))
    assert factors.energy == pytest.approx(float(factors.dense().double().square().sum()), rel=1e-5)
    assert (factors.rank, factors.shape) == (rank, (out, into))


def test_energy_does_not_depend_on_the_gauge() -> None:
    up, down = (matrix.double() for matrix in pair(7, 5, 3))
    turn = torch.tensor([[2.0, 1, 0], [0, 1, -3], [1, 0, 1]], dtype=torch.float64)
    moved = Factors(up @ turn, torch.linalg.inv(turn) @ down)
    assert moved.energy == pytest.approx(Factors(up, down).energy, rel=1e-12)


def test_energy_of_factors_that_cancel_is_zero_and_not_negative() -> None:
    for seed in range(40):
        up, down = pair(50, 50, 2, seed)
        third = up.double().sum(1, keepdim=True)
        cancelling = Factors(torch.cat([up.double(), third], 1), torch.cat([down[:1], down[:1], -down[:1]]).double())
        assert 0 <= cancelling.energy < 1e-9


def test_a_convolution_is_the_product_of_its_two_convolutions() -> None:
    up, down = pair(6, 4 * 3 * 3, 2)
    image = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    twice = nn.functional.conv2d(nn.functional.conv2d(image, down.unflatten(1, (4, 3, 3))), up[:, :, None, None])
    once = nn.functional.conv2d(image, Factors(up, down, (3, 3)).dense())
    torch.testing.assert_close(once, twice, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("up", "down", "kernel", "words"),
    [
        ((4, 2), (3, 4), None, "do not multiply"),
        ((4, 2, 1), (2, 4), None, "do not multiply"),
        ((4, 0), (0, 4), None, "empty"),
        ((1, 5000), (5000, 1), None, "rank 5000 is above the limit of 4096"),
        ((4, 2), (2, 10), (3, 3), "10 inputs are no whole channels"),
    ],
)
def test_factors_refuse_shapes_that_do_not_fit(up, down, kernel, words: str) -> None:
    assert words in refusal(lambda: Factors(torch.zeros(up), torch.zeros(down), kernel))


# The LoRA


def test_layers_are_sorted_counted_and_measured_together() -> None:
    layers = {layer: Factors(*pair(4, 4, 2, seed)) for seed, layer in enumerate([TO_OUT, Q_PROJ, TO_Q])}
    lora = LoRA(layers)
    assert list(lora.layers) == sorted(layers)
    assert lora.components == {"text_encoder": 1, "unet": 2}
    together = torch.cat([factors.dense().flatten() for factors in layers.values()])
    assert lora.norm == pytest.approx(float(together.norm()), rel=1e-5)


def test_a_layer_outside_every_component_is_refused() -> None:
    message = refusal(lambda: LoRA({"mid_block.attentions.0.proj_in": Factors(*pair(4, 4, 2))}))
    assert "mid_block.attentions.0.proj_in: expected a path that starts with one of unet" in message


# Dialects: the same dense update, spelled by hand in each of them


KOHYA_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
OLD_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora"
OLD_OUT = "unet.up_blocks.1.attentions.2.transformer_blocks.0.attn2.processor.to_out_lora"
TE = "text_model.encoder.layers.3.self_attn"
SPELLINGS = [
    ("kohya", TO_Q, f"{KOHYA_Q}.lora_down.weight", f"{KOHYA_Q}.lora_up.weight"),
    (
        "kohya to_out",
        TO_OUT,
        "lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_attn2_to_out_0.lora_down.weight",
        "lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_attn2_to_out_0.lora_up.weight",
    ),
    (
        "kohya te",
        Q_PROJ,
        "lora_te_text_model_encoder_layers_3_self_attn_q_proj.lora_down.weight",
        "lora_te_text_model_encoder_layers_3_self_attn_q_proj.lora_up.weight",
    ),
    (
        "kohya te1",
        OUT_PROJ,
        "lora_te1_text_model_encoder_layers_3_self_attn_out_proj.lora_down.weight",
        "lora_te1_text_model_encoder_layers_3_self_attn_out_proj.lora_up.weight",
    ),
    (
        "kohya te2",
        "text_encoder_2.text_projection",
        "lora_te2_text_projection.lora_down.weight",
        "lora_te2_text_projection.lora_up.weight",
    ),
    ("peft", TO_Q, f"{TO_Q}.lora_A.weight", f"{TO_Q}.lora_B.weight"),
    ("peft default adapter", TO_Q, f"{TO_Q}.lora_A.default.weight", f"{TO_Q}.lora_B.default.weight"),
    ("peft without unet", TO_Q, f"{TO_Q[5:]}.lora_A.weight", f"{TO_Q[5:]}.lora_B.weight"),
    ("peft text only", Q_PROJ, f"{TE}.q_proj.lora_A.weight", f"{TE}.q_proj.lora_B.weight"),
    (
        "peft of transformers 5",
        Q_PROJ,
        "text_encoder.encoder.layers.3.self_attn.q_proj.lora_A.weight",
        "text_encoder.encoder.layers.3.self_attn.q_proj.lora_B.weight",
    ),
    (
        "transformer",
        "transformer.transformer_blocks.0.attn.to_q",
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight",
    ),
    ("diffusers 0.22", TO_OUT, f"{TO_OUT}.lora.down.weight", f"{TO_OUT}.lora.up.weight"),
    ("processor", TO_OUT, f"{OLD_OUT}.down.weight", f"{OLD_OUT}.up.weight"),
    ("processor without unet", TO_Q, f"{OLD_Q}.down.weight", f"{OLD_Q}.up.weight"),
    (
        "text encoder before peft",
        OUT_PROJ,
        f"text_encoder.{TE}.to_out_lora.down.weight",
        f"text_encoder.{TE}.to_out_lora.up.weight",
    ),
    (
        "lora_linear_layer",
        Q_PROJ,
        f"text_encoder.{TE}.q_proj.lora_linear_layer.down.weight",
        f"text_encoder.{TE}.q_proj.lora_linear_layer.up.weight",
    ),
]


@pytest.mark.parametrize(("layer", "down", "up"), [case[1:] for case in SPELLINGS], ids=[case[0] for case in SPELLINGS])
def test_every_spelling_reads_as_the_same_layer_and_update(tmp_path: Path, layer: str, down: str, up: str) -> None:
    left, right = pair(6, 5, 2)
    lora = LoRA.read(saved(tmp_path, {down: right, up: left}))
    assert list(lora.layers) == [layer]
    torch.testing.assert_close(lora.layers[layer].dense(), left @ right, rtol=0, atol=0)


@pytest.mark.parametrize("names", [("lora_down", "lora_up", KOHYA_Q), ("lora_A", "lora_B", TO_Q)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [1.0, 16.0, -3.0])
def test_alpha_over_rank_is_folded_in_float32(tmp_path: Path, names, dtype: torch.dtype, alpha: float) -> None:
    up, down = (matrix.to(dtype) for matrix in pair(6, 5, 4))
    a, b, stem = names
    tensors = {f"{stem}.{a}.weight": down, f"{stem}.{b}.weight": up, f"{stem}.alpha": torch.tensor(alpha, dtype=dtype)}
    factors = LoRA.read(saved(tmp_path, tensors)).layers[TO_Q]
    assert factors.up.dtype == factors.down.dtype == torch.float32
    torch.testing.assert_close(factors.dense(), up.float() @ down.float() * (alpha / 4))


@pytest.mark.parametrize("kernel", [(3, 3), (1, 1)])
def test_a_convolution_is_read_from_its_four_dimensional_weights(tmp_path: Path, kernel: tuple[int, int]) -> None:
    up, down = pair(8, 4 * math.prod(kernel), 2)
    stem = "lora_unet_down_blocks_1_resnets_0_conv1"
    four = {f"{stem}.lora_down.weight": down.unflatten(1, (4, *kernel)), f"{stem}.lora_up.weight": up[..., None, None]}
    factors = LoRA.read(saved(tmp_path, four)).layers[CONV]
    assert (factors.kernel, factors.shape) == (kernel, (8, 4 * math.prod(kernel)))
    torch.testing.assert_close(factors.dense(), (up @ down).unflatten(1, (4, *kernel)))


def test_zero_factors_and_a_rank_above_both_sides_are_legal(tmp_path: Path) -> None:
    tensors = {f"{TO_Q}.lora_A.weight": torch.zeros(9, 5), f"{TO_Q}.lora_B.weight": torch.zeros(6, 9)}
    lora = LoRA.read(saved(tmp_path, tensors))
    assert (lora.norm, lora.layers[TO_Q].rank) == (0.0, 9)


# Scale from a PEFT config


def test_header_metadata_gives_the_scale_of_each_component(tmp_path: Path) -> None:
    up, down = pair(6, 5, 4)
    tensors = {f"{layer}.lora_A.weight": down for layer in (TO_Q, TO_OUT, Q_PROJ)}
    tensors |= {f"{layer}.lora_B.weight": up.clone() for layer in (TO_Q, TO_OUT, Q_PROJ)}
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    config = {"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {"attn2.to_out.0": 2}, "text_encoder.r": 2}
    config |= {"text_encoder.lora_alpha": 6, "text_encoder.rank_pattern": {"layers.3.self_attn.q_proj": 4}}
    lora = LoRA.read(saved(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(config)}))
    scales = {layer: float(factors.dense().norm() / (up @ down).norm()) for layer, factors in lora.layers.items()}
    assert scales == pytest.approx({TO_Q: 2.0, TO_OUT: 0.5, Q_PROJ: 1.5})


@pytest.mark.parametrize(
    ("pattern", "alpha"),
    [
        ("to_q", 4),
        ("attn1.to_q", 4),
        (r"attn1\.to_q", 4),
        (f"^{TO_Q[5:]}", 4),
        (TO_Q[5:], 4),
        ("^attn1.to_q", 16),
        ("o_q", 16),
        ("to_k", 16),
    ],
)
def test_a_pattern_is_a_module_name_or_the_end_of_one(tmp_path: Path, pattern: str, alpha: float) -> None:
    up, down = pair(6, 5, 4)
    config = {"unet.r": 4, "unet.lora_alpha": 16, "unet.alpha_pattern": {pattern: 4}}
    tensors = {f"{TO_Q}.lora_A.weight": down, f"{TO_Q}.lora_B.weight": up}
    lora = LoRA.read(saved(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(config)}))
    torch.testing.assert_close(lora.layers[TO_Q].dense(), up @ down * (alpha / 4))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", "lora_adapter_metadata is not JSON"),
        ("[]", "is a JSON list; expected an object with r and lora_alpha"),
        ('{"unet.r": 0, "unet.lora_alpha": "x"}', "r is 0, lora_alpha is 'x'; expected positive numbers"),
        ('{"unet.use_dora": true, "unet.peft_type": "LOHA"}', "peft_type is 'LOHA', use_dora is set"),
        ('{"unet.r": 2, "unet.alpha_pattern": {"(a+)+$": 1}}', "alpha_pattern has '(a+)+$'"),
        ('{"unet.r": 3}', "rank is 2, but the PEFT config says 3"),
        ('{"unet.rank_pattern": ["to_q"]}', "rank_pattern is ['to_q']"),
        ('{"unet.alpha_pattern": "to_q", "unet.rank_pattern": 3}', "rank_pattern is 3, alpha_pattern is 'to_q'"),
        (f'{{"unet.lora_alpha": 1{"0" * 400}}}', "lora_alpha is 1000000"),
        (f'{{"unet.alpha_pattern": {{"to_q": 1{"0" * 400}}}}}', "alpha_pattern has 'to_q'"),
        (f'{{"unet.lora_alpha": 1{"0" * 5000}}}', "lora_adapter_metadata is not JSON"),
    ],
)
def test_a_config_that_gives_no_scale_is_refused(tmp_path: Path, config: str, words: str) -> None:
    up, down = pair(6, 5, 2)
    tensors = {f"{TO_Q}.lora_A.weight": down, f"{TO_Q}.lora_B.weight": up}
    path = saved(tmp_path, tensors, {"lora_adapter_metadata": config})
    assert words in refusal(lambda: LoRA.read(path))


def test_a_peft_file_without_its_config_is_refused(tmp_path: Path) -> None:
    up, down = pair(6, 5, 2)
    stem = "base_model.model.mid_block.attentions.0.proj_in"
    path = saved(tmp_path, {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up})
    assert "put that file beside this one" in refusal(lambda: LoRA.read(path))


# Small real models


def small_unet() -> nn.Module:
    """A UNet of the shape of SD 1.x with random weights."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()


def small_clip() -> nn.Module:
    """A CLIP text encoder with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(1)
    tokens = {"vocab_size": 100, "bos_token_id": 98, "eos_token_id": 99, "pad_token_id": 99}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return CLIPTextModel(CLIPTextConfig.from_dict(tokens | sizes)).eval()


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return small_unet()


@pytest.fixture(scope="module")
def clip() -> nn.Module:
    return small_clip()


def adaptable(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Every linear and convolution of a model by its own name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


def layer_of(component: str, name: str) -> str:
    """The layer path of a module, whichever way this version of transformers spells it."""
    return f"{component}.text_model.{name}" if name.startswith("encoder.layers.") else f"{component}.{name}"


def random_lora(models: dict[str, nn.Module], rank: Callable[[int], int] = lambda index: 2) -> LoRA:
    """A random update of every linear and convolution, `rank(index)` for the index-th of them."""
    layers: dict[str, Factors] = {}
    for component, model in models.items():
        for index, (name, module) in enumerate(adaptable(model).items()):
            out, into = module.weight.flatten(1).shape
            kernel = tuple(module.weight.shape[2:]) if module.weight.ndim == 4 else None
            up, down = pair(out, into, rank(index), index)
            layers[layer_of(component, name)] = Factors(up * 0.05, down / math.sqrt(into), kernel)  # type: ignore
    return LoRA(layers)


def added(model: nn.Module, component: str, lora: LoRA) -> nn.Module:
    """A copy of a model with dW added to its weights."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in adaptable(changed).items():
            module.weight += lora.layers[layer_of(component, name)].dense()
    return changed


def unet_output(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    sample, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 7, 32, generator=generator)
    with torch.no_grad():
        return model(sample, 500, text).sample


def clip_output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(7)[None]).last_hidden_state


# Names


def test_a_word_that_holds_the_start_of_the_next_one_gives_it_back() -> None:
    assert apart("proj_in_layers", "ldm") == "proj.in_layers"


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@given(st.data())
def test_known_words_come_apart_in_one_way_only(vocabulary: str, data: st.DataObject) -> None:
    word = st.sampled_from(VOCABULARIES[vocabulary]) | st.integers(0, 99).map(str)
    path = ".".join(data.draw(st.lists(word, min_size=1, max_size=9)))
    assert apart(underscored(path), vocabulary) == path


@pytest.mark.parametrize("name", ["", "_", "to_q_", "_to_q", "to__q", "to_qq", "attn3_to_q", "conv_", "to_out.0", "q_proj"])
def test_a_name_with_an_unknown_part_is_not_understood_at_all(name: str) -> None:
    assert dotted("mid_block_attentions_0", "unet") == "mid_block.attentions.0"
    assert dotted(name, "unet") is None
    assert dotted(f"mid_block_{name}_conv1", "unet") is None
    assert dotted("to_q", "vae") is None


def test_every_module_of_a_unet_and_a_clip_keeps_its_name(unet: nn.Module, clip: nn.Module) -> None:
    names = [("unet", name) for name in adaptable(unet)] + [("text_encoder", name) for name in adaptable(clip)]
    assert len(names) > 70
    for component, name in names:
        layer = layer_of(component, name)
        module = layer.partition(".")[2]
        assert dotted(underscored(module), component) == module
        assert canonical(f"{component}.{name}") == layer


def test_every_module_of_sdxl_keeps_its_name() -> None:
    from diffusers import UNet2DConditionModel

    sdxl = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "use_linear_projection": True}
    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "transformer_layers_per_block": (1, 2)}
    unet = UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        projection_class_embeddings_input_dim=32,
        **sizes,
        **sdxl,
    )
    names = list(adaptable(unet))
    assert "add_embedding.linear_1" in names
    assert [dotted(underscored(name), "unet") for name in names] == names


# diffusers and peft as references


def loaded(path: Path, unet: nn.Module, clip: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Copies of the two models after `load_lora_weights` of a StableDiffusionPipeline."""
    from diffusers import StableDiffusionPipeline

    parts = {"unet": copy.deepcopy(unet), "text_encoder": copy.deepcopy(clip)}
    absent = dict.fromkeys(("vae", "tokenizer", "scheduler", "safety_checker", "feature_extractor"))
    pipeline = StableDiffusionPipeline(**parts, **absent, requires_safety_checker=False)  # type: ignore
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    return pipeline.unet, pipeline.text_encoder


@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_diffusers_hears_base_plus_update(tmp_path: Path, dialect: str, unet: nn.Module, clip: nn.Module) -> None:
    pytest.importorskip("peft")
    lora = random_lora({"unet": unet, "text_encoder": clip})
    lora.write(tmp_path / "a.safetensors", dialect=dialect, dtype=torch.float32)
    live_unet, live_clip = loaded(tmp_path / "a.safetensors", unet, clip)
    for live, base, component, output in (
        (live_unet, unet, "unet", unet_output),
        (live_clip, clip, "text_encoder", clip_output),
    ):
        expected = output(added(base, component, lora))
        assert (expected - output(base)).norm() > 0.05 * expected.norm(), "the update must be visible"
        torch.testing.assert_close(output(live), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_diffusers_hears_layers_of_different_rank(tmp_path: Path, dialect: str, unet, clip) -> None:
    pytest.importorskip("peft")
    lora = random_lora({"unet": unet, "text_encoder": clip}, rank=lambda index: 1 + index % 3)
    lora.write(tmp_path / "a.safetensors", dialect=dialect, dtype=torch.float32)
    live_unet, live_clip = loaded(tmp_path / "a.safetensors", unet, clip)
    expected = unet_output(added(unet, "unet", lora)), clip_output(added(clip, "text_encoder", lora))
    torch.testing.assert_close((unet_output(live_unet), clip_output(live_clip)), expected, atol=2e-5, rtol=1e-4)


def test_what_diffusers_saves_reads_with_the_scale_it_had(tmp_path: Path, unet: nn.Module) -> None:
    peft = pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline

    config = {"r": 2, "lora_alpha": 6, "target_modules": ["to_q", "conv1"], "alpha_pattern": {"attn2.to_q": 1}}
    weights, deltas = trained(peft.get_peft_model(copy.deepcopy(unet), peft.LoraConfig(**config)))
    StableDiffusionPipeline.save_lora_weights(tmp_path, weights, unet_lora_adapter_metadata=config)
    assert_updates(LoRA.read(tmp_path), deltas)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_peft_folder_reads_as_peft_means_it(tmp_path: Path, unet: nn.Module, rslora: bool) -> None:
    peft = pytest.importorskip("peft")
    patterns = {"rank_pattern": {"attn2.to_k": 3}, "alpha_pattern": {"attn1.to_q": 5, "to_out.0": 7}}
    targets = ["to_q", "to_k", "to_out.0", "conv1", "proj_in", "time_emb_proj"]
    config = peft.LoraConfig(r=2, lora_alpha=16, target_modules=targets, use_rslora=rslora, **patterns)
    model = peft.get_peft_model(copy.deepcopy(unet), config)
    _, deltas = trained(model)
    model.save_pretrained(tmp_path)
    assert len(deltas) > 30
    assert_updates(LoRA.read(tmp_path), deltas)
    assert_updates(LoRA.read(tmp_path / "adapter_model.safetensors"), deltas)


@pytest.mark.parametrize(
    ("component", "module"),
    [
        ("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1"),
        ("text_encoder_2", "encoder.layers.0.mlp.fc1"),
        ("text_encoder_3", "encoder.block.0.layer.0.SelfAttention.q"),
        ("text_encoder", "text_model.encoder.layers.0.mlp.fc1"),
        ("unet", "mid_block.attentions.0.proj_in"),
    ],
)
def test_the_folder_of_a_component_tells_which_it_is(tmp_path: Path, monkeypatch, component: str, module: str) -> None:
    lora = LoRA({f"{component}.{module}": Factors(*pair(4, 6, 2))})
    write_peft(lora, tmp_path, torch.float32)
    again = LoRA.read(tmp_path / component)
    assert list(again.layers) == [f"{component}.{module}".replace("_2.encoder.layers", "_2.text_model.encoder.layers")]
    monkeypatch.chdir(tmp_path / component)
    assert list(LoRA.read("adapter_model.safetensors").layers) == list(again.layers)
    again.write("again.safetensors", "diffusers")
    assert not {"adapter_config", "adapter_folder"} & LoRA.read("again.safetensors").metadata.keys()


def test_a_folder_that_the_paths_speak_against_is_no_component(tmp_path: Path) -> None:
    lora = LoRA({"unet.mid_block.attentions.0.proj_in": Factors(*pair(4, 6, 2))})
    write_peft(lora, tmp_path)
    (tmp_path / "unet").rename(tmp_path / "text_encoder")
    assert list(LoRA.read(tmp_path / "text_encoder").layers) == list(lora.layers)


def trained(model: nn.Module) -> tuple[dict[str, nn.Module | Tensor], dict[str, Tensor]]:
    """The matrices of a PEFT model after setting them at random, and its own dense updates by module name."""
    generator = torch.Generator().manual_seed(5)
    weights: dict[str, nn.Module | Tensor] = {}
    deltas: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            short = name.removeprefix("base_model.model.")
            for letter in "AB":
                matrix = getattr(module, f"lora_{letter}")["default"].weight
                nn.init.normal_(matrix, generator=generator)
                weights[f"{short}.lora_{letter}.weight"] = matrix.detach()
            deltas[short] = module.get_delta_weight("default").detach()  # type: ignore
    return weights, deltas


def assert_updates(lora: LoRA, deltas: dict[str, Tensor]) -> None:
    assert set(lora.layers) == {f"unet.{name}" for name in deltas}
    for name, delta in deltas.items():
        torch.testing.assert_close(lora.layers[f"unet.{name}"].dense(), delta, atol=1e-4, rtol=1e-4)


# Writing


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


# Files that are refused


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


def test_a_folder_of_diffusers_is_read(tmp_path: Path) -> None:
    up, down = pair(6, 5, 2)
    tensors = {f"{TO_Q}.lora_A.weight": down, f"{TO_Q}.lora_B.weight": up}
    saved(tmp_path, tensors).rename(tmp_path / "pytorch_lora_weights.safetensors")
    assert list(LoRA.read(str(tmp_path)).layers) == [TO_Q]


def test_what_is_read_does_not_change_with_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path, {f"{TO_Q}.lora_A.weight": torch.ones(2, 5), f"{TO_Q}.lora_B.weight": torch.ones(6, 2)})
    lora = LoRA.read(path)
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.write(b"\xff" * size)
    assert torch.equal(lora.layers[TO_Q].down, torch.ones(2, 5))


def test_importing_it_imports_neither_diffusers_nor_transformers_nor_peft() -> None:
    code = "import sys, share_diffusion.lora; print({'diffusers', 'transformers', 'peft'} & set(sys.modules))"
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


# Files from the wild

REAL = Path(__file__).parents[1].parent / "shared" / "real-loras"
WILD = [
    # file, component, layers, norm of up @ down before any scale, scale
    ("prushto_cs236/logos_gptdesc_final15000.safetensors", "unet", 128, 50.48, 1),
    ("catundchat_sd15_lora/weapon_lora_v2.safetensors", "unet", 128, 4.73, 1),
    ("mvclab_chiang7777777/expansion_joint.safetensors", "unet", 128, 95.13, 1),
    ("huggingface_diffusers_pr8283/pokemon.safetensors", "unet", 128, 23.89, 1),
    ("jordanhilado_diffusers/pokemon_final.safetensors", "unet", 128, 131.65, 1),
    ("hyper07_skin_lesion/adapter_model.safetensors", "unet", 128, 1.47, 16 / 4),
    ("hyper07_skin_lesion", "unet", 128, 1.47, 16 / 4),
    ("hansjohn819_anime/sd15_text_encoder_adapter_model.safetensors", "text_encoder", 24, 0.63, 1),
    ("jordanhilado_diffusers/sketch_sd15_ckpt500.bin", "unet", 128, 13.35, 1),
    ("cloneofsimo_lora/lora_kiriko.pt", "unet", 128, 18.95, 1),
    ("cloneofsimo_lora/lora_kiriko.text_encoder.pt", "text_encoder", 92, 7.39, 1),
    ("cloneofsimo_lora/lora_illust.pt", "unet", 128, 15.76, 1),
    ("cloneofsimo_lora/lora_pop.pt", "unet", 128, 8.57, 1),
    ("hansjohn819_anime/sdxl_text_encoder_adapter_model.safetensors", "text_encoder", 24, 0.56, 1),
]


def real(name: str) -> Path:
    """A file from the wild, or a skip that says where it was looked for."""
    if not (REAL / name).exists():
        pytest.skip(f"real LoRA files are not here: {REAL / name}")
    return REAL / name


@pytest.mark.real
@pytest.mark.parametrize(("name", "component", "count", "norm", "scale"), WILD, ids=[case[0] for case in WILD])
def test_real_files_read_in_full(tmp_path: Path, name: str, component: str, count: int, norm: float, scale: float):
    lora = LoRA.read(real(name))
    assert lora.components == {component: count}
    assert lora.norm / scale == pytest.approx(norm, abs=0.0051)
    lora.write(tmp_path / "a.safetensors")
    assert LoRA.read(tmp_path / "a.safetensors").norm == pytest.approx(lora.norm, rel=1e-3)
