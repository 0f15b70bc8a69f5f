"""Reads the one-file format of Share on its own: header, checksum, bases and coefficients.

    <layer>.share_alpha (in, k), <layer>.share_beta (out, k')     learned columns of the shared bases, float16
    concept.<number> (n,)     for every layer in order: alpha (k, p), then beta (k', p), in units of sqrt(norm), float16 or int8
    scales.<number> (s,)      beside int8: for every layer in order what the p columns of alpha and of beta are stretched by
    layouts (g, layers, 3)    rows of alpha, rows of beta and p of every layer; p = 0 is an absent layer

    principal.* measured columns (origin `activations`): directions of channels as numbers of four bits, the pairs of a
                              direction and a pattern over a convolution's kernel, and how many of both each side has

The first columns of a basis may come from a seed instead (origin `random`) and are drawn again here, or from measurements of
the base (origin `activations`), which are made orthonormal here. A basis that comes from the base's own weights (origin
`weights`) is refused: ComfyUI may hold those in another precision.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

HEADER_LIMIT = 16 * 2**20
VERSION = 1


@dataclass(frozen=True)
class Concept:
    """One concept: how it is called, its packed coefficients, and in 8 bits the scales of their columns."""

    name: str
    kind: str
    trigger: str
    retention: float
    packed: Tensor
    scales: Tensor | None
    layout: list[list[int]]


@dataclass(frozen=True)
class Layer:
    """One layer's path, its bases alpha (in, k) and beta (out, k'), and its kernel where it is a convolution."""

    path: str
    alpha: Tensor
    beta: Tensor
    kernel: tuple[int, int] | None


@dataclass(frozen=True)
class SubspaceFile:
    """What a file holds: the base it belongs to, its layers in order, its concepts by name."""

    base: str
    layers: list[Layer]
    concepts: dict[str, Concept]


def read(path: str | os.PathLike[str]) -> SubspaceFile:
    """Read a subspace file, verified against its checksum; ValueError says what is wrong with it."""
    with open(path, "rb") as file:
        data = file.read()
    content = verified(data, os.path.basename(path))
    refuse_other(content, os.path.basename(path))
    if content["origin"]["kind"] == "weights":
        raise ValueError(
            f"{os.path.basename(path)}: its basis comes from the base's weights, which ComfyUI cannot give back exactly; "
            "write its concepts with `share-diffusion export` and load them as LoRAs"
        )
    tensors = load(data)
    measured = measured_columns(content["layers"], tensors) if content["origin"]["kind"] == "activations" else {}
    return SubspaceFile(
        base=content["base"]["name"],
        layers=[layer_of(entry, tensors, content["origin"], measured.get(entry[0])) for entry in content["layers"]],
        concepts={entry["name"]: concept_of(number, entry, tensors) for number, entry in enumerate(content["concepts"])},
    )


def verified(data: bytes, name: str) -> dict[str, Any]:
    """Return a file's metadata once its format, version and checksum are right."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(len(data) - 8, HEADER_LIMIT):
        raise ValueError(f"{name} is no safetensors file, or was cut short; copy it again")
    try:
        header = json.loads(data[8 : 8 + size])
        envelope = json.loads(header["__metadata__"]["share"])
        claimed, version = envelope.pop("checksum"), envelope["format_version"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{name} is no subspace file; a LoRA goes into models/loras instead") from None
    if version != VERSION:
        raise ValueError(f"{name} has format version {version}, these nodes read {VERSION}; update them")
    # The checksum is that of the file as it would be without the checksum.
    header["__metadata__"] = {"share": json.dumps(envelope, sort_keys=True, separators=(",", ":"))}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256(len(text).to_bytes(8, "little") + text)
    digest.update(memoryview(data)[8 + size :])
    if claimed != f"sha256:{digest.hexdigest()}":
        raise ValueError(f"{name} is damaged: its checksum does not match; copy it again, or take the .bak beside it")
    return envelope["content"]


def refuse_other(content: Any, name: str) -> None:
    """Raise ValueError for a file of Share that is no subspace file, with what it is."""
    if isinstance(content, dict) and "patch" in content:
        raise ValueError(
            f"{name} is a patch, which holds one concept for a subspace file; fold it in with `share-diffusion merge`"
        )
    if not isinstance(content, dict) or not {"base", "origin", "layers", "concepts"} <= set(content):
        raise ValueError(f"{name} is another file of Share than a subspace file; put the subspace file into models/share")


def layer_of(
    entry: list[Any], tensors: dict[str, Tensor], origin: dict[str, Any], measured: tuple[Tensor, Tensor] | None = None
) -> Layer:
    """Return one layer with its derived columns in front of the learned ones."""
    path, out, width, kernel = entry
    alpha, beta = tensors[f"{path}.share_alpha"].float(), tensors[f"{path}.share_beta"].float()
    if measured is not None:
        alpha, beta = torch.cat([measured[0], alpha], dim=1), torch.cat([measured[1], beta], dim=1)
    elif origin["kind"] in ("random", "activations"):
        rank = min(origin["rank"], out, width)
        alpha = torch.cat([drawn(width, rank, origin["seed"], path, "alpha"), alpha], dim=1)
        beta = torch.cat([drawn(out, rank, origin["seed"], path, "beta"), beta], dim=1)
    return Layer(path, alpha, beta, (kernel[0], kernel[1]) if kernel else None)


def measured_columns(entries: list[list[Any]], tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the measured columns (alpha, beta) of the layers that have them, by path."""
    packed, pairs = tensors["principal.numbers"], tensors["principal.pairs"].long()
    numbers = torch.stack([packed // 16, packed % 16], 1).flatten().double() - 8
    found, place, pair = {}, 0, 0
    for (path, out, width, kernel), sizes in zip(entries, tensors["principal.sizes"].tolist(), strict=True):
        sides = []
        for side, shape, stored, columns in ((width, kernel or [1, 1], *sizes[:2]), (out, [1, 1], *sizes[2:])):
            patterns = shape[0] * shape[1]
            channels = side // patterns
            directions = numbers[place : place + channels * stored].reshape(channels, stored)
            chosen = torch.arange(columns)
            if patterns > 1:
                chosen, pair = pairs[pair : pair + columns], pair + columns
            place += channels * stored
            sides.append(orthonormal(directions, chosen, cosines(*shape)))
        if any(sizes):
            found[path] = (sides[0], sides[1])
    return found


def orthonormal(directions: Tensor, pairs: Tensor, waves: Tensor) -> Tensor:
    """Return orthonormal columns (channels * places, k): pairs (k,) of a direction (channels) and a wave over the places."""
    count = waves.shape[1]
    columns = torch.zeros(len(directions), count, len(pairs))
    for pattern in (pairs % count).unique().tolist():  # those of different waves are orthogonal as they are
        places = (pairs % count == pattern).nonzero().flatten()
        chosen = directions[:, pairs[places] // count]
        frame, triangle = torch.linalg.qr(chosen / chosen.norm(dim=0))
        frame = frame * torch.where(triangle.diagonal() < 0, -1.0, 1.0)
        columns[:, :, places] = (frame[:, None] * waves[None, :, pattern, None]).float()
    return columns.flatten(0, 1)


def cosines(height: int, width: int) -> Tensor:
    """Return the DCT-II over a kernel's places as orthonormal columns, the smoothest first."""
    lines = []
    for length in (height, width):
        places = torch.arange(length, dtype=torch.float64)
        waves = torch.cos(math.pi / length * (places[:, None] + 0.5) * places[None])
        lines.append(waves / waves.norm(dim=0))
    order = sorted(range(height * width), key=lambda index: (index // width + index % width, index))
    return torch.kron(*lines)[:, order]


def drawn(side: int, rank: int, seed: int, path: str, which: str) -> Tensor:
    """Return the orthonormal columns (side, rank) that a seed stands for."""
    own = int.from_bytes(hashlib.sha256(f"{seed}/{path}/{which}".encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(own)
    frame, triangle = torch.linalg.qr(torch.randn(side, rank, generator=generator, dtype=torch.float64))
    return (frame * triangle.diagonal().sign()).float()


def concept_of(number: int, entry: dict[str, Any], tensors: dict[str, Tensor]) -> Concept:
    """Return one concept."""
    packed = tensors[f"concept.{number:05d}"].float() * (entry["norm"] ** 0.5 or 1.0)
    layout = tensors["layouts"][entry["layout"]].tolist()
    scales = tensors.get(f"scales.{number:05d}")
    return Concept(entry["name"], entry["kind"], entry["trigger"], entry["retention"], packed, scales, layout)


def factors(file: SubspaceFile, concept: Concept) -> dict[str, tuple[Tensor, Tensor]]:
    """Return a concept's update of each layer, up (out, p) = beta @ eps_beta and down (p, in) = (alpha @ eps_alpha).T."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    start = column = 0
    for layer, (rows_alpha, rows_beta, rank) in zip(file.layers, concept.layout, strict=True):
        middle, end = start + rows_alpha * rank, start + (rows_alpha + rows_beta) * rank
        if rank:
            alpha = concept.packed[start:middle].reshape(rows_alpha, rank)
            beta = concept.packed[middle:end].reshape(rows_beta, rank)
            if concept.scales is not None:
                alpha = alpha * concept.scales[column : column + rank].float()
                beta = beta * concept.scales[column + rank : column + 2 * rank].float()
            found[layer.path] = layer.beta[:, :rows_beta] @ beta, (layer.alpha[:, :rows_alpha] @ alpha).mT
        start, column = end, column + 2 * rank
    return found
