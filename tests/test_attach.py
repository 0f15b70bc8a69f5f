"""Facts about a subspace on a live pipeline: a small Stable Diffusion with random weights, made here.

The reference is dense: the same pipeline with dW added to its weights.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from share_diffusion.attached import attach
from share_diffusion.capacity import Capacity
from share_diffusion.layer import ShareConv, ShareLayer, ShareLinear, Update, wrap
from share_diffusion.lora import Factors, LoRA
from share_diffusion.models.identity import identify
from share_diffusion.models.layers import layers, select, shape_of
from share_diffusion.subspace import Subspace

ALL = Capacity(retain=None)
CONV3 = "unet.down_blocks.0.resnets.0.conv1"
STRIDE2 = "unet.down_blocks.0.downsamplers.0.conv"
CONV1 = "unet.down_blocks.0.attentions.0.proj_in"
TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TO_K = "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
Q_PROJ = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


def small_pipeline() -> Any:
    """A Stable Diffusion pipeline of some 0.5 M random weights."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=32,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    )
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=12)
    special = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = CLIPTextModel(CLIPTextConfig(vocab_size=len(words), max_position_embeddings=12, **sizes, **special))
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def original() -> Any:
    return small_pipeline()


@pytest.fixture
def pipeline(original: Any) -> Any:
    """A copy of its own for every test."""
    return copied(original)


def copied(pipeline: Any) -> Any:
    """The same pipeline with weights of its own."""
    parts = {name: copy.deepcopy(part) for name, part in pipeline.components.items()}
    again = type(pipeline)(**parts, requires_safety_checker=False)
    again.set_progress_bar_config(disable=True)
    return again


def random_lora(pipeline: Any, seed: int, chosen: Callable[[str], bool] = lambda path: True, rank: int = 2) -> LoRA:
    """An update of every chosen linear and convolution, about a third as strong as the weights."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for path, module in layers(pipeline).items():
        if chosen(path):
            (out, width), kernel = shape_of(module)
            up, down = torch.randn(out, rank, generator=generator), torch.randn(rank, width, generator=generator)
            found[path] = Factors(0.3 * up / (rank * width) ** 0.5, down, kernel)
    return LoRA(found)


@pytest.fixture(scope="module")
def subspace(original: Any) -> Subspace:
    """Two concepts in every layer, one in the linear layers of the UNet only."""
    loras = {"ink": random_lora(original, 1), "neon": random_lora(original, 2)}
    flat = random_lora(original, 3, lambda path: path.startswith("unet") and isinstance(layers(original)[path], nn.Linear))
    return Subspace.fit(loras | {"flat": flat}, base=identify(original, "small"), capacity=ALL)


@pytest.fixture(scope="module")
def quiet(original: Any) -> Subspace:
    """A subspace of the UNet's attention alone."""
    return Subspace.fit(
        {"ink": random_lora(original, 4, lambda path: path.startswith("unet") and ".attn" in path)},
        base=identify(original, "small"),
    )


def draw(pipeline: Any, seed: int = 0, steps: int = 2) -> Tensor:
    """The latents of one prompt and one seed."""
    return pipeline(
        "a cat",
        height=16,
        width=16,
        num_inference_steps=steps,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).images


def fused(pipeline: Any, subspace: Subspace, weights: Mapping[str, float]) -> Any:
    """A copy of the pipeline with the weighted sum of the updates added to its weights."""
    again = copied(pipeline)
    with torch.no_grad():
        for name, weight in weights.items():
            for path, entry in subspace.lora(name).layers.items():
                layers(again)[path].weight += weight * entry.dense()
    return again


def difference(one: Tensor, other: Tensor) -> float:
    """||one - other|| / ||other||."""
    return float((one.float() - other.float()).norm() / other.float().norm())


def modules(pipeline: Any) -> dict[str, int]:
    """The identity of every module of the UNet and the text encoder."""
    return {
        f"{component}.{name}": id(module)
        for component in ("unet", "text_encoder")
        for name, module in getattr(pipeline, component).named_modules()
    }


def refusal(action: Callable[[], object]) -> str:
    """The message of the ValueError that an action must raise."""
    with pytest.raises(ValueError) as caught:
        action()
    return str(caught.value)


# One layer


LINEAR = nn.Linear(6, 9)
CONVOLUTIONS = {
    "3 x 3": nn.Conv2d(4, 8, 3, padding=1),
    "stride 2": nn.Conv2d(4, 8, 3, stride=2, padding=1),
    "1 x 1": nn.Conv2d(4, 8, 1),
    "uneven": nn.Conv2d(4, 8, (3, 1), stride=(1, 2), padding=(2, 0), dilation=(2, 1), bias=False),
    "same": nn.Conv2d(4, 8, 3, padding="same"),
    "reflect": nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"),
    "circular": nn.Conv2d(4, 8, 3, padding=(1, 0), padding_mode="circular"),
}


def chain(base: nn.Module, seed: int = 0) -> Update:
    """A random update with two matrices between its sides."""
    generator = torch.Generator().manual_seed(seed)
    out, width = base.weight.flatten(1).shape  # type: ignore
    return Update(
        torch.randn(width, 5, generator=generator),
        (torch.randn(5, 2, generator=generator), torch.randn(2, 3, generator=generator)),
        torch.randn(out, 3, generator=generator),
    )


@pytest.mark.parametrize("base", [LINEAR, *CONVOLUTIONS.values()], ids=["linear", *CONVOLUTIONS])
@torch.no_grad()
def test_a_layer_with_updates_is_the_layer_with_their_sum_in_its_weight(base: nn.Module) -> None:
    layer, updates = wrap(base), [chain(base), chain(base, 1)]
    inputs = torch.randn(2, 5, 6) if isinstance(base, nn.Linear) else torch.randn(2, 4, 7, 6)
    assert torch.equal(layer(inputs), base(inputs))
    layer.set(updates)
    dense = copy.deepcopy(base)
    for update in updates:
        matrix = update.beta @ (update.alpha @ update.middle[0] @ update.middle[1]).T
        dense.weight += matrix.reshape(base.weight.shape)  # type: ignore
    torch.testing.assert_close(layer(inputs), dense(inputs), atol=1e-4, rtol=1e-4)
    layer.set(())
    assert torch.equal(layer(inputs), base(inputs))


def test_gradients_reach_the_update_and_not_the_base() -> None:
    base = nn.Linear(6, 9).requires_grad_(False)
    layer, update = wrap(base), chain(LINEAR)
    for tensor in (update.alpha, *update.middle, update.beta):
        tensor.requires_grad_()
    layer.set([update])
    layer(torch.randn(2, 6)).square().sum().backward()
    assert all(
        tensor.grad is not None and tensor.grad.abs().max() > 0 for tensor in (update.alpha, *update.middle, update.beta)
    )
    assert base.weight.grad is None


@pytest.mark.parametrize("module", [nn.Conv2d(4, 8, 3, groups=2), nn.Conv1d(4, 8, 3), nn.Embedding(3, 4)])
def test_other_layers_are_refused(module: nn.Module) -> None:
    with pytest.raises(TypeError, match="cannot be adapted; Linear and Conv2d with groups=1 can"):
        wrap(module)


def test_a_wrapped_layer_answers_for_its_base() -> None:
    layer = wrap(nn.Conv2d(4, 8, 3, stride=2))
    assert (layer.stride, layer.out_channels, layer.weight.shape) == ((2, 2), 8, (8, 4, 3, 3))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = layer.nonsense
    assert list(copy.deepcopy(layer).state_dict()) == ["weight", "bias"]


def test_state_passes_through_the_wrapper_both_ways() -> None:
    model = nn.Sequential(wrap(nn.Linear(3, 4)), nn.ReLU(), wrap(nn.Conv2d(2, 2, 1)))
    plain = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Conv2d(2, 2, 1))
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict())
    for key, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor)
    broken = plain.state_dict()
    del broken["0.bias"]
    with pytest.raises(RuntimeError, match="bias"):
        model.load_state_dict(broken)


# Attached, fused and exported


@pytest.mark.parametrize("blend", ["ink", "ink:0.6 + neon:-0.5 + flat:1.2"])
def test_attached_equals_fused(pipeline: Any, subspace: Subspace, blend: str) -> None:
    assert {CONV3, STRIDE2, CONV1, TO_Q, TO_K, Q_PROJ} <= subspace.layers.keys()
    plain = draw(pipeline)
    with attach(pipeline, subspace) as handle:
        chosen = handle.set_blend(blend)
        attached = draw(pipeline)
    expected = draw(fused(pipeline, subspace, chosen.weights))
    assert difference(plain, expected) > 0.05
    assert difference(attached, expected) < 1e-4


@pytest.mark.parametrize("layer", [CONV3, STRIDE2, CONV1, TO_Q, TO_K, Q_PROJ])
def test_each_kind_of_layer_counts(pipeline: Any, original: Any, layer: str) -> None:
    alone = Subspace.fit({"a": random_lora(original, 5, lambda path: path == layer)}, capacity=ALL)
    plain, expected = draw(original, steps=1), draw(fused(original, alone, {"a": 20.0}), steps=1)
    handle = attach(pipeline, alone)
    handle.set_blend("a:20")
    assert difference(plain, expected) > 1e-4
    assert difference(draw(pipeline, steps=1), expected) < 0.02 * difference(plain, expected)


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
def test_attached_equals_the_exported_lora_in_diffusers(tmp_path: Path, original: Any, dialect: str) -> None:
    def unlike(path: str) -> bool:
        return not path.endswith(("conv_in", "conv_out"))

    subspace = Subspace.fit({"ink": random_lora(original, 1, unlike), "neon": random_lora(original, 2, unlike)}, capacity=ALL)
    exported, attached = copied(original), copied(original)
    subspace.lora("neon").write(tmp_path / "neon.safetensors", dialect=dialect, dtype=torch.float32)
    exported.load_lora_weights(str(tmp_path / "neon.safetensors"))
    attach(attached, subspace).set_blend("neon")
    assert difference(draw(attached), draw(original)) > 0.05
    assert difference(draw(attached), draw(exported)) < 1e-4


def test_a_saved_subspace_draws_the_same(tmp_path: Path, pipeline: Any, subspace: Subspace) -> None:
    expected = draw(fused(pipeline, subspace, {"ink": 1.0}))
    subspace.save(tmp_path / "s.safetensors")
    attach(pipeline, Subspace.load(tmp_path / "s.safetensors")).set_blend("ink")
    assert difference(draw(pipeline), expected) < 1e-2


# On and off


def test_detaching_restores_the_model_to_the_last_bit(pipeline: Any, subspace: Subspace) -> None:
    before, objects = draw(pipeline), modules(pipeline)
    state = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in pipeline.unet.state_dict().items()}
    handle = attach(pipeline, subspace)
    handle.set_blend("ink + neon:2")
    assert difference(draw(pipeline), before) > 0.05
    handle.detach()
    assert modules(pipeline) == objects
    assert torch.equal(draw(pipeline), before)
    for name, tensor in pipeline.unet.state_dict().items():
        assert (tensor.data_ptr(), torch.equal(tensor, state[name][1])) == (state[name][0], True)
    handle.detach()  # twice is harmless
    assert modules(pipeline) == objects


def test_an_error_inside_the_block_detaches_too(pipeline: Any, quiet: Subspace) -> None:
    objects = modules(pipeline)
    with pytest.raises(ValueError), attach(pipeline, quiet) as handle:
        handle.set_blend("nothing")
    assert modules(pipeline) == objects


@pytest.mark.parametrize("blend", [None, "", {}, "ink:0", "ink:0 + neon:-0"])
def test_without_a_blend_the_pipeline_is_untouched_to_the_last_bit(pipeline: Any, subspace: Subspace, blend) -> None:
    before = draw(pipeline)
    handle = attach(pipeline, subspace)
    assert torch.equal(draw(pipeline), before)
    handle.set_blend("neon")
    handle.set_blend(blend)
    assert torch.equal(draw(pipeline), before)


def test_a_seed_gives_one_picture_and_a_blend_another(pipeline: Any, quiet: Subspace) -> None:
    handle = attach(pipeline, quiet)
    handle.set_blend("ink:1.5")
    first = draw(pipeline)
    assert torch.equal(draw(pipeline), first)
    handle.set_blend("ink:-1.5")
    assert difference(draw(pipeline), first) > 1e-2
    handle.set_blend("ink:1.5")
    assert torch.equal(draw(pipeline), first)


def test_an_unknown_concept_changes_nothing(pipeline: Any, quiet: Subspace) -> None:
    handle = attach(pipeline, quiet)
    handle.set_blend("ink")
    before = draw(pipeline)
    assert "the subspace holds: ink" in refusal(lambda: handle.set_blend("ink:0.1 + nothing"))
    assert handle.blend.weights == {"ink": 1.0}
    assert torch.equal(draw(pipeline), before)


def test_a_detached_handle_says_so(pipeline: Any, quiet: Subspace) -> None:
    handle = attach(pipeline, quiet)
    handle.detach()
    assert "detached" in refusal(lambda: handle.set_blend("ink"))


# What surrounds the model


def test_an_attached_model_has_the_keys_of_an_ordinary_one(pipeline: Any, subspace: Subspace) -> None:
    keys = [list(component.state_dict()) for component in (pipeline.unet, pipeline.text_encoder)]
    with attach(pipeline, subspace) as handle:
        handle.set_blend("ink")
        assert [list(component.state_dict()) for component in (pipeline.unet, pipeline.text_encoder)] == keys


def test_a_model_saved_while_attached_is_an_ordinary_model(tmp_path: Path, pipeline: Any, subspace: Subspace) -> None:
    from diffusers import StableDiffusionPipeline

    before = draw(pipeline)
    attach(pipeline, subspace).set_blend("ink")
    pipeline.save_pretrained(tmp_path / "model")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "model", safety_checker=None)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again), before)


def test_a_state_can_be_loaded_while_attached(pipeline: Any, quiet: Subspace) -> None:
    attach(pipeline, quiet)
    state = {name: torch.zeros_like(tensor) for name, tensor in pipeline.unet.state_dict().items()}
    pipeline.unet.load_state_dict(state)
    assert not any(tensor.any() for tensor in pipeline.unet.parameters())


def test_hooks_registered_before_still_fire(pipeline: Any, quiet: Subspace) -> None:
    """And what they make of the layer's output is what the update is added to."""
    calls = []
    layer = layers(pipeline)[TO_Q]
    layer.register_forward_pre_hook(lambda module, inputs: calls.append("before"))
    layer.register_forward_hook(lambda module, inputs, output: calls.append("after") or 0 * output)
    attach(pipeline, quiet).set_blend("ink")
    inputs = torch.randn(1, 3, 32)
    update = quiet.lora("ink").layers[TO_Q].dense()
    torch.testing.assert_close(layers(pipeline)[TO_Q](inputs), inputs @ update.T, atol=1e-5, rtol=1e-4)
    assert calls == ["before", "after"]


def test_training_mode_is_kept(pipeline: Any, quiet: Subspace) -> None:
    for training in (True, False):
        pipeline.unet.train(training)
        with attach(pipeline, quiet):
            assert layers(pipeline)[TO_Q].training is training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_pipeline_in_half_precision_draws(pipeline: Any, subspace: Subspace, dtype: torch.dtype) -> None:
    expected = draw(fused(pipeline, subspace, {"ink": 1.0}), steps=1)
    pipeline.to(dtype)
    attach(pipeline, subspace).set_blend("ink")
    latents = draw(pipeline, steps=1)
    assert latents.dtype == dtype
    assert difference(latents, expected) < (0.02 if dtype == torch.float16 else 0.15)


def test_a_pipeline_may_change_its_precision_while_attached(pipeline: Any, quiet: Subspace) -> None:
    handle = attach(pipeline, quiet)
    handle.set_blend("ink")
    before = draw(pipeline, steps=1)
    pipeline.to(torch.bfloat16)
    assert difference(draw(pipeline, steps=1), before) < 0.15
    handle.set_blend("ink:0.5")
    draw(pipeline, steps=1)


def test_weights_that_lie_elsewhere_until_they_are_needed(pipeline: Any, quiet: Subspace) -> None:
    """Sequential offloading leaves empty weights in the model and fills them layer by layer."""
    from accelerate import cpu_offload

    expected = draw(fused(pipeline, quiet, {"ink": 1.0}))
    cpu_offload(pipeline.unet, execution_device=torch.device("cpu"))
    assert layers(pipeline)[TO_Q].weight.device.type == "meta"
    handle = attach(pipeline, quiet)
    handle.set_blend("ink")
    assert difference(draw(pipeline), expected) < 1e-4
    handle.detach()
    assert difference(draw(pipeline), expected) > 1e-3


# Compiled


def block() -> tuple[SimpleNamespace, Subspace]:
    """A model that torch.compile is done with at once, as a pipeline's UNet, and a subspace of it."""
    torch.manual_seed(0)
    unet = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(2), nn.Linear(16, 8), nn.SiLU(), nn.Linear(8, 4))
    pipeline = SimpleNamespace(unet=unet.requires_grad_(False))
    loras = {name: random_lora(pipeline, seed) for seed, name in enumerate(["a", "b"])}
    return pipeline, Subspace.fit(loras, base=identify(pipeline), capacity=ALL)


@pytest.fixture(params=["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    torch._dynamo.reset()
    yield request.param
    torch._dynamo.reset()


def test_a_compiled_model_sees_every_later_blend(backend: str) -> None:
    pipeline, subspace = block()
    inputs, outputs = torch.randn(2, 3, 4, 4), []
    handle = attach(pipeline, subspace)
    compiled = torch.compile(pipeline.unet, backend=backend)
    for blend in ("", "a", "b:-2", "a:0.5 + b:0.25", ""):
        handle.set_blend(blend)
        outputs.append(compiled(inputs))
        torch.testing.assert_close(outputs[-1], pipeline.unet(inputs), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(outputs[0], outputs[-1])
    assert all(difference(one, other) > 0.01 for one, other in itertools.pairwise(outputs))


def test_moving_a_slider_does_not_compile_again() -> None:
    torch._dynamo.reset()
    graphs = []
    pipeline, subspace = block()
    handle = attach(pipeline, subspace)
    compiled = torch.compile(pipeline.unet, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    handle.set_blend("a:0.1")
    compiled(torch.randn(2, 3, 4, 4))
    first = len(graphs)
    for step in range(2, 6):
        handle.set_blend({"a": step / 10, "b": -step / 10})
        compiled(torch.randn(2, 3, 4, 4))
    assert len(graphs) == first
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_unet_sees_every_later_blend(pipeline: Any, quiet: Subspace) -> None:
    torch._dynamo.reset()
    handle = attach(pipeline, quiet)
    inputs = torch.randn(1, 4, 8, 8), torch.tensor(500), torch.randn(1, 7, 32)
    compiled = torch.compile(pipeline.unet, backend="eager")
    for blend in ("", "ink", "ink:-2"):
        handle.set_blend(blend)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*inputs).sample, pipeline.unet(*inputs).sample, atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()


# What is refused


def test_attaching_twice_is_refused(pipeline: Any, quiet: Subspace) -> None:
    handle = attach(pipeline, quiet)
    objects = modules(pipeline)
    assert "already carries attached layers; call detach()" in refusal(lambda: attach(pipeline, quiet))
    assert modules(pipeline) == objects
    handle.detach()
    attach(pipeline, quiet).detach()


def test_another_architecture_is_refused_with_nothing_attached(pipeline: Any) -> None:
    odd = {
        TO_Q: Factors(torch.ones(5, 1), torch.ones(1, 32)),
        "unet.mid_block.other.to_q": Factors(torch.ones(8, 1), torch.ones(1, 8)),
    }
    other, objects = Subspace.fit({"a": LoRA(odd)}), modules(pipeline)
    message = refusal(lambda: attach(pipeline, other))
    for words in (
        "wrong base",
        "1 of its 2 layers are absent",
        "unet.mid_block.other.to_q",
        f"{TO_Q} is (32, 32), the subspace has (5, 32)",
    ):
        assert words in message
    assert modules(pipeline) == objects
    assert "wrong base" in refusal(lambda: attach(pipeline, other, strict=False))


def test_other_weights_are_refused_unless_allowed(pipeline: Any, quiet: Subspace) -> None:
    objects = modules(pipeline)
    with torch.no_grad():
        for module in layers(pipeline).values():
            module.weight.mul_(1.5)
    message = refusal(lambda: attach(pipeline, quiet))
    assert "the subspace belongs to 'small', and this pipeline has other weights" in message
    assert "strict=False" in message
    assert modules(pipeline) == objects
    attach(pipeline, quiet, strict=False).detach()


def test_the_same_base_in_half_precision_is_the_same_base(pipeline: Any, quiet: Subspace) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        attach(pipeline.to(dtype), quiet).detach()


def test_a_subspace_of_an_unknown_base_goes_onto_whatever_fits(pipeline: Any, quiet: Subspace) -> None:
    unknown = Subspace(layers=quiet.layers, concepts=quiet.concepts)
    attach(pipeline, unknown).detach()


def test_an_incomplete_subspace_is_refused(tmp_path: Path, pipeline: Any) -> None:
    from share_diffusion import file

    weights = {path: module.weight.detach() for path, module in select(pipeline).items()}
    lora = random_lora(pipeline, 6, lambda path: path in weights)
    Subspace.fit({"a": lora}, basis="weights", derived_rank=4, weights=weights).save(tmp_path / "s")
    assert "Subspace.load(path, weights)" in refusal(lambda: attach(pipeline, file.load(tmp_path / "s", look=True)))
    attach(pipeline, Subspace.load(tmp_path / "s", weights)).set_blend("a")


def test_a_layer_that_cannot_be_wrapped_leaves_nothing_attached() -> None:
    unet = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Conv2d(4, 4, 1, groups=2)})
    factors = Factors(torch.ones(4, 1), torch.ones(1, 4))
    subspace = Subspace.fit({"x": LoRA({"unet.a": factors, "unet.b": Factors(factors.up, factors.down, (1, 1))})})
    message = refusal(lambda: attach(SimpleNamespace(unet=unet), subspace))
    assert "unet.b" in message
    assert type(unet["a"]) is nn.Linear


# Names and choices


def test_paths_are_those_of_lora_files(original: Any) -> None:
    found = layers(original)
    assert {CONV3, STRIDE2, CONV1, TO_Q, TO_K, Q_PROJ} <= found.keys()
    assert (found[STRIDE2].stride, shape_of(found[STRIDE2])) == ((2, 2), ((32, 32 * 9), (3, 3)))
    assert shape_of(found[TO_Q]) == ((32, 32), None)


def test_paths_are_the_same_while_attached(pipeline: Any, subspace: Subspace) -> None:
    before = {path: shape_of(module) for path, module in layers(pipeline).items()}
    identity = identify(pipeline, "x")
    with attach(pipeline, subspace):
        assert {path: shape_of(module) for path, module in layers(pipeline).items()} == before
        assert {type(module) for module in layers(pipeline).values()} == {ShareLinear, ShareConv}
        assert all(isinstance(module, ShareLayer) for module in select(pipeline).values())
        assert identify(pipeline, "x") == identity


def test_presets_choose_linear_layers(original: Any) -> None:
    attention, more, linear = (select(original, preset) for preset in ("attention", "attention+ff", "all-linear"))
    assert {TO_Q, TO_K, Q_PROJ} <= attention.keys() < more.keys() < linear.keys()
    assert all(isinstance(module, nn.Linear) for module in linear.values())
    assert all(path.startswith("unet.") for path in select(original, text_encoder=False))
    assert select(original, r"downsamplers").keys() == {STRIDE2}


@pytest.mark.parametrize("targets", ["(", "no_such_layer"])
def test_targets_that_choose_nothing_are_refused(original: Any, targets: str) -> None:
    assert f"targets {targets!r}" in refusal(lambda: select(original, targets))


def test_columns_of_the_weights_ask_for_the_weights_as_they_are(pipeline: Any) -> None:
    weights = {path: module.weight.detach() for path, module in select(pipeline).items()}
    lora = random_lora(pipeline, 2, lambda path: path in weights)
    fitted = Subspace.fit({"a": lora}, basis="weights", derived_rank=4, weights=weights)
    subspace = replace(fitted, base=identify(pipeline, "small"))
    attach(pipeline.to(torch.float16), subspace).detach()
    assert "rounded otherwise than those were; load the base in float32" in refusal(
        lambda: attach(pipeline.to(torch.bfloat16), subspace)
    )
    learned = replace(Subspace.fit({"a": lora}, capacity=ALL), base=subspace.base)
    attach(pipeline, learned).detach()  # columns of its own do not care


def test_a_change_of_architecture_or_weights_is_another_identity(original: Any) -> None:
    identity = identify(original, "small")
    assert (identity.name, len(identity.weights), identity.mismatch(identify(original))) == ("small", 32, None)
    other = copied(original)
    other.unet.conv_in = nn.Conv2d(4, 33, 3)
    assert "another architecture" in (identity.mismatch(identify(other, "other")) or "")
