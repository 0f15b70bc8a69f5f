"""From the tensors of a file to `Factors`: pair them, fold their scale, and list everything that does not fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from share_diffusion.lora import lycoris
from share_diffusion.lora.factors import Factors, is_finite

Role = str  # one of ENDINGS' values
Parts = dict[Role, Tensor]
Split = Callable[[str], tuple[str, Role] | None]  # key in the file -> (layer, role), None where it is not understood
Scale = Callable[[str, int], float]  # (layer, rank) -> scale of a layer that has no alpha of its own

SHOWN = 20
MOST = 128  # the rank that a conversion from LoHa or LoKr keeps at most

# How a key ends, after the module's name and a dot, and what its tensor is.
ENDINGS: dict[str, Role] = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "alpha": "alpha",
    **{name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{name: name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")},
}


def no_scale(layer: str, rank: int) -> float:
    """1, which is what every program takes where no alpha is given."""
    return 1.0


def assemble(tensors: Mapping[str, Tensor], split: Split, scale: Scale = no_scale, most: int = MOST) -> dict[str, Factors]:
    """Every layer of a file, or a ValueError that lists all keys left over and all layers that are wrong."""
    parts, problems = grouped(tensors, split)
    layers: dict[str, Factors] = {}
    for layer, matrices in sorted(parts.items()):
        try:
            layers[layer] = folded(matrices, layer, scale, most)
        except ValueError as error:
            problems.append(f"{layer}: {error}")
    refuse(problems)
    return lycoris.pointwise(layers, [layer for layer, matrices in parts.items() if product_of(matrices)])


def grouped(tensors: Mapping[str, Tensor], split: Split) -> tuple[dict[str, Parts], list[str]]:
    """The tensors of each layer by role, and what is wrong with the keys."""
    parts: dict[str, Parts] = {}
    problems: list[str] = []
    for key, tensor in sorted(tensors.items()):
        if (found := split(key)) is None:
            problems.append(f"{key} {list(tensor.shape)}: not a key of this dialect, or of an unknown layer")
        elif found[1] in parts.setdefault(found[0], {}):
            problems.append(f"{key}: a second {found[1]} for {found[0]}; keep one of the two")
        else:
            parts[found[0]][found[1]] = tensor
    return parts, problems


def folded(parts: Parts, layer: str, scale: Scale, most: int) -> Factors:
    """One layer's float32 factors with its scale multiplied into `up`, from whichever form its matrices are in."""
    matrices = {role: single(parts, role) for role in parts if role != "alpha"}
    alpha = alpha_of(parts["alpha"]) if "alpha" in parts else None
    if product := product_of(parts):
        factors = converted(lycoris.PRODUCTS[product], matrices, alpha, layer, most)
    else:
        factors = paired(matrices, sorted(parts))
        factor = scale(layer, factors.rank) if alpha is None else alpha / factors.rank
        factors = Factors(factors.up * factor, factors.down, factors.kernel)
    if not is_finite(factors):
        raise ValueError("holds NaN or infinite values in float32; the file is broken, train or download it again")
    return factors


def product_of(parts: Parts) -> str | None:
    """Which product a layer's matrices are, LoHa's or LoKr's, None for a LoRA's."""
    return next((form for form in lycoris.PRODUCTS if any(role.startswith(form) for role in parts)), None)


def converted(convert: lycoris.Product, parts: Mapping[Role, Tensor], alpha: float | None, layer: str, most: int) -> Factors:
    """The factors of a LoHa or LoKr layer; what torch cannot multiply or decompose is a ValueError as all else is."""
    if mixed := sorted({"up", "down", "mid"} & parts.keys()):
        raise ValueError(f"has {', '.join(mixed)} of a LoRA beside {min(parts.keys() - set(mixed))}; keep one of the two")
    if not all(torch.isfinite(part).all() for part in parts.values()):
        raise ValueError("holds NaN or infinite values; the file is broken, train or download it again")
    shapes = ", ".join(f"{role} {tuple(part.shape)}" for role, part in sorted(parts.items()))
    if not all(part.numel() for part in parts.values()):
        raise ValueError(f"{shapes} are empty; leave out a layer that has no update")
    try:
        return convert(parts, alpha, layer, most)
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"its matrices do not fit together: {shapes}") from error


def paired(parts: Mapping[Role, Tensor], present: list[str]) -> Factors:
    """The factors of an up and a down matrix, and of the core between them that a LoCon in CP form has."""
    if missing := [role for role in ("up", "down") if role not in parts]:
        raise ValueError(f"has only {', '.join(present)}; the {' and '.join(missing)} matrix is missing")
    up, down = parts["up"], parts["down"]
    if "mid" in parts:
        down = through_core(parts["mid"], down)
    if up.ndim != down.ndim or down.ndim not in (2, 4) or any(side != 1 for side in up.shape[2:]):
        expected = "(out, r) and (r, in), or (out, r, 1, 1) and (r, in, kh, kw)"
        raise ValueError(f"up {tuple(up.shape)} and down {tuple(down.shape)} are no pair; expected {expected}")
    kernel = (down.shape[2], down.shape[3]) if down.ndim == 4 else None
    return Factors(up.flatten(1), down.flatten(1), kernel)


def through_core(core: Tensor, down: Tensor) -> Tensor:
    """A convolution's core (r, r, kh, kw) applied after `down` (r, in, 1, 1): one down matrix (r, in, kh, kw), exactly."""
    if core.ndim != 4 or down.ndim != 4 or core.shape[1] != down.shape[0] or down.shape[2:] != (1, 1):
        raise ValueError(
            f"mid {tuple(core.shape)} and down {tuple(down.shape)} are no pair; expected (r, r, kh, kw), (r, in, 1, 1)"
        )
    return torch.einsum("abhw,bi->aihw", core, down.flatten(1))


def single(parts: Parts, role: Role) -> Tensor:
    """A matrix in float32, refused where its dtype is not floating point."""
    if not parts[role].is_floating_point():
        raise ValueError(f"{role} is {parts[role].dtype}; expected float16, bfloat16 or float32")
    return parts[role].to(torch.float32)


def alpha_of(tensor: Tensor) -> float:
    """The number in an alpha tensor, refused where programs would disagree about its meaning."""
    if tensor.is_complex():
        raise ValueError(f"alpha is {tensor.dtype}; expected one finite number")
    alpha = float(tensor) if tensor.numel() == 1 else math.nan
    if not math.isfinite(alpha) or alpha == 0:
        shown = alpha if tensor.numel() == 1 else f"of shape {tuple(tensor.shape)}"
        raise ValueError(f"alpha is {shown}; expected one finite number, not 0 (some programs read 0 as alpha = rank)")
    return alpha


def refuse(problems: list[str]) -> None:
    """Raise one ValueError that lists the problems, if there are any."""
    if problems:
        shown = "".join(f"\n  - {problem}" for problem in problems[:SHOWN])
        rest = f"\n  - and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ValueError(f"{len(problems)} problem{'s' * (len(problems) > 1)}:{shown}{rest}")
