"""The subspace: shared bases per layer and every concept's coefficients; `fit`, `merge`, `drop`, `lora`, `blend`.

A `Subspace` is a value: `merge` and `drop` return a new one and leave the old one as it was, so that nothing that goes
wrong in between can damage a concept. `share_diffusion.file` reads and writes it as one file.

The bases have an origin. With `adapters` every column is learned from updates and stored. With `random` or `weights`
the first columns come from a seed or from the base's own weights and cost no bytes; with `activations` they were measured on
the base once and are stored in four bits a number (`principal.py`). These columns never change; learned ones extend them.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from share_diffusion.basis import Basis, Coefficients, random_basis, reconstruct, weight_basis
from share_diffusion.capacity import Capacity
from share_diffusion.concept import Concept, check_name, unknown_concept
from share_diffusion.lora import Factors, LoRA
from share_diffusion.merge import Merged, merge_updates, squared
from share_diffusion.principal import Principal

ORIGINS = ("adapters", "random", "weights", "activations")
POINT = (1, 1)  # such a convolution has a linear layer's matrix, and files of products (LoHa, LoKr) do not tell the two apart
INCOMPLETE = "this subspace was loaded without its base's weights, only to be looked at; load it with them"
Weights = Mapping[str, Tensor]  # layer -> the base's own weight, (out, in) or (out, in, kh, kw)


@dataclass(frozen=True)
class Origin:
    """Where a subspace's first columns come from: `rank` of them a side, drawn from `seed` or taken from the weights.

    With `activations` they are `principal`, `rank` a side on average, and layers that were not measured have those of the seed.
    Two such origins are the same where their columns have one `digest`; without `principal` it is all that is known of them.
    """

    kind: str = "adapters"
    rank: int = 0
    seed: int = 0
    digest: str = ""
    principal: Principal | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in ORIGINS:
            raise ValueError(f"basis is {self.kind!r}; it is one of {', '.join(ORIGINS)}")
        if self.rank < 0:
            raise ValueError(f"derived_rank is {self.rank}; it is 0 or more")
        if (self.kind == "adapters") != (self.rank == 0):
            raise ValueError(f"a basis of origin {self.kind} cannot have {self.rank} derived columns")
        if self.principal is not None:
            object.__setattr__(self, "digest", self.principal.digest)

    @property
    def facts(self) -> dict[str, Any]:
        """What a file's metadata tells of it."""
        known = {"kind": self.kind, "rank": self.rank, "seed": self.seed}
        return {**known, "digest": self.digest} if self.kind == "activations" else known

    @property
    def bytes(self) -> int:
        """What the columns that were measured take in a file; those of a seed or the weights take nothing."""
        return self.principal.bytes if self.principal is not None else 0

    @property
    def eight_bits(self) -> bool:
        """Whether new concepts are stored in 8 bits: where columns are there from the start, a file is mostly coefficients."""
        return self.kind != "adapters"

    def columns(self, layer: str, shape: tuple[int, int]) -> tuple[int, int]:
        """Return how many columns that never change a layer of shape (out, in) has in (alpha, beta)."""
        if self.principal is not None and layer in self.principal.sides:
            return self.principal.widths(layer)
        most = min(self.rank, *shape)
        return most, most

    def derive(self, layer: str, shape: tuple[int, int], weights: Weights | None = None) -> Basis:
        """Return the part of a layer's basis that never changes; `weights` is needed where they are the origin."""
        if self.kind == "activations" and self.principal is None:
            raise ValueError(
                f"the columns measured on the base (digest {self.digest or 'unknown'}) are not here; they lie in the "
                "file that was learned against"
            )
        if self.principal is not None and layer in self.principal.sides:
            return self.principal.basis(layer)
        rank = self.columns(layer, shape)[0]
        if self.kind == "adapters":
            return Basis(torch.zeros(shape[1], 0), torch.zeros(shape[0], 0))
        if self.kind == "weights":
            if weights is None or layer not in weights:
                raise ValueError(f"the basis of {layer} comes from the base's weights; load the file together with its base")
            if weights[layer].device.type == "meta":
                raise ValueError(
                    f"the basis of {layer} comes from the base's weights, which are not in memory; load the base whole"
                )
            weight = weights[layer].detach().cpu().flatten(1)
            if tuple(weight.shape) != tuple(shape):
                raise ValueError(
                    f"the base's weight of {layer} is {tuple(weight.shape)}, not {tuple(shape)}; it is another base"
                )
            basis = weight_basis(weight, rank)
            return Basis(basis.alpha.float(), basis.beta.float())
        return Basis(
            alpha=random_basis(shape[1], rank, layer_seed(self.seed, layer, "alpha")).float(),
            beta=random_basis(shape[0], rank, layer_seed(self.seed, layer, "beta")).float(),
        )


def layer_seed(seed: int, layer: str, side: str) -> int:
    """Return a seed of its own for one side of one layer."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{layer}/{side}".encode()).digest()[:7], "big")


@dataclass(frozen=True)
class BaseIdentity:
    """Which frozen base a subspace belongs to: a name for people, a digest of its architecture, a few of its weights.

    The weights are compared with a tolerance, so that the same base in half precision is the same base. `blocks` is how many
    double and single blocks a transformer has, by which block groups are told (`models/blocks.py`).
    """

    name: str = ""
    architecture: str = ""
    weights: tuple[float, ...] = ()
    blocks: tuple[int, ...] = ()

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> BaseIdentity:
        """Return the identity that a file's metadata tells."""
        lists = {key: tuple(facts[key]) for key in ("weights", "blocks") if key in facts}
        return cls(**{**facts, **lists})

    @property
    def facts(self) -> dict[str, Any]:
        """What a file's metadata tells of it."""
        known = {"name": self.name, "architecture": self.architecture, "weights": list(self.weights)}
        return {**known, "blocks": list(self.blocks)} if self.blocks else known

    def mismatch(self, other: BaseIdentity) -> str | None:
        """Return why `other` is not this base, or None; what is not known of either side matches everything."""
        if self.architecture and other.architecture and self.architecture != other.architecture:
            return f"the subspace belongs to {self.name!r}, and {other.name} has another architecture"
        pairs = zip(self.weights, other.weights, strict=False)
        if any(abs(ours - theirs) > 0.01 * abs(ours) + 1e-4 for ours, theirs in pairs):
            return f"the subspace belongs to {self.name!r}, and {other.name} has other weights"
        return None

    def is_rounded(self, other: BaseIdentity) -> bool:
        """Whether the weights of one are the other's rounded to more than half precision's last bit, as bfloat16 does."""
        pairs = zip(self.weights, other.weights, strict=False)
        return any(abs(ours - theirs) > 1e-3 * abs(ours) + 1e-7 for ours, theirs in pairs)


@dataclass(frozen=True, eq=False)
class Subspace:
    """Shared bases and the concepts in them.

    `layers` maps a layer's path to its `Basis`, `kernels` a convolution's path to (kh, kw), `concepts` a name to its
    `Concept`, in the order in which they were learned. `file` is where it was read from or written to, symbolic links
    followed, and `generation` counts the writes of that file.
    """

    base: BaseIdentity = field(default_factory=BaseIdentity)
    origin: Origin = field(default_factory=Origin)
    layers: Mapping[str, Basis] = field(default_factory=dict)
    kernels: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    concepts: Mapping[str, Concept] = field(default_factory=dict)
    generation: int | None = None
    file: Path | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)  # unknown metadata of a file, kept on the round trip
    complete: bool = True  # False where the derived columns are missing: good for looking, not for drawing

    @classmethod
    def fit(
        cls,
        loras: Mapping[str, LoRA],
        *,
        base: BaseIdentity | None = None,
        basis: str = "adapters",
        basis_seed: int = 0,
        derived_rank: int = 0,
        weights: Weights | None = None,
        capacity: Capacity | None = None,
        pseudo_rank: int | None = None,
    ) -> Subspace:
        """Return the first subspace of one or more LoRAs (concept name -> LoRA).

        Equals merging them all at once into an empty subspace. `basis` random or weights starts from `derived_rank`
        columns that are not stored; `capacity` says how much is kept (see `Capacity`).
        """
        if basis == "activations":
            raise ValueError(
                "basis 'activations' is measured on the base, which is not here; begin a file with share-diffusion measure "
                "and merge the LoRAs into it"
            )
        empty = cls(base=base or BaseIdentity(), origin=Origin(basis, derived_rank, basis_seed if basis == "random" else 0))
        return empty.merge(loras, weights=weights, capacity=capacity, pseudo_rank=pseudo_rank)

    def merge(
        self,
        loras: Mapping[str, LoRA],
        *,
        weights: Weights | None = None,
        capacity: Capacity | None = None,
        pseudo_rank: int | None = None,
        about: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Subspace:
        """Return a subspace that holds the new concepts as well; `about` gives each one's kind, trigger and details.

        Earlier concepts stay the same bits unless a cap or budget forces a truncation (see `merge.py`).
        Raises ValueError where a name is taken, a value is not finite or a shape does not fit, all problems at once.
        """
        refuse(self.merge_problems(loras, capacity or Capacity(), pseudo_rank))
        loras = {normal(name): lora.detached() for name, lora in loras.items()}
        about = {normal(name): facts for name, facts in (about or {}).items()}
        entries = {layer: entry for lora in loras.values() for layer, entry in lora.layers.items()}
        kernels = {layer: entry.kernel for lora in loras.values() for layer, entry in lora.layers.items() if entry.kernel}
        grown = self.cover({layer: (entry.shape, kernels.get(layer)) for layer, entry in entries.items()}, weights)
        updates = {name: lora.layers for name, lora in loras.items()}
        norms = {name: lora.norm for name, lora in loras.items()}
        limits = capacity or Capacity()
        merged = merge_updates(
            grown.layers, grown.fixed, grown.concepts, updates, norms, limits, pseudo_rank, self.origin.bytes, about
        )
        concepts = grown.join(merged, norms, about)
        for name, lora in loras.items():
            if lora.lost:  # what reading the file left out is as much gone as what the bases do not hold
                whole = norms[name] / (1 - lora.lost) ** 0.5
                concepts[name] = replace(concepts[name], norm=whole, retention=concepts[name].retention * (1 - lora.lost))
        return replace(grown, layers=merged.layers, concepts=concepts)

    def merge_problems(self, loras: Mapping[str, LoRA], capacity: Capacity, pseudo_rank: int | None) -> list[str]:
        """Return everything that forbids a merge."""
        problems = [] if loras else ["there is no LoRA to merge; give at least one"]
        problems += [INCOMPLETE] * (not self.complete)
        if pseudo_rank is not None and pseudo_rank < 1:
            problems.append(f"pseudo_rank is {pseudo_rank}; at least 1 is needed")
        most = max([0, *(columns for pair in self.fixed.values() for columns in pair)])
        if capacity.rank is not None and capacity.rank < (most or self.origin.rank):
            problems.append(
                f"basis_rank is {capacity.rank}, below the {most or self.origin.rank} columns that never change; raise it"
            )
        if capacity.budget is not None and capacity.budget <= self.origin.bytes:
            problems.append(
                f"budget is {capacity.budget:,} bytes; the columns measured on the base take {self.origin.bytes:,} alone; "
                "raise it"
            )
        taken = {name.casefold(): name for name in self.concepts}
        shapes = {layer: (basis.beta.shape[0], basis.alpha.shape[0]) for layer, basis in self.layers.items()}
        kernels = {layer: self.kernels.get(layer) for layer in self.layers}
        for name, lora in loras.items():
            try:
                folded = check_name(name).casefold()
            except ValueError as error:
                problems.append(str(error))
                continue
            if folded in taken:
                problems.append(f"concept {name!r} is already there as {taken[folded]!r}; drop it first or choose another name")
            taken[folded] = name
            for layer, factors in lora.layers.items():
                if not (torch.isfinite(factors.up).all() and torch.isfinite(factors.down).all()):
                    problems.append(f"concept {name!r}: {layer} holds NaN or infinite values; train it again or leave it out")
                expected, kernel = shapes.setdefault(layer, factors.shape), kernels.setdefault(layer, factors.kernel)
                if factors.shape != expected:
                    problems.append(
                        f"concept {name!r}: {layer} is {factors.shape}, the subspace has {expected}; is it for another base?"
                    )
                elif (factors.kernel or POINT) != (kernel or POINT):
                    problems.append(
                        f"concept {name!r}: {layer} has kernel {factors.kernel}, the subspace {kernel}; is it for another base?"
                    )
        return problems

    def cover(
        self, shapes: Mapping[str, tuple[tuple[int, int], tuple[int, int] | None]], weights: Weights | None = None
    ) -> Subspace:
        """Return the subspace with a basis for every layer given as ((out, in), kernel or None), derived or empty.

        A layer that is there keeps its kernel; where none was known, the one given is taken.
        """
        bases = {
            layer: self.origin.derive(layer, shape, weights) for layer, (shape, _) in shapes.items() if layer not in self.layers
        }
        kernels = {layer: kernel for layer, (_, kernel) in shapes.items() if kernel}
        return replace(
            self,
            layers=dict(sorted({**self.layers, **bases}.items())),
            kernels=dict(sorted({**kernels, **self.kernels}.items())),
        )

    def with_coefficients(self, name: str, coefficients: Mapping[str, Coefficients]) -> Subspace:
        """Return the subspace with a concept's coefficients replaced, as after fine-tuning them; it is then held whole."""
        norm = sum(float(squared(entry)) for entry in coefficients.values()) ** 0.5
        changed = replace(self[name], coefficients=dict(coefficients), norm=norm, retention=1.0)
        return replace(self, concepts={**self.concepts, name: changed})

    def join(self, merged: Merged, norms: Mapping[str, float], about: Mapping[str, Mapping[str, Any]]) -> dict[str, Concept]:
        """Return held and new concepts as one mapping, oldest first."""
        new = {
            name: Concept(name=name, coefficients=coefficients, norm=norms[name], retention=retention, **about.get(name, {}))
            for name, (coefficients, retention) in merged.new.items()
        }
        return {**merged.held, **{concept.name: concept for concept in new.values()}}

    def drop(self, name: str) -> Subspace:
        """Return the subspace without a concept; learned columns that no other concept uses go with it.

        So do layers that no other concept changes, unless columns were measured on the base for them.
        """
        gone = self[name].name
        concepts = {key: concept for key, concept in self.concepts.items() if key != gone}
        used = {layer: self.used_columns(layer, concepts) for layer in self.layers}
        measured = self.origin.principal.sides if self.origin.principal is not None else ()
        needed = {*measured, *(layer for concept in concepts.values() for layer in concept.coefficients)}
        layers = {
            layer: Basis(basis.alpha[:, : used[layer][0]], basis.beta[:, : used[layer][1]])
            for layer, basis in self.layers.items()
            if layer in needed
        }
        kernels = {layer: kernel for layer, kernel in self.kernels.items() if layer in layers}
        return replace(self, layers=layers, kernels=kernels, concepts=concepts)

    def rename(self, old: str, new: str) -> Subspace:
        """Return the subspace with a concept under another name, in its old place."""
        concept, folded = self[old], check_name(new).casefold()
        if taken := [name for name in self.concepts if name.casefold() == folded and name != concept.name]:
            raise ValueError(f"concept {new!r} is already there as {taken[0]!r}; drop it first or choose another name")
        renamed = replace(concept, name=new)
        entries = [renamed if name == concept.name else entry for name, entry in self.concepts.items()]
        return replace(self, concepts={entry.name: entry for entry in entries})

    def used_columns(self, layer: str, concepts: Mapping[str, Concept]) -> tuple[int, int]:
        """Return how many leading columns of a layer are still needed by the concepts, derived ones included."""
        entries = [concept.coefficients[layer] for concept in concepts.values() if layer in concept.coefficients]
        fixed = self.fixed[layer]
        return (
            max([fixed[0], *(entry.alpha.shape[0] for entry in entries)]),
            max([fixed[1], *(entry.beta.shape[0] for entry in entries)]),
        )

    def __getitem__(self, name: str) -> Concept:
        """Return a concept; an unknown name is a ValueError that lists the known ones."""
        name = normal(name)
        if name not in self.concepts:
            raise ValueError(unknown_concept(name, self.concepts))
        return self.concepts[name]

    @property
    def fixed(self) -> dict[str, tuple[int, int]]:
        """Columns of every layer that never change, as (alpha, beta)."""
        return {
            layer: self.origin.columns(layer, (basis.beta.shape[0], basis.alpha.shape[0]))
            for layer, basis in self.layers.items()
        }

    @property
    def basis_version(self) -> str:
        """A digest of the bases: equal exactly when coefficients learned against one are right in the other."""
        digest = hashlib.sha256(repr(self.origin).encode())
        fixed = self.fixed
        for layer, basis in sorted(self.layers.items()):
            digest.update(repr((layer, basis.alpha.shape[0], basis.beta.shape[0], basis.rank)).encode())
            for side, derived in zip((basis.alpha, basis.beta), fixed[layer], strict=True):
                digest.update(side[:, derived:].to(torch.float16).numpy().tobytes())
        return digest.hexdigest()[:12]

    def lora(self, name: str) -> LoRA:
        """Return a concept as an ordinary LoRA: up = beta @ eps_beta, down = (alpha @ eps_alpha).T."""
        refuse([INCOMPLETE] * (not self.complete))
        layers = {}
        for layer, entry in self[name].coefficients.items():
            up, down = reconstruct(self.layers[layer], entry)
            layers[layer] = Factors(up, down, self.kernels.get(layer))
        return LoRA(layers, {})

    def blend(self, weights: Mapping[str, float]) -> dict[str, Tensor]:
        """Return the core sum_i w_i C_i of every layer that a concept of non-zero weight changes, (k', k)."""
        cores: dict[str, Tensor] = {}
        for name, weight in weights.items():
            coefficients = self[name].coefficients
            for layer, entry in coefficients.items() if weight else ():
                core = weight * entry.core(self.layers[layer].rank)
                cores[layer] = cores[layer] + core if layer in cores else core
        return cores

    def overlap(self) -> Tensor:
        """Return the cosines of the concepts' updates, (concepts, concepts): <dW_i, dW_j> / (||dW_i|| ||dW_j||)."""
        concepts = list(self.concepts.values())
        products = torch.zeros(len(concepts), len(concepts), dtype=torch.float64)
        for layer, basis in self.layers.items():
            cores = [entry.coefficients[layer].core(basis.rank) if layer in entry.coefficients else None for entry in concepts]
            empty = torch.zeros(basis.rank[1], basis.rank[0])
            if cores:
                rows = torch.stack([(empty if core is None else core).flatten().double() for core in cores])
                products += rows @ rows.T
        norms = products.diagonal().sqrt().clamp_min(1e-30)
        return products / norms[:, None] / norms[None]

    @classmethod
    def load(cls, path: str | os.PathLike[str], weights: Weights | None = None) -> Subspace:
        """Read a subspace file; `weights` (of the base) is needed only where the basis comes from them."""
        from share_diffusion.file import load

        return load(path, weights)

    def save(self, path: str | os.PathLike[str], *, replace: bool = False) -> Subspace:
        """Write the file, whole or not at all, and return the subspace with this file and its new generation.

        Raises ConflictError where the file has changed since it was read, or is gone, or is another one than was read and
        exists already, unless `replace`.
        """
        from share_diffusion.file import save

        return save(self, path, replace=replace)


def normal(name: str) -> str:
    """Return a name in the one spelling of its accents that concepts are stored under."""
    return unicodedata.normalize("NFC", name)


def refuse(problems: list[str]) -> None:
    """Raise ValueError with all problems, if there are any."""
    if problems:
        raise ValueError("; ".join(problems))


__all__ = ["BaseIdentity", "Capacity", "Coefficients", "Concept", "Origin", "Subspace"]
