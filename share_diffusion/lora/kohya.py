"""kohya's dialect, the one that every program reads.

`<prefix>_<module path, dots as underscores>` + `.lora_down.weight` (r, in), `.lora_up.weight` (out, r), `.alpha`;
scale = alpha / r. Convolutions are 4-D: down (r, in_channels, kh, kw), up (out, r, 1, 1). Transformers (FLUX, SD 3) have
the module paths of their original programs, `lora_unet_double_blocks_0_img_attn_qkv` (`fused.joined`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from share_diffusion.lora.assemble import ENDINGS, Role, assemble, refuse
from share_diffusion.lora.factors import Factors
from share_diffusion.lora.fused import joined
from share_diffusion.lora.names import canonical, dotted, home, underscored
from share_diffusion.lora.native import renamed

PREFIXES = {
    "lora_unet_": "unet",
    "lora_transformer_": "transformer",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
SDXL_WORDS = 2048
T5 = "lora_te3_"  # the third encoder of SD3, and the second of FLUX, which has no more
FLUX = re.compile(r"^lora_(unet|transformer)_(double_blocks|single_blocks|single_transformer_blocks)_")


def is_kohya(keys: Collection[str]) -> bool:
    """Whether a file is kohya's: some of its keys start as those do."""
    return any(key.startswith(tuple(PREFIXES)) for key in keys)


def read_kohya(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], most: int) -> dict[str, Factors]:
    """The layers of a kohya file; its metadata says nothing that the tensors do not."""
    flux = any(FLUX.match(key) for key in tensors)
    return renamed(assemble(tensors, lambda key: split_kohya(key, flux), most=most))


def split_kohya(key: str, flux: bool = False) -> tuple[str, Role] | None:
    """`lora_unet_mid_block_attentions_0_proj_in.alpha` -> (`unet.mid_block.attentions.0.proj_in`, `alpha`)."""
    name, _, ending = key.partition(".")
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
    if prefix is None or ending not in ENDINGS:
        return None
    component = "text_encoder_2" if flux and prefix == T5 else PREFIXES[prefix]
    # kohya says `unet` for the transformers of FLUX and SD3 as well.
    for candidate in ("unet", "transformer") if component == "unet" else (component,):
        module = dotted(name.removeprefix(prefix), candidate)
        if module and (candidate.startswith("text_encoder") or home(module) == candidate):
            layer = canonical(f"{candidate}.{module}")
            return None if layer is None else (layer, ENDINGS[ending])
    return None


def spell_kohya(layers: Mapping[str, Factors], name: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the least metadata of a kohya file called `name`, alpha = r where all layers have one rank."""
    if any(layer.startswith("transformer.") for layer in layers):
        layers = joined(layers)
    names = kohya_names(layers)
    # One alpha for all: diffusers 0.42 overlooks those of attention and CLIP layers that differ from the commonest.
    alpha = Counter(factors.rank for factors in layers.values()).most_common(1)[0][0]
    if dtype == torch.float32:
        layers = {layer: widened(factors, alpha) for layer, factors in layers.items()}
    tensors: dict[str, Tensor] = {}
    for layer, factors in layers.items():
        up, down = four_dimensional(factors)
        tensors[f"{names[layer]}.lora_up.weight"] = up * (factors.rank / alpha)
        tensors[f"{names[layer]}.lora_down.weight"] = down
        tensors[f"{names[layer]}.alpha"] = torch.tensor(float(alpha))
    dim = max(factors.rank for factors in layers.values())
    described = {"ss_network_module": "networks.lora", "ss_network_dim": str(dim), "ss_network_alpha": str(alpha)}
    return tensors, described | {"ss_output_name": name}


def widened(factors: Factors, alpha: int) -> Factors:
    """The factors with zeros up to a rank that is a power of two times alpha, so that r / alpha loses no bit."""
    rank = alpha
    while rank < factors.rank:
        rank *= 2
    while rank % 2 == 0 and rank // 2 >= factors.rank:
        rank //= 2
    extra = rank - factors.rank
    return Factors(pad(factors.up, (0, extra)), pad(factors.down, (0, 0, 0, extra)), factors.kernel)


def kohya_names(layers: Mapping[str, Factors]) -> dict[str, str]:
    """Each layer's name in this dialect; ValueError lists those that would not come apart again into the same path."""
    components = {layer.partition(".")[0] for layer in layers}
    # sd-scripts ignores `lora_te1_` in SD 1.x and expects it where there is more than one text encoder.
    several = "text_encoder_2" in components or "transformer" in components or is_sdxl(layers)
    flux = any(layer.startswith(("transformer.double_blocks.", "transformer.single_blocks.")) for layer in layers)
    prefixes = {
        "unet": "lora_unet_",
        "transformer": "lora_unet_",
        "text_encoder": "lora_te1_" if several else "lora_te_",
        "text_encoder_2": T5 if flux else "lora_te2_",
        "text_encoder_3": T5,
    }
    names: dict[str, str] = {}
    problems: list[str] = []
    for layer in layers:
        component, _, module = layer.partition(".")
        names[layer] = prefixes.get(component, "") + underscored(module)
        if component not in prefixes or dotted(underscored(module), component) != module:
            problems.append(f"{layer}: has no name in kohya's dialect; write dialect='diffusers'")
    refuse(problems)
    return names


def is_sdxl(layers: Mapping[str, Factors]) -> bool:
    """Whether a UNet reads words as wide as both text encoders of SDXL together give them."""
    return any(layer.endswith(".attn2.to_k") and factors.shape[1] == SDXL_WORDS for layer, factors in layers.items())


def four_dimensional(factors: Factors) -> tuple[Tensor, Tensor]:
    """(up, down) in the shape of the weights of the layers they stand for."""
    if factors.kernel is None:
        return factors.up, factors.down
    return factors.up[:, :, None, None], factors.down.unflatten(1, (-1, *factors.kernel))
