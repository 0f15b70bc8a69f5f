"""Small pipelines of three families with random weights: real architectures, a few hundred thousand numbers each."""

from __future__ import annotations

from typing import Any

import torch

LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
WORDS = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
BLOCKS = {"block_out_channels": (32, 64), "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 8}


def tokenizer() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, merges=[], model_max_length=12)


def text_config(**sizes: Any) -> Any:
    from transformers import CLIPTextConfig

    last = len(WORDS) - 1
    plain = {"vocab_size": len(WORDS), "max_position_embeddings": 12, "num_attention_heads": 4, "num_hidden_layers": 3}
    special = {"bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last}
    return CLIPTextConfig(**{**plain, "hidden_size": 32, "projection_dim": 32, "intermediate_size": 64, **special, **sizes})


def vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
    )


def scheduler(**options: Any) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1, **options)


def small_sd(linear: bool = False, **options: Any) -> Any:
    """A Stable Diffusion of version 1, or with linear projections as version 2."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        use_linear_projection=linear,
        **BLOCKS,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(text_config()),
        tokenizer=tokenizer(),
        unet=unet,
        scheduler=scheduler(**options),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return quiet(pipeline)


def small_sdxl() -> Any:
    """An SDXL: two text encoders (told apart by their width, as in the wild), time ids, no attention on the first level."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=80,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=96,
        **BLOCKS,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(text_config()),
        text_encoder_2=CLIPTextModelWithProjection(text_config(hidden_act="gelu", hidden_size=48, projection_dim=48)),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet,
        scheduler=scheduler(),
        add_watermarker=False,
    )
    return quiet(pipeline)


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
