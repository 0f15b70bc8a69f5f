"""LoRA files and small real models that several tests of LoRA files work with."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from share_diffusion.lora import Factors, LoRA

TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TO_OUT = "unet.up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_out.0"
Q_PROJ = "text_encoder.text_model.encoder.layers.3.self_attn.q_proj"
OUT_PROJ = "text_encoder.text_model.encoder.layers.3.self_attn.out_proj"
KOHYA_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
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
