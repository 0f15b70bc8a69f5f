"""Facts about fitting a base into less memory: recomputation changes no gradient, quantisation no identity."""

import importlib.util
import warnings

import pytest
import torch

from share_diffusion.base import load_base
from share_diffusion.learning import freeze, predict, recomputes
from share_diffusion.memory import checkpoint_gradients, park, quantise, use_xformers
from share_diffusion.models.identity import identify


def gradient(pipeline):
    """The gradient of a prediction with respect to its noisy latents."""
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(1, pipeline.unet.config.in_channels, 16, 16, generator=generator).requires_grad_()
    tokens = pipeline.tokenizer(["a red house"], padding="max_length", return_tensors="pt").input_ids
    predict(pipeline, noisy, torch.tensor([300]), {"text_encoder": tokens}).square().mean().backward()
    return noisy.grad


def test_recomputed_activations_give_the_same_gradient():
    pipeline = load_base("tiny")
    freeze(pipeline)
    before = gradient(pipeline)
    checkpoint_gradients(pipeline)
    assert torch.allclose(gradient(pipeline), before, atol=1e-7)


def test_whether_activations_are_recomputed_is_asked_without_a_warning():
    pipeline = load_base("tiny")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not recomputes(pipeline)
        checkpoint_gradients(pipeline)
        assert recomputes(pipeline)


def test_parking_moves_what_no_step_needs():
    pipeline = load_base("tiny")
    park(pipeline, {"unet"}, "meta")
    assert pipeline.vae.device.type == pipeline.text_encoder.device.type == "meta"
    assert pipeline.unet.device.type == "cpu"


def test_what_is_not_installed_is_told_by_name():
    pipeline = load_base("tiny")
    for package, act in (
        ("xformers", lambda: use_xformers(pipeline)),
        ("torchao", lambda: quantise(pipeline, "int8")),
        ("bitsandbytes", lambda: quantise(pipeline, "nf4")),
    ):
        if importlib.util.find_spec(package) is None:
            with pytest.raises(ValueError, match=f"pip install {package}"):
                act()


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_a_quantised_base_predicts_nearly_the_same_and_is_the_same_base():
    pipeline = load_base("tiny")
    freeze(pipeline)
    before, identity = gradient(pipeline), identify(pipeline, "tiny")
    quantise(pipeline, "int8")
    assert identity.mismatch(identify(pipeline, "tiny")) is None
    assert float((gradient(pipeline) - before).norm() / before.norm()) < 0.1
