"""LoHa and LoKr as plain factors: exact where their rank allows, else truncated with the lost energy told.

    LoHa    dW = (w1_a @ w1_b) * (w2_a @ w2_b)      rank up to r^2: its columns are products of columns
    LoKr    dW = w1 (x) w2                          rank(w1) * rank(w2): the SVD of a Kronecker product is that of its parts

Their convolutions carry no kernel (but in Tucker form); the layer's name tells it, or (`pointwise`) the whole file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from share_diffusion.basis import WORK, random_basis, thin_svd
from share_diffusion.lora.factors import Factors

Kernel = tuple[int, int] | None
Product = Callable[[Mapping[str, Tensor], float | None, str, int], Factors]
SIZE_LIMIT = 2**28  # numbers of a product that is multiplied out; the largest layers of these models have half as many
EXACT = 1e-12  # share of the energy that is rounding: directions below it are not counted
OVERSAMPLING = 16
POWER_STEPS = 2  # a flat spectrum, as products of random matrices have, gains nothing from more
THREE_BY_THREE = re.compile(
    r"\.(conv1|conv2|conv_in|conv_out|(down|up)samplers\.0\.conv"
    r"|in_layers\.2|out_layers\.3|op|output_blocks\.\d+\.\d+\.conv)$"
)
WORDS = re.compile(r"^unet\..+\.attn2\.to_[kv]$")
SD1_WORDS = 768  # width of the text encoder of Stable Diffusion 1.x; the projections of all others are linear
PROJECTION = re.compile(r"^unet\..+\.\d+\.proj_(in|out)$")


def kernel_of(layer: str, inputs: int) -> Kernel:
    """The kernel that a UNet's layer of this name has, None for a linear one."""
    if not layer.startswith("unet."):
        return None
    if THREE_BY_THREE.search(layer) and inputs % 9 == 0:
        return (3, 3)
    return (1, 1) if layer.endswith(("conv_shortcut", "skip_connection")) else None


def pointwise(layers: dict[str, Factors], products: Collection[str]) -> dict[str, Factors]:
    """The layers, with the kernel 1x1 of Stable Diffusion 1.x's projections beside attention, of which a product tells none."""
    if not any(WORDS.search(layer) and factors.shape[1] == SD1_WORDS for layer, factors in layers.items()):
        return layers
    linear = {layer for layer in products if PROJECTION.search(layer) and layers[layer].kernel is None}
    return {layer: replace(factors, kernel=(1, 1)) if layer in linear else factors for layer, factors in layers.items()}


def hadamard(parts: Mapping[str, Tensor], alpha: float | None, layer: str, most: int) -> Factors:
    """The factors of a LoHa layer, scale alpha / r folded in, of rank `most` at the highest."""
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    demand(parts, names)
    rank = parts["hada_w1_b"].shape[0]
    scale = 1.0 if alpha is None else alpha / rank
    if "hada_t1" in parts or "hada_t2" in parts:
        demand(parts, ("hada_t1", "hada_t2"))
        first = tucker(parts["hada_t1"], parts["hada_w1_a"].T, parts["hada_w1_b"])
        second = tucker(parts["hada_t2"], parts["hada_w2_a"].T, parts["hada_w2_b"])
        return truncated(dense=(first * second).flatten(1) * scale, kernel=kernel_shape(first), most=most)
    up1, down1, up2, down2 = (parts[name].to(WORK).flatten(1) for name in names)
    refuse_size(up1.shape[0], down1.shape[1])
    kernel = kernel_of(layer, down1.shape[1])
    if up1.shape[1] * up2.shape[1] >= min(up1.shape[0], down1.shape[1]) // 2:
        return truncated(dense=(up1 @ down1) * (up2 @ down2) * scale, kernel=kernel, most=most)
    up = (up1[:, :, None] * up2[:, None]).flatten(1)
    down = (down1[:, None] * down2[None]).flatten(0, 1)
    return cut(*thin_svd(up * scale, down), kernel, most)


def kronecker(parts: Mapping[str, Tensor], alpha: float | None, layer: str, most: int) -> Factors:
    """The factors of a LoKr layer, scale alpha / r folded in, of rank `most` at the highest."""
    (first, _), (second, dim) = half(parts, "lokr_w1"), half(parts, "lokr_w2")
    rank = dim or half(parts, "lokr_w1")[1]
    # With both matrices whole there is no rank, and LyCORIS takes the scale 1.
    scale = 1.0 if alpha is None or rank is None else alpha / rank
    inputs = first.shape[1] * math.prod(second.shape[1:])
    kernel = kernel_shape(second) or kernel_of(layer, inputs)
    if first.ndim != 2:
        raise ValueError(f"lokr_w1 is {tuple(first.shape)}; expected a matrix")
    refuse_size(first.shape[0] * second.shape[0], inputs)
    left1, values1, right1 = torch.linalg.svd(first.to(WORK), full_matrices=False)
    left2, values2, right2 = torch.linalg.svd(second.to(WORK).flatten(1), full_matrices=False)
    values, order = torch.outer(values1, values2).flatten().sort(descending=True)
    order = order[: significant(values, most)]
    i, j = order // len(values2), order % len(values2)
    left = torch.einsum("ak,bk->abk", left1[:, i], left2[:, j]).flatten(0, 1)
    right = torch.einsum("ka,kb->kab", right1[i], right2[j]).flatten(1)
    return balanced(left, values[: len(order)] * scale, right, kernel, float(values[len(order) :].square().sum()) * scale**2)


def half(parts: Mapping[str, Tensor], name: str) -> tuple[Tensor, int | None]:
    """One side of a Kronecker product as a tensor of 2 or 4 dimensions, and the rank it was given in, if any."""
    if name in parts:
        return parts[name], None
    demand(parts, (f"{name}_a", f"{name}_b"))
    first, second = parts[f"{name}_a"], parts[f"{name}_b"]
    if name == "lokr_w2" and "lokr_t2" in parts:
        return tucker(parts["lokr_t2"], first.T, second), second.shape[0]
    refuse_size(first.shape[0], second[0].numel())
    return (first.to(WORK) @ second.to(WORK).flatten(1)).unflatten(1, second.shape[1:]), second.shape[0]


def refuse_size(out: int, inputs: int) -> None:
    """Raise ValueError for a product that no layer is as large as, before it takes memory."""
    if out * inputs > SIZE_LIMIT:
        raise ValueError(f"its product has {out} x {inputs} numbers; no layer needs more than {SIZE_LIMIT}, the file is broken")


def demand(parts: Mapping[str, Tensor], names: tuple[str, ...]) -> None:
    """Raise ValueError for the matrices that are missing."""
    if missing := [name for name in names if name not in parts]:
        raise ValueError(f"has only {', '.join(sorted(parts))}; {', '.join(missing)} is missing")


def tucker(core: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """A convolution (out, in, kh, kw) from its core (r, r, kh, kw), up (out, r) and down (r, in)."""
    return torch.einsum("abhw,oa,bi->oihw", core.to(WORK), up.to(WORK), down.to(WORK))


def kernel_shape(weight: Tensor) -> Kernel:
    """(kh, kw) of a convolution's weight, None for a matrix."""
    return (weight.shape[2], weight.shape[3]) if weight.ndim == 4 else None


def truncated(dense: Tensor, kernel: Kernel, most: int) -> Factors:
    """The strongest part of a dense update, by subspace iteration from a fixed start."""
    width = min(most + OVERSAMPLING, *dense.shape)
    right = random_basis(dense.shape[1], width, seed=0)
    for _ in range(POWER_STEPS):
        left, _ = torch.linalg.qr(dense @ right)
        right, _ = torch.linalg.qr(dense.mT @ left)
    left, values, inner = torch.linalg.svd(dense @ right, full_matrices=False)
    return cut(left, values, right @ inner.mT, kernel, most, float(dense.square().sum()))


def cut(left: Tensor, values: Tensor, right: Tensor, kernel: Kernel, most: int, total: float | None = None) -> Factors:
    """Factors of the leading part of left @ diag(values) @ right.T; what is missing of `total` energy is lost."""
    rank = significant(values, most)
    total = float(values.square().sum()) if total is None else total
    lost = max(0.0, total - float(values[:rank].square().sum()))
    return balanced(left[:, :rank], values[:rank], right[:, :rank].mT, kernel, lost if lost > EXACT * total else 0.0)


def significant(values: Tensor, most: int) -> int:
    """How many of the descending singular values are more than rounding, at least 1 and at most `most`."""
    floor = EXACT * float(values.square().sum())
    return max(1, min(most, int((values.square() > floor).sum())))


def balanced(left: Tensor, values: Tensor, right: Tensor, kernel: Kernel, lost: float) -> Factors:
    """Float32 factors with the singular values split evenly, their sign on the left."""
    root = values.abs().sqrt()
    return Factors((left * root * values.sign()).float(), (right * root[:, None]).float(), kernel, lost)


# By the first word of their matrices' names.
PRODUCTS: dict[str, Product] = {"hada": hadamard, "lokr": kronecker}
