"""kohya's dialect, the one that every program reads.

`<prefix>_<module path, dots as underscores>` + `.lora_down.weight` (r, in), `.lora_up.weight` (out, r), `.alpha`;
scale = alpha / r. Convolutions are 4-D: down (r, in_channels, kh, kw), up (out, r, 1, 1).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from share_diffusion.lora.assemble import Role, assemble, refuse
from share_diffusion.lora.factors import Factors
from share_diffusion.lora.names import canonical, dotted, underscored

PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
ROLES: dict[str, Role] = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha"}


def is_kohya(key: str) -> bool:
    """Whether a key starts as kohya's do."""
    return key.startswith(("lora_unet_", "lora_te"))


def parse_kohya(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Factors]:
    """The layers of a kohya file; its metadata says nothing that the tensors do not."""
    return assemble(tensors, split_kohya)


def split_kohya(key: str) -> tuple[str, Role] | None:
    """`lora_unet_mid_block_attentions_0_proj_in.alpha` -> (`unet.mid_block.attentions.0.proj_in`, `alpha`)."""
    name, _, ending = key.partition(".")
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
    if prefix is None or ending not in ROLES:
        return None
    module = dotted(name.removeprefix(prefix), PREFIXES[prefix])
    layer = None if module is None else canonical(f"{PREFIXES[prefix]}.{module}")
    return None if layer is None else (layer, ROLES[ending])


def spell_kohya(layers: Mapping[str, Factors], name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the least metadata of a kohya file called `name`, alpha = r where all layers have one rank."""
    names = kohya_names(layers)
    # One alpha for all: diffusers 0.42 overlooks those of attention and CLIP layers that differ from the commonest.
    alpha = Counter(factors.rank for factors in layers.values()).most_common(1)[0][0]
    tensors: dict[str, Tensor] = {}
    for layer, factors in layers.items():
        up, down = four_dimensional(factors)
        tensors[f"{names[layer]}.lora_up.weight"] = up * (factors.rank / alpha)
        tensors[f"{names[layer]}.lora_down.weight"] = down
        tensors[f"{names[layer]}.alpha"] = torch.tensor(float(alpha))
    dim = max(factors.rank for factors in layers.values())
    described = {"ss_network_module": "networks.lora", "ss_network_dim": str(dim), "ss_network_alpha": str(alpha)}
    return tensors, described | {"ss_output_name": name}


def kohya_names(layers: Collection[str]) -> dict[str, str]:
    """Each layer's name in this dialect; ValueError lists those that would not come apart again into the same path."""
    # sd-scripts ignores `lora_te1_` in SD 1.x and expects it in SDXL.
    first = "lora_te1_" if any(layer.startswith("text_encoder_2.") for layer in layers) else "lora_te_"
    prefixes = {"unet": "lora_unet_", "text_encoder": first, "text_encoder_2": "lora_te2_"}
    names: dict[str, str] = {}
    problems: list[str] = []
    for layer in layers:
        component, _, module = layer.partition(".")
        names[layer] = prefixes.get(component, "") + underscored(module)
        if component not in prefixes or dotted(underscored(module), component) != module:
            problems.append(f"{layer}: has no name in kohya's dialect; write dialect='diffusers'")
    refuse(problems)
    return names


def four_dimensional(factors: Factors) -> tuple[Tensor, Tensor]:
    """(up, down) in the shape of the weights of the layers they stand for."""
    if factors.kernel is None:
        return factors.up, factors.down
    return factors.up[:, :, None, None], factors.down.unflatten(1, (-1, *factors.kernel))
