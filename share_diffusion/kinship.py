"""How updates are related: cosines of dW, groups of layers, and adapters that started from one seed.

A LoRA's `down` hardly leaves its random start, so adapters that a trainer started from the same seed share the row space
of every `down` whatever they learned, and unrelated ones have nothing in common there. That makes such groups cheap to
hold together (their input side is one), and it must not be taken for concepts that resemble each other.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from share_diffusion.basis import WORK
from share_diffusion.lora import Factors, LoRA

PROBES = 3  # layers whose row spaces are compared
SAME_SEED = 0.8  # a cosine above this is no accident: unrelated row spaces have sqrt(r / in), a tenth or less
PARTS = (
    ("attn1", r"\.attn1\."),
    ("attn2", r"\.attn2\."),
    ("attention", r"\.(attn|self_attn|SelfAttention)\."),
    ("ff", r"\.(ff|ff_context|mlp|DenseReluDense|proj_mlp)(\.|$)"),
    ("conv", r"(conv|resnets|samplers)"),
)


def group_of(layer: str) -> str:
    """Return the group that a layer is reported in: its component and the part of a block that it is."""
    component = layer.partition(".")[0]
    part = next((name for name, mark in PARTS if re.search(mark, layer)), "other")
    return f"{component} {part}"


def energies(lora: LoRA) -> dict[str, float]:
    """Return the energy of an update by layer group."""
    found: dict[str, float] = defaultdict(float)
    for layer, factors in lora.layers.items():
        found[group_of(layer)] += factors.energy
    return dict(found)


def inner(first: Factors, second: Factors) -> float:
    """Return <dW_1, dW_2> from the factors, without forming either matrix."""
    left = first.up.to(WORK).mT @ second.up.to(WORK)
    right = first.down.to(WORK) @ second.down.to(WORK).mT
    return float((left * right).sum())


def alike(first: LoRA, second: LoRA) -> set[str]:
    """Return the layers that two updates have in common: of one path and of one shape."""
    both = first.layers.keys() & second.layers.keys()
    return {layer for layer in both if first.layers[layer].shape == second.layers[layer].shape}


def cosines(first: LoRA, second: LoRA) -> dict[str, float]:
    """Return the cosine of two updates by layer group, and under "" that of the whole; a layer not in common is zero."""
    products: dict[str, float] = defaultdict(float)
    for layer in sorted(alike(first, second)):
        products[group_of(layer)] += inner(first.layers[layer], second.layers[layer])
    norms = energies(first), energies(second)
    groups = sorted(norms[0].keys() & norms[1].keys())
    found = {group: cosine(products[group], norms[0][group], norms[1][group]) for group in groups}
    return {"": cosine(sum(products.values()), sum(norms[0].values()), sum(norms[1].values())), **found}


def cosine(product: float, first: float, second: float) -> float:
    """Return a cosine from an inner product and two energies, 0 where one of them is nothing."""
    return product / (first * second) ** 0.5 if first > 0 and second > 0 else 0.0


RowSpaces = Mapping[str, Tensor]  # layer -> orthonormal rows (r, in), float16


def row_spaces(lora: LoRA) -> RowSpaces:
    """Return the row spaces of `down` in a few layers, the same ones for all LoRAs of a base; small enough to keep."""
    ranked = sorted(lora.layers, key=lambda layer: (lora.layers[layer].shape[1], layer))
    spaces = {}
    for layer in [name for name in ranked if lora.layers[name].kernel is None and lora.layers[name].energy > 0][:PROBES]:
        down = lora.layers[layer].down.to(WORK)
        _, values, rows = torch.linalg.svd(down, full_matrices=False)
        spaces[layer] = rows[values > 1e-6 * values[0]].to(torch.float16)
    return spaces


def likeness(first: RowSpaces, second: RowSpaces) -> float:
    """Return the root mean square cosine between two LoRAs' row spaces, 1 when the smaller lies in the larger."""
    common = first.keys() & second.keys()
    shares = []
    for layer in common:
        rows, others = first[layer].float(), second[layer].float()
        if rows.shape[1] == others.shape[1]:
            shares.append(float((rows @ others.mT).square().sum()) / min(len(rows), len(others)))
    return (sum(shares) / len(shares)) ** 0.5 if shares else 0.0


def seed_groups(spaces: Mapping[str, RowSpaces]) -> list[list[str]]:
    """Return the names that started from the same seed, groups of two and more, each in the order given."""
    groups: list[list[str]] = []
    for name, space in spaces.items():
        home = next((group for group in groups if likeness(spaces[group[0]], space) > SAME_SEED), None)
        if home is None:
            groups.append([name])
        else:
            home.append(name)
    return [group for group in groups if len(group) > 1]
