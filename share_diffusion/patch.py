"""A concept learned elsewhere against a known basis version: many machines learn, one file takes them all in.

    patch = make_patch(subspace, "robot", lora, kind="subject", trigger="robot")      # on any machine
    write_patch(patch, "robot.patch.safetensors")
    merged = merge_patches(subspace, [read_patch(path) for path in paths])            # anywhere (asynchronous.py)

A patch holds coefficients in the columns that were known when it was learned, the directions that it needs beyond them,
and a digest of those columns. What is unusual: it stays valid while the file grows. Columns are only ever added at the end,
so a patch fits every later file whose leading columns have its digest, however many others were merged in between; only
a truncation (a cap or budget) makes it old, and then it is re-expressed through the file it was learned against.

A patch file, in the same careful container as a subspace:

    <layer>.patch_alpha     (in, m)     directions beyond the known columns, float16
    <layer>.patch_beta      (out, m')
    coefficients            (n,)        for every layer its alpha (k + m, p) and beta (k' + m', p), in units of sqrt(norm)
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from share_diffusion import storage
from share_diffusion.basis import WORK, Basis, Coefficients, orthonormalised, outside, principal_directions, thin_svd
from share_diffusion.capacity import Capacity
from share_diffusion.concept import check_name
from share_diffusion.lora import Factors, LoRA
from share_diffusion.packed import half, unit_of
from share_diffusion.subspace import BaseIdentity, Origin, Subspace, refuse

PRESENT = 1e-4  # a direction weaker than this share of its update is below the file's precision
Columns = tuple[int, int]


@dataclass(frozen=True)
class Patch:
    """One concept as coefficients in `known` columns (alpha, beta) of each layer and in its own `extension` beside them."""

    name: str
    kind: str
    trigger: str
    norm: float
    base: BaseIdentity
    origin: Origin
    version: str  # the digest of the known columns
    known: Mapping[str, Columns]
    extension: Mapping[str, Basis]  # (in, m), (out, m')
    coefficients: Mapping[str, Coefficients]  # (k + m, p), (k' + m', p)
    kernels: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def learned_against(self) -> tuple[str, Origin, tuple[tuple[str, Columns], ...]]:
        """The known columns, as a key: patches of equal keys fit the same subspaces."""
        return self.version, self.origin, tuple(sorted(self.known.items()))

    @property
    def digest(self) -> str:
        """What identifies the patch: a digest of its content, the same before and after a file."""
        tensors, metadata = pack(self)
        total = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
        for name in sorted(tensors):
            total.update(name.encode() + tensors[name].numpy().tobytes())
        return total.hexdigest()[:16]

    def fits(self, subspace: Subspace) -> bool:
        """Tell whether the subspace's leading columns are those that the patch was learned against."""
        return leading_version(subspace, self.known, self.origin) == self.version

    def lora(self, subspace: Subspace) -> LoRA:
        """Return the concept as an ordinary LoRA, through a subspace that it fits."""
        layers = {}
        for layer, entry in self.coefficients.items():
            extra, (alpha, beta) = self.extension[layer], self.known[layer]
            held = subspace.layers.get(layer)
            wide_alpha = torch.cat([held.alpha[:, :alpha], extra.alpha], 1) if held else extra.alpha
            wide_beta = torch.cat([held.beta[:, :beta], extra.beta], 1) if held else extra.beta
            layers[layer] = Factors(wide_beta @ entry.beta, (wide_alpha @ entry.alpha).mT, self.kernels.get(layer))
        return LoRA(layers, {})


def leading_version(subspace: Subspace, known: Mapping[str, Columns], origin: Origin) -> str:
    """Return the digest of a subspace's leading columns, as many in each layer as were known; "" where it has fewer."""
    wanted = {layer: columns for layer, columns in known.items() if any(columns)}
    bases = {layer: subspace.layers.get(layer, Basis(torch.zeros(0, 0), torch.zeros(0, 0))) for layer in wanted}
    short = [layer for layer, (alpha, beta) in wanted.items() if bases[layer].rank[0] < alpha or bases[layer].rank[1] < beta]
    if short or (wanted and subspace.origin != origin):
        return ""
    cut = {layer: Basis(bases[layer].alpha[:, :alpha], bases[layer].beta[:, :beta]) for layer, (alpha, beta) in wanted.items()}
    known_origin = subspace.origin if subspace.origin == origin else origin  # a patch's own has no measured columns with it
    return replace(subspace, origin=known_origin, layers=cut).basis_version


def make_patch(
    subspace: Subspace,
    name: str,
    lora: LoRA,
    *,
    kind: str = "style",
    trigger: str = "",
    details: Mapping[str, Any] | None = None,
) -> Patch:
    """Return a concept that was learned as `lora` against the subspace, ready to be sent.

    Raises ValueError where a value is not finite or a shape does not fit the subspace.
    """
    refuse(subspace.merge_problems({name: lora}, Capacity(retain=None), None))
    shapes = {layer: (factors.shape, factors.kernel) for layer, factors in lora.layers.items()}
    covered = subspace.cover(shapes)
    parts = {layer: express(covered.layers[layer], factors) for layer, factors in lora.layers.items() if factors.energy}
    known = {layer: covered.layers[layer].rank for layer in parts}
    return Patch(
        name=check_name(name),
        kind=kind,
        trigger=trigger,
        norm=float(f"{lora.norm:.6g}"),
        base=subspace.base,
        origin=subspace.origin,
        version=leading_version(covered, known, subspace.origin),
        known=known,
        extension={layer: extension for layer, (extension, _) in parts.items()},
        coefficients={layer: entry for layer, (_, entry) in parts.items()},
        kernels={layer: lora.layers[layer].kernel for layer in parts if lora.layers[layer].kernel},  # type: ignore[misc]
        details=dict(details or {}),
    )


def express(basis: Basis, factors: Factors) -> tuple[Basis, Coefficients]:
    """Return the directions that an update needs beyond a basis, and its coefficients in both together."""
    left, values, right = thin_svd(factors.up, factors.down)
    present = int((values > PRESENT * values.max()).sum())
    root = values[:present].sqrt()
    alpha, alpha_part = express_side(basis.alpha, right[:, :present] * root)
    beta, beta_part = express_side(basis.beta, left[:, :present] * root)
    return Basis(alpha, beta), Coefficients(alpha_part, beta_part)


def express_side(columns: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return orthonormal directions (side, m) of the vectors (side, p) outside the columns (side, k), and (k + m, p)."""
    axes, triangle = orthonormalised(columns.to(WORK))  # columns rounded to half precision are not quite orthonormal
    rest = outside(axes, vectors)
    directions, energies = principal_directions(rest, vectors.square().sum().sqrt())
    strong = energies > PRESENT**2 * vectors.square().sum()
    extension = directions[:, strong]
    inside = torch.linalg.solve_triangular(triangle, axes.mT @ vectors, upper=True)
    return extension.float(), torch.cat([inside, extension.mT @ rest]).float()


def is_patch(path: str | os.PathLike[str]) -> bool:
    """Tell whether a file is a patch, by its header alone."""
    try:
        return "patch" in storage.read_header(path).metadata
    except storage.StorageError:
        return False


def write_patch(patch: Patch, path: str | os.PathLike[str]) -> None:
    """Write a patch, whole or not at all; refuses to overwrite."""
    tensors, metadata = pack(patch)
    storage.write(path, tensors, metadata, expected_generation=None)


def read_patch(path: str | os.PathLike[str]) -> Patch:
    """Read a patch file; raises ValueError where it is damaged or something else."""
    metadata, tensors, _ = storage.read(path)
    if "patch" not in metadata:
        raise storage.StorageError(f"{os.fspath(path)} is not a patch: it holds a subspace; learn one with --patch FILE")
    try:
        return unpack(metadata["patch"], tensors)
    except (KeyError, TypeError, IndexError, RuntimeError) as error:
        raise storage.StorageError(f"{os.fspath(path)} is not a patch: {type(error).__name__} {error}") from error


def pack(patch: Patch) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the metadata of a patch's file."""
    tensors, unit, parts, layers = {}, unit_of(patch.norm), [], []
    for layer in sorted(patch.coefficients):
        entry, extra = patch.coefficients[layer], patch.extension[layer]
        tensors[f"{layer}.patch_alpha"] = half(extra.alpha, layer)
        tensors[f"{layer}.patch_beta"] = half(extra.beta, layer)
        parts += [entry.alpha.flatten() / unit, entry.beta.flatten() / unit]
        kernel = patch.kernels.get(layer)
        layers.append([layer, *patch.known[layer], entry.pseudo_rank, list(kernel) if kernel else None])
    tensors["coefficients"] = half(torch.cat(parts) if parts else torch.zeros(0), patch.name)
    about = {key: getattr(patch, key) for key in ("name", "kind", "trigger", "norm", "version")}
    content = {
        **about,
        "base": patch.base.facts,
        "origin": patch.origin.facts,
        "layers": layers,
        "details": dict(patch.details),
    }
    return tensors, {"patch": content}


def unpack(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Patch:
    """Return the patch that a file's content describes."""
    rows = {layer: (alpha, beta, rank) for layer, alpha, beta, rank, _ in content["layers"]}
    extension = {
        layer: Basis(tensors[f"{layer}.patch_alpha"].float(), tensors[f"{layer}.patch_beta"].float()) for layer in rows
    }
    sides = {layer: (rows[layer][0] + extra.rank[0], rows[layer][1] + extra.rank[1]) for layer, extra in extension.items()}
    sizes = [side * rows[layer][2] for layer, pair in sides.items() for side in pair]
    parts = iter((tensors["coefficients"].float() * unit_of(content["norm"])).split(sizes))
    coefficients = {
        layer: Coefficients(next(parts).reshape(pair[0], -1), next(parts).reshape(pair[1], -1)) for layer, pair in sides.items()
    }
    return Patch(
        **{key: content[key] for key in ("name", "kind", "trigger", "norm", "version", "details")},
        base=BaseIdentity.of(content["base"]),
        origin=Origin(**content["origin"]),
        known={layer: (alpha, beta) for layer, (alpha, beta, _) in rows.items()},
        extension=extension,
        coefficients=coefficients,
        kernels={layer: (kernel[0], kernel[1]) for layer, *_, kernel in content["layers"] if kernel},
    )
