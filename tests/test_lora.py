"""Facts about LoRA files that are read: what a dialect says, no more and no less, and that other programs hear the same.

The references are dense updates dW, diffusers and peft themselves on small real models, and files found in the wild.
"""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_files import (
    CONV,
    KOHYA_Q,
    OUT_PROJ,
    Q_PROJ,
    TO_OUT,
    TO_Q,
    adaptable,
    added,
    clip_output,
    layer_of,
    pair,
    random_lora,
    refusal,
    saved,
    small_clip,
    small_unet,
    unet_output,
)
from torch import Tensor, nn

from share_diffusion.lora import Factors, LoRA
from share_diffusion.lora.names import VOCABULARIES, apart, canonical, dotted, underscored
from share_diffusion.lora.peft import write_peft

unet = pytest.fixture(scope="module")(small_unet)
clip = pytest.fixture(scope="module")(small_clip)


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


# Files and folders


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
