"""SD 1.5 and SDXL at their true shapes, with made-up weights in half precision: attach, merge, blend, detach."""

from __future__ import annotations

import resource
import time
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from tiny_models import autoencoder, clip_tokenizer, ready
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from share_diffusion.attached import attach
from share_diffusion.lora import Factors, LoRA
from share_diffusion.models import family_of
from share_diffusion.models.identity import identify
from share_diffusion.models.layers import select, shape_of
from share_diffusion.models.texts import tokenize
from share_diffusion.subspace import Subspace

HALF = torch.bfloat16


def filled(kind: Any, config: Any) -> Any:
    """Return a module whose weights are one stretch of noise repeated: random initialisation would take minutes."""
    with torch.device("meta"):
        module: nn.Module = kind(config) if isinstance(config, CLIPTextConfig) else kind(**config)
    module = module.to(HALF).to_empty(device="cpu")
    noise = 0.02 * torch.randn(2**20, generator=torch.Generator().manual_seed(0)).to(HALF)
    for parameter in module.parameters():
        flat = parameter.data.view(-1)
        for start in range(0, len(flat), len(noise)):
            part = flat[start : start + len(noise)]
            part.copy_(noise[: len(part)])
    for name, buffer in module.named_buffers():
        assert name.endswith("position_ids"), name
        buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
    return module.requires_grad_(False)


def text_encoder(kind: Any, width: int, layers: int, heads: int) -> Any:
    """Return a CLIP text encoder of a true size."""
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return filled(kind, CLIPTextConfig(**sizes, num_attention_heads=heads, projection_dim=width))


def sd15() -> Any:
    """Return SD 1.5's UNet and text encoder in a pipeline."""
    unet = filled(UNet2DConditionModel, {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8})
    return StableDiffusionPipeline(
        vae=autoencoder().to(HALF),
        text_encoder=text_encoder(CLIPTextModel, 768, 12, 12),
        tokenizer=clip_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> Any:
    """Return SDXL's UNet and text encoders in a pipeline."""
    unet = filled(
        UNet2DConditionModel,
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    )
    return StableDiffusionXLPipeline(
        vae=autoencoder().to(HALF),
        text_encoder=text_encoder(CLIPTextModel, 768, 12, 12),
        text_encoder_2=text_encoder(CLIPTextModelWithProjection, 1280, 32, 20),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(),
        add_watermarker=False,
    )


def random_lora(pipeline: Any, seed: int, rank: int = 8) -> LoRA:
    """Return an update of every attention projection."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for path, module in select(pipeline).items():
        (out, width), _ = shape_of(module)
        up, down = torch.randn(out, rank, generator=generator), torch.randn(rank, width, generator=generator)
        found[path] = Factors(0.02 * up / (rank * width) ** 0.5, down)
    return LoRA(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "numbers", "layers"), [(sd15, 982_000_000, 176), (sdxl, 3_380_000_000, 732)], ids=["sd15", "sdxl"]
)
def test_attach_merge_blend_and_detach_at_true_shapes(build, numbers, layers, record_property):
    pipeline = ready(build())
    parts = [getattr(pipeline, name) for name in family_of(pipeline).components(pipeline)]
    assert sum(p.numel() for part in parts for p in part.parameters()) == pytest.approx(numbers, rel=0.01)
    assert len(select(pipeline)) == layers
    started = time.perf_counter()
    subspace = Subspace.fit({"ink": random_lora(pipeline, 1)}, base=identify(pipeline, "true"))
    subspace = subspace.merge({"neon": random_lora(pipeline, 2)})
    merging = time.perf_counter() - started
    assert min(concept.retention for concept in subspace.concepts.values()) > 0.998

    family = family_of(pipeline)
    inputs = tokenize(family, pipeline, ["a watercolor painting of a robot"])

    def prediction() -> torch.Tensor:
        with torch.no_grad():
            conditioning = inputs | family.encode_text(pipeline, inputs)
            noisy = torch.ones(1, 4, 8, 8)
            return family.predict(pipeline, noisy, torch.tensor([500]), conditioning)

    before = prediction()
    assert before.isfinite().all()
    started = time.perf_counter()
    with attach(pipeline, subspace) as handle:
        handle.set_blend("ink:3 + neon:3")
        attaching = time.perf_counter() - started
        assert not torch.equal(prediction(), before)
        handle.set_blend("")
        assert torch.equal(prediction(), before)
    assert torch.equal(prediction(), before)
    gibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    record_property("measured", f"merge {merging:.1f} s, attach {attaching:.1f} s, peak {gibibytes:.1f} GiB")
    print(f"{build.__name__}: fit and merge {merging:.1f} s, attach {attaching:.1f} s, peak {gibibytes:.1f} GiB")
    assert gibibytes < 24
