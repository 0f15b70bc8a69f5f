"""Weight space: how much of the concepts' updates a basis of k columns holds, however its columns were chosen.

Everything is closed form on the own LoRAs of one seed. Fits, for one layer with updates dW_i = U_i S_i V_i^T:

    joint      left vectors of all U_i S_i side by side, each over its concept's norm: each side for itself
    hooi       the same after three sweeps of higher-order orthogonal iteration (the library makes one): the best fit known
    unequal    the same without the norms
    raw        left vectors of the stacked factors as they come
    centred    of the stacked factors less their mean
    random     an orthonormal basis drawn from a seed: the null

Beside them `merged` is what a user gets: the library's own merge, one concept after another into bases capped at k columns,
with the energy that is then truly held of every original, and `stated` is the retention that its file states for it.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from share_diffusion.basis import random_basis, thin_svd
from share_diffusion.capacity import Capacity
from share_diffusion.lora import LoRA
from share_diffusion.subspace import Subspace
from stream.figures import energy_held

WIDTHS = (4, 8, 16, 24, 32)
Layer = Sequence[tuple[Tensor, Tensor]]  # (up (out, r), down (r, in)) of every concept
Sides = tuple[Tensor, Tensor]  # beta (out, m), alpha (in, m), strongest columns first


def left_vectors(stack: Tensor) -> Tensor:
    """Return left singular vectors, strongest first."""
    return torch.linalg.svd(stack, full_matrices=False)[0]


def joint(layer: Layer, norms: Sequence[float], k: int) -> Sides:
    """Fit on dW, every concept weighing the same."""
    parts = [thin_svd(up, down) for up, down in layer]
    beta = torch.cat([left * values / norm for (left, values, _), norm in zip(parts, norms, strict=True)], 1)
    alpha = torch.cat([right * values / norm for (_, values, right), norm in zip(parts, norms, strict=True)], 1)
    return left_vectors(beta), left_vectors(alpha)


def unequal(layer: Layer, norms: Sequence[float], k: int) -> Sides:
    """Fit on dW, loud concepts weighing more."""
    return joint(layer, [1.0] * len(norms), k)


def hooi(layer: Layer, norms: Sequence[float], k: int) -> Sides:
    """Fit on dW, then improve each side for the other in turn."""
    beta, alpha = (side[:, :k] for side in joint(layer, norms, k))
    updates = [(up.double() / norm, down.double()) for (up, down), norm in zip(layer, norms, strict=True)]
    for _ in range(3):
        beta = left_vectors(torch.cat([up @ (down @ alpha) for up, down in updates], 1))[:, :k]
        alpha = left_vectors(torch.cat([down.mT @ (up.mT @ beta) for up, down in updates], 1))[:, :k]
    return beta, alpha


def raw(layer: Layer, norms: Sequence[float], k: int, centred: bool = False) -> Sides:
    """Fit on the stacked factors, as the paper writes it."""
    stacks = torch.cat([up for up, _ in layer], 1).double(), torch.cat([down.mT for _, down in layer], 1).double()
    if centred:
        stacks = tuple(stack - stack.mean(1, keepdim=True) for stack in stacks)  # type: ignore[assignment]
    return left_vectors(stacks[0]), left_vectors(stacks[1])


def centred(layer: Layer, norms: Sequence[float], k: int) -> Sides:
    """Fit on the stacked factors less their mean, as the paper's code does."""
    return raw(layer, norms, k, centred=True)


def random(layer: Layer, norms: Sequence[float], k: int) -> Sides:
    """Draw a basis from a seed."""
    (up, down), most = layer[0], max(WIDTHS)
    return random_basis(up.shape[0], min(most, up.shape[0]), 1), random_basis(down.shape[1], min(most, down.shape[1]), 2)


MERGES = ("merged", "stated")
FITS: dict[str, Callable[[Layer, Sequence[float], int], Sides]] = {
    "joint": joint,
    "hooi": hooi,
    "unequal": unequal,
    "raw": raw,
    "centred": centred,
    "random": random,
}


def held(loras: Mapping[str, LoRA], fit: str, k: int) -> dict[str, float]:
    """Return the share of every concept's energy that bases of k columns hold."""
    norms = [lora.norm for lora in loras.values()]
    kept = dict.fromkeys(loras, 0.0)
    for path in next(iter(loras.values())).layers:
        layer = [(lora.layers[path].up, lora.layers[path].down) for lora in loras.values()]
        beta, alpha = (side[:, :k] for side in FITS[fit](layer, norms, k))
        for name, (up, down) in zip(loras, layer, strict=True):
            kept[name] += float(((beta.mT @ up.double()) @ (down.double() @ alpha)).square().sum())
    return {name: kept[name] / norm**2 for name, norm in zip(loras, norms, strict=True)}


def merged(loras: Mapping[str, LoRA], k: int) -> dict[str, tuple[float, float]]:
    """Return what the library's merge, one by one with a cap of k columns, holds of each concept, and what it states."""
    subspace = Subspace()
    for name, lora in loras.items():
        subspace = subspace.merge({name: lora}, capacity=Capacity(retain=None, rank=k))
    found = {}
    for name, lora in loras.items():
        lost, held_layers = 0.0, subspace.lora(name).layers
        for path, (up, down) in ((path, (entry.up.double(), entry.down.double())) for path, entry in lora.layers.items()):
            now = held_layers.get(path)
            left = up @ down if now is None else up @ down - now.up.double() @ now.down.double()
            lost += float(left.square().sum())
        found[name] = 1 - lost / lora.norm**2, subspace[name].retention
    return found


def tail(loras: Mapping[str, LoRA], k: int = 8) -> float:
    """Return how far, at worst over layers and sides, the loss of a rank-k fit is from its tail energy (Proposition 1).

    The error is ||S - B B^T S||^2 over the discarded singular values' squares, less 1; S are the stacked factors.
    """
    worst = 0.0
    for path in next(iter(loras.values())).layers:
        for stack in (
            torch.cat([lora.layers[path].up for lora in loras.values()], 1).double(),
            torch.cat([lora.layers[path].down.mT for lora in loras.values()], 1).double(),
        ):
            left, values, _ = torch.linalg.svd(stack, full_matrices=False)
            basis, discarded = left[:, :k], float(values[k:].square().sum())
            lost = float((stack - basis @ (basis.mT @ stack)).square().sum())
            if discarded > 1e-9 * float(values.square().sum()):
                worst = max(worst, abs(lost / discarded - 1))
    return worst


def similarity(loras: Mapping[str, LoRA], k: int = 8) -> list[tuple[int, float, float]]:
    """Return, after each concept, the overlap of the fitted bases with those of all: (concepts, input side, output side).

    Overlap is ||B_i^T B_T||^2 / k, the linear CKA of two orthonormal bases: 1 is the same span, k / side is chance.
    """
    names, found = list(loras), []
    paths = list(next(iter(loras.values())).layers)
    for count in range(1, len(names) + 1):
        shares: list[tuple[float, float]] = []
        for path in paths:
            sides = []
            for some in (names[:count], names):
                layer = [(loras[name].layers[path].up, loras[name].layers[path].down) for name in some]
                sides.append(joint(layer, [loras[name].norm for name in some], k))
            overlap = [float((now[:, :k].mT @ end[:, :k]).square().sum()) / k for now, end in zip(*sides, strict=True)]
            shares.append((overlap[1], overlap[0]))
        found.append((count, mean(share[0] for share in shares), mean(share[1] for share in shares)))
    return found


def measure(loras: Mapping[str, LoRA], file: Path) -> None:
    """Write every fit's shares, and the overlaps over the stream, as lines of a CSV."""
    part = file.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("what", "k", "concept", "value"))
        for fit in FITS:
            for k in WIDTHS:
                writer.writerows((fit, k, name, repr(share)) for name, share in held(loras, fit, k).items())
        for k in WIDTHS:
            both = merged(loras, k)
            writer.writerows(("merged", k, name, repr(held)) for name, (held, _) in both.items())
            writer.writerows(("stated", k, name, repr(stated)) for name, (_, stated) in both.items())
        writer.writerow(("tail", 8, "all", repr(tail(loras))))
        for count, alpha, beta in similarity(loras):
            writer.writerows((("overlap alpha", 8, count, repr(alpha)), ("overlap beta", 8, count, repr(beta))))
    part.replace(file)


@dataclass(frozen=True)
class Found:
    """What weights.csv says: shares held by (what, k) in the order of the concepts, overlaps by concepts so far, the tail."""

    shares: Mapping[tuple[str, int], list[float]]
    overlaps: Mapping[int, Mapping[str, float]]
    tail: float | None

    @property
    def beyond_the_bound(self) -> float | None:
        """By how much the merge loses more than the best joint fit at the same k, the largest difference over all widths.

        The joint SVD of both sides apart is not optimal for them together; iterating (`hooi`) improves it.
        """
        gaps = [
            max(mean(self.shares[fit, k]) for fit in ("joint", "hooi") if (fit, k) in self.shares) - mean(held)
            for (what, k), held in self.shares.items()
            if what == "merged"
        ]
        return max(gaps, default=None)

    @property
    def overstated(self) -> float | None:
        """By how much a stated retention is above what is truly held, the largest over all concepts and widths."""
        pairs = [
            (stated, true)
            for (what, k), held in self.shares.items()
            if what == "merged"
            for true, stated in zip(held, self.shares["stated", k], strict=True)
        ]
        return max((stated - true for stated, true in pairs), default=None)


def read(file: Path) -> Found | None:
    """Return what the CSV says, None where there is none."""
    if not file.exists():
        return None
    shares: dict[tuple[str, int], list[float]] = defaultdict(list)
    overlaps: dict[int, dict[str, float]] = defaultdict(dict)
    error = None
    with file.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            value = float(row["value"])
            if row["what"].startswith("overlap"):
                overlaps[int(row["concept"])][row["what"]] = value
            elif row["what"] == "tail":
                error = value
            else:
                shares[row["what"], int(row["k"])].append(value)
    return Found(dict(shares), dict(overlaps), error)


def section(found: Found | None, figure: Path) -> str:
    """Return the report's section and draw its figure; nothing where nothing was measured."""
    if found is None:
        return ""
    energy_held(found.shares, figure)
    lines = ["| fit | " + " | ".join(f"k = {k}" for k in WIDTHS) + " |", "|---|" + "---|" * len(WIDTHS)]
    for fit in (*FITS, *MERGES):
        if all((fit, k) in found.shares for k in WIDTHS):
            every = [found.shares[fit, k] for k in WIDTHS]
            lines.append(f"| {fit} | " + " | ".join(f"{1 - mean(some):.3f} / {1 - min(some):.3f}" for some in every) + " |")
    stream_lines = ["| concepts so far | input side | output side |", "|---|---|---|"]
    for count, pair in sorted(found.overlaps.items()):
        stream_lines.append(f"| {count} | {pair['overlap alpha']:.3f} | {pair['overlap beta']:.3f} |")
    return "\n".join(
        [
            "## Weight space",
            "",
            "Lost energy of the own LoRAs in bases of k columns a side (mean / worst concept). `merged` is the library's own",
            "merge, one concept after another with k as the cap, measured against the kept originals; `stated` is one less the",
            "retention that its file states:",
            "",
            *lines,
            "",
            f"![energy held against k]({figure.name})",
            "",
            "Overlap of the bases (k = 8) after so many concepts with those of all (the paper's Figures 1 and 5):",
            "",
            *stream_lines,
        ]
    )
