"""From the tensors of a file to `Factors`: pair them, fold their scale, and list everything that does not fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from share_diffusion.lora.factors import Factors, is_finite

Role = Literal["up", "down", "alpha"]
Parts = dict[Role, Tensor]
Split = Callable[[str], tuple[str, Role] | None]  # key in the file -> (layer, role), None where it is not understood
Scale = Callable[[str, int], float]  # (layer, rank) -> scale of a layer that has no alpha of its own

SHOWN = 20


def no_scale(layer: str, rank: int) -> float:
    """1, which is what every program takes where no alpha is given."""
    return 1.0


def assemble(tensors: Mapping[str, Tensor], split: Split, scale: Scale = no_scale) -> dict[str, Factors]:
    """Every layer of a file, or a ValueError that lists all keys left over and all layers that are wrong."""
    parts, problems = grouped(tensors, split)
    layers: dict[str, Factors] = {}
    for layer, matrices in sorted(parts.items()):
        try:
            layers[layer] = folded(matrices, lambda rank, layer=layer: scale(layer, rank))
        except ValueError as error:
            problems.append(f"{layer}: {error}")
    refuse(problems)
    return layers


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


def folded(parts: Parts, scale: Callable[[int], float]) -> Factors:
    """One layer's float32 factors with alpha / r, or else scale(r), multiplied into `up`."""
    if missing := [role for role in ("up", "down") if role not in parts]:
        raise ValueError(f"has only {', '.join(parts)}; the {' and '.join(missing)} matrix is missing")
    up, down = single(parts, "up"), single(parts, "down")
    if up.ndim != down.ndim or down.ndim not in (2, 4) or any(side != 1 for side in up.shape[2:]):
        expected = "(out, r) and (r, in), or (out, r, 1, 1) and (r, in, kh, kw)"
        raise ValueError(f"up {tuple(up.shape)} and down {tuple(down.shape)} are no pair; expected {expected}")
    kernel = (down.shape[2], down.shape[3]) if down.ndim == 4 else None
    factors = Factors(up.flatten(1), down.flatten(1), kernel)
    factor = alpha_of(parts["alpha"]) / factors.rank if "alpha" in parts else scale(factors.rank)
    factors = Factors(factors.up * factor, factors.down, kernel)
    if not is_finite(factors):
        raise ValueError("holds NaN or infinite values in float32; the file is broken, train or download it again")
    return factors


def single(parts: Parts, role: Role) -> Tensor:
    """A matrix in float32, refused where its dtype is not floating point."""
    if not parts[role].is_floating_point():
        raise ValueError(f"{role} is {parts[role].dtype}; expected float16, bfloat16 or float32")
    return parts[role].to(torch.float32)


def alpha_of(tensor: Tensor) -> float:
    """The number in an alpha tensor, refused where programs would disagree about its meaning."""
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
