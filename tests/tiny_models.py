"""Small random pipelines of every family of base models, of the real classes, for tests.

    build_sd(prediction_type="epsilon")   Stable Diffusion, 32 x 32 pictures
    build_sdxl()                          two CLIP text encoders, time ids
    build_sd3(t5_present=True)            three text encoders, or two
    build_flux(guidance=True)             dev-like, or schnell-like without it

Each takes well under a second and gives the same weights every time; `save` writes an ordinary diffusers folder. The
CLIP tokeniser is the embedded base's; T5's is a unigram model over letters and a few words, made here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from share_diffusion.base import TINY, quiet

WORDS = ("watercolor", "painting", "of", "robot", "house", "photo", "the", "a", "on", "in", "cat", "red", "with")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-:"
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def clip_tokenizer() -> CLIPTokenizer:
    """Return the embedded base's tokeniser: 1,260 byte pairs, 48 tokens."""
    return CLIPTokenizer.from_pretrained(TINY / "tokenizer")


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """Return a T5 tokeniser with a vocabulary of words, letters and an end of sentence."""
    pieces = ["<pad>", "</s>", "<unk>", SPACE, *(SPACE + word for word in WORDS), *LETTERS]
    vocab = [(piece, -1.0 - 0.1 * (len(piece) == 1)) for piece in pieces]
    model = Tokenizer(models.Unigram(vocab, unk_id=2, byte_fallback=False))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=model, vocab=vocab, extra_ids=0, model_max_length=512)


def clip(kind: Any, tokenizer: CLIPTokenizer, width: int, layers: int = 2) -> Any:
    """Return a CLIP text encoder of a class, with a projection of its own width where the class has one."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config)


def t5(width: int) -> T5EncoderModel:
    """Return a T5 encoder of two layers."""
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 2 * width, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    return T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu"))


def autoencoder(channels: int = 4, **config: Any) -> AutoencoderKL:
    """Return an autoencoder that makes 4 pixels of a side one latent."""
    return AutoencoderKL(
        block_out_channels=(16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=channels,
        norm_num_groups=8,
        sample_size=32,
        **config,
    )


def unet(**config: Any) -> UNet2DConditionModel:
    """Return a UNet on 8 x 8 latents with attention on both sides."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
        **config,
    )


def ready(pipeline: Any) -> Any:
    """Return the pipeline in evaluation mode, without a progress bar."""
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_sd(prediction_type: str = "epsilon", width: int = 32) -> Any:
    """Return a Stable Diffusion pipeline; width 1024 makes it one of the shape of 2.x."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    pipeline = StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=clip(CLIPTextModel, tokenizer, width),
        tokenizer=tokenizer,
        unet=unet(cross_attention_dim=width),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return ready(pipeline)


def build_sdxl() -> Any:
    """Return an SDXL pipeline: encoders of width 32 and 64, six time ids of 8 numbers each, Euler's scheduler."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    denoiser = unet(
        cross_attention_dim=96,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 64,
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    pipeline = StableDiffusionXLPipeline(
        vae=autoencoder(scaling_factor=0.13025),
        text_encoder=clip(CLIPTextModel, tokenizer, 32),
        text_encoder_2=clip(CLIPTextModelWithProjection, tokenizer, 64),
        tokenizer=tokenizer,
        tokenizer_2=clip_tokenizer(),
        unet=denoiser,
        scheduler=scheduler,
        add_watermarker=False,
    )
    return ready(pipeline)


def build_sd3(t5_present: bool = True, medium_3_5: bool = False) -> Any:
    """Return an SD 3 pipeline with or without T5; or one of 3.5 medium's shape."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=96,
        caption_projection_dim=32,
        pooled_projection_dim=96,
        out_channels=16,
        pos_embed_max_size=16,
        dual_attention_layers=(0,) if medium_3_5 else (),
        qk_norm="rms_norm" if medium_3_5 else None,
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(CLIPTextModelWithProjection, tokenizer, 32),
        tokenizer=tokenizer,
        text_encoder_2=clip(CLIPTextModelWithProjection, tokenizer, 64),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(96) if t5_present else None,
        tokenizer_3=t5_tokenizer() if t5_present else None,
    )
    return ready(pipeline)


def build_flux(guidance: bool = True) -> Any:
    """Return a FLUX.1 pipeline: dev-like, with embedded guidance and dynamic shift, or schnell-like."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 4, 8),
    )
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        if guidance
        else FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=autoencoder(4, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(CLIPTextModel, tokenizer, 32),
        tokenizer=tokenizer,
        text_encoder_2=t5(32),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
    )
    pipeline.default_sample_size = 8
    return ready(pipeline)


BUILDERS = {
    "sd": build_sd,
    "sd-v": lambda: build_sd("v_prediction"),
    "sdxl": build_sdxl,
    "sd3": build_sd3,
    "sd3-without-t5": lambda: build_sd3(t5_present=False),
    "sd35": lambda: build_sd3(medium_3_5=True),
    "flux": build_flux,
    "flux-schnell": lambda: build_flux(guidance=False),
}


def save(pipeline: Any, folder: Path) -> Path:
    """Write a pipeline as an ordinary diffusers folder."""
    with quiet():
        pipeline.save_pretrained(folder)
    return folder
