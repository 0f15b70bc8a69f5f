"""Fold new updates into bases that already hold concepts: the incremental merge.

For every layer the old basis is extended by orthonormal directions E of what the new updates have outside it, and all
concepts are seen as small cores in the frame [basis, E]. Then one of two things happens:

- *growth*, the rule: the frame's strongest new columns are kept until every new concept holds the asked share of its
  energy. Old columns stay as they are, so every earlier concept is the same to the last bit.
- *truncation*, where a cap on the columns or a byte budget leaves no room: the principal axes of all concepts' cores, each
  concept weighing 1 / ||dW||, say how many columns each side keeps, and one sweep of orthogonal iteration (HOOI) turns the
  kept ones to each other. The paper's merge (arXiv 2602.06043, section 3.3) rotates and cuts as well, but fits stacked
  factors and each side for itself. Every concept is re-expressed, and what each of them loses is counted.

The bases cost one QR and one small SVD per layer whatever number of concepts is held; with truncation each held
concept is multiplied by one (k, k) rotation. Columns of a derived basis (`fixed`) are never rotated: they are not stored.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from share_diffusion.basis import (
    RANK_TOLERANCE,
    WORK,
    Basis,
    Coefficients,
    factor_core,
    orthonormalised,
    outside,
    pad_columns,
    principal_directions,
    rotate,
    thin_svd,
)
from share_diffusion.capacity import Candidates, Capacity, Widths, cheapest, choose, dearest, prices
from share_diffusion.concept import Concept
from share_diffusion.lora import Factors
from share_diffusion.price import pricing

ACCURACY = 1e-7  # a retention this close to the asked one has reached it
# Ten LoRAs of the benchmark merged one by one into 4 columns lose .508 on average without a sweep, .484 with one, .477 with
# three; what was just learned loses .344, .399, .434. More sweeps go on trading the newest concept for what is held already.
SWEEPS = 1


@dataclass(frozen=True)
class Frame:
    """One layer's old basis and the directions that new updates would add to it, with the new updates' cores.

    A basis that was rounded to half precision is not quite orthonormal, and energies measured in it would be wrong:
    cores are those in `axes`, where [basis, E] = axes @ triangles, which keeps the span of every leading block.
    """

    basis: Basis
    fixed: tuple[int, int]  # derived columns of (alpha, beta), which stay
    alpha: Tensor  # (in, m) new directions, strongest first
    beta: Tensor  # (out, m')
    candidates: Candidates
    axes: Basis  # (in, k + m), (out, k' + m')
    triangles: tuple[Tensor, Tensor]
    cores: Mapping[str, Tensor]  # new concept -> (k' + m', k + m)


@dataclass(frozen=True)
class Merged:
    """The result of a merge: new bases, held concepts re-expressed, new concepts' coefficients with what they keep."""

    layers: dict[str, Basis]
    held: dict[str, Concept]
    new: dict[str, tuple[dict[str, Coefficients], float]]  # name -> (coefficients, retention)
    truncated: tuple[str, ...]  # layers whose columns were rotated and cut


def merge_updates(
    layers: Mapping[str, Basis],
    fixed: Mapping[str, tuple[int, int]],
    held: Mapping[str, Concept],
    updates: Mapping[str, Mapping[str, Factors]],
    norms: Mapping[str, float],
    capacity: Capacity,
    pseudo_rank: int | None = None,
    fixed_bytes: int = 0,
    about: Mapping[str, Mapping[str, Any]] | None = None,
) -> Merged:
    """Fold `updates` (concept -> layer -> factors, of Frobenius norm `norms`) into the bases within the capacity.

    `fixed_bytes` is what the `fixed` columns take of the budget, `about` what the file will tell of the new concepts.
    Raises ValueError for a budget that leaves a new concept nothing, with the least that does not.
    """
    if pseudo_rank is not None:
        updates = {concept: strongest_parts(update, pseudo_rank) for concept, update in updates.items()}
    frames = make_frames(layers, fixed, updates, norms)
    widths = {name: basis.rank for name, basis in layers.items()} | grow(frames, norms, capacity)
    ranks = {
        concept: {name: min(pseudo_rank or factors.rank, factors.rank) for name, factors in update.items()}
        for concept, update in updates.items()
    }

    def priced(rotated: set[str]) -> Callable[[Widths], int]:
        return pricing(layers, fixed, held, ranks, rotated, about, capacity.budget or 0)

    def cost(chosen: Widths, rotated: set[str]) -> int:
        return fixed_bytes + priced(rotated)(chosen)

    tight = over_rank(frames, widths, capacity.rank)
    if capacity.budget is not None and cost(widths, tight) > capacity.budget:
        tight = set(frames)
    axes = {name: principal_axes(name, frames[name], held, norms) for name in sorted(tight)}
    price = priced(tight) if tight and capacity.budget is not None else lambda _: 0
    widths = narrow(frames, axes, widths, capacity, lambda chosen: fixed_bytes + price(chosen))
    rotations = {
        name: turned_to_each_other(name, frames[name], held, norms, (alpha, beta), widths[name])
        for name, (alpha, beta, _) in axes.items()
    }
    widths = widths | {name: (alpha.shape[1], beta.shape[1]) for name, (alpha, beta) in rotations.items()}
    bases = {**layers}
    for name, frame in frames.items():
        bases[name] = cut(frame, widths[name], rotations.get(name))
    return Merged(
        layers=bases,
        held={name: re_express(concept, frames, rotations) for name, concept in held.items()},
        new={name: express(name, frames, widths, rotations, norms[name], ranks[name]) for name in updates},
        truncated=tuple(sorted(rotations)),
    )


def strongest_parts(update: Mapping[str, Factors], rank: int) -> dict[str, Factors]:
    """Return an update of which every layer keeps its `rank` largest singular values; one of no larger rank as it is."""
    parts = {}
    for name, factors in update.items():
        parts[name] = factors
        if factors.rank > rank:
            left, values, right = thin_svd(factors.up, factors.down)
            parts[name] = Factors(left[:, :rank] * values[:rank], right[:, :rank].mT, factors.kernel)
    return parts


def make_frames(
    layers: Mapping[str, Basis],
    fixed: Mapping[str, tuple[int, int]],
    updates: Mapping[str, Mapping[str, Factors]],
    norms: Mapping[str, float],
) -> dict[str, Frame]:
    """Return the frame of every layer that a new update touches; layers of equal shape are worked on together."""
    groups: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name in sorted({layer for update in updates.values() for layer in update}):
        groups[layers[name].beta.shape[0], layers[name].alpha.shape[0]].append(name)
    frames: dict[str, Frame] = {}
    for shape, names in groups.items():
        frames |= group_frames(shape, names, layers, fixed, updates, norms)
    return frames


def stack(matrices: list[Tensor], columns: int) -> Tensor:
    """Return matrices of equal height as one batch, zero columns added up to `columns`."""
    return torch.stack([pad_columns(matrix.to(WORK), columns) for matrix in matrices])


def stack_update(update: Mapping[str, Factors], names: list[str], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return one concept's factors over layers of equal shape, (L, out, r) and (L, in, r); an absent layer is zero."""
    rank = max((update[name].rank for name in names if name in update), default=0)
    none = (torch.zeros(shape[0], 0), torch.zeros(shape[1], 0))
    pairs = [(update[name].up, update[name].down.mT) if name in update else none for name in names]
    return stack([up for up, _ in pairs], rank), stack([down for _, down in pairs], rank)


def group_frames(
    shape: tuple[int, int],
    names: list[str],
    layers: Mapping[str, Basis],
    fixed: Mapping[str, tuple[int, int]],
    updates: Mapping[str, Mapping[str, Factors]],
    norms: Mapping[str, float],
) -> dict[str, Frame]:
    """Return the frames of layers of one shape: batched thin SVDs, residuals and principal directions."""
    alpha = stack([layers[name].alpha for name in names], max(layers[name].rank[0] for name in names))
    beta = stack([layers[name].beta for name in names], max(layers[name].rank[1] for name in names))
    factors = {concept: stack_update(update, names, shape) for concept, update in updates.items()}
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    for concept, (up, down) in factors.items():
        left, values, right = thin_svd(up, down.mT)
        weighed = values / norms[concept] if norms[concept] else torch.zeros_like(values)
        sides[0].append(right * weighed[:, None])
        sides[1].append(left * weighed[:, None])
    extra_alpha, energy_alpha = new_directions(alpha, torch.cat(sides[0], dim=-1))
    extra_beta, energy_beta = new_directions(beta, torch.cat(sides[1], dim=-1))
    frames = {}
    for index, name in enumerate(names):
        keep_alpha, keep_beta = int((energy_alpha[index] > 0).sum()), int((energy_beta[index] > 0).sum())
        new_alpha, new_beta = extra_alpha[index, :, :keep_alpha], extra_beta[index, :, :keep_beta]
        axes_alpha, triangle_alpha = orthonormalised(torch.cat([layers[name].alpha.to(WORK), new_alpha], dim=1))
        axes_beta, triangle_beta = orthonormalised(torch.cat([layers[name].beta.to(WORK), new_beta], dim=1))
        frames[name] = Frame(
            basis=layers[name],
            fixed=fixed.get(name, (0, 0)),
            alpha=new_alpha,
            beta=new_beta,
            candidates=Candidates(energy_alpha[index, :keep_alpha], energy_beta[index, :keep_beta], (shape[1], shape[0])),
            axes=Basis(axes_alpha, axes_beta),
            triangles=(triangle_alpha, triangle_beta),
            cores={
                concept: (axes_beta.mT @ up[index]) @ (axes_alpha.mT @ down[index]).mT
                for concept, (up, down) in factors.items()
                if name in updates[concept]
            },
        )
    return frames


def new_directions(basis: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return orthonormal directions of what the vectors have outside the basis, strongest first, with their energies."""
    scale = vectors.square().sum((-2, -1)).sqrt()
    return principal_directions(outside(basis, vectors), scale)


def grow(frames: Mapping[str, Frame], norms: Mapping[str, float], capacity: Capacity) -> Widths:
    """Return the whole widths (old + new columns) that keep the asked share of every new concept at the least cost."""
    candidates = {name: frame.candidates for name, frame in frames.items()}
    tables = {name: cumulative(frame) for name, frame in frames.items()}

    def kept_enough(price: float) -> bool:
        widths = with_old(frames, choose(candidates, price))
        asked = (capacity.retain or 0) - ACCURACY
        return all(kept(concept, tables, widths) >= asked * norm**2 for concept, norm in norms.items())

    price = 0.0 if capacity.retain is None else dearest(prices(candidates), kept_enough)
    return with_old(frames, choose(candidates, price))


def with_old(frames: Mapping[str, Frame], extra: Widths) -> Widths:
    """Return the whole widths of layers that gain `extra` columns."""
    return {
        name: (frame.basis.rank[0] + extra[name][0], frame.basis.rank[1] + extra[name][1]) for name, frame in frames.items()
    }


def cumulative(frame: Frame) -> dict[str, Tensor]:
    """Return, for each new concept, the energy held by every leading block of its core, (k' + m' + 1, k + m + 1)."""
    return {
        concept: torch.nn.functional.pad(core.square().cumsum(0).cumsum(1), (1, 0, 1, 0))
        for concept, core in frame.cores.items()
    }


def kept(concept: str, tables: Mapping[str, Mapping[str, Tensor]], widths: Widths) -> float:
    """Return how much energy a new concept keeps at these widths."""
    return sum(float(table[concept][widths[name][1], widths[name][0]]) for name, table in tables.items() if concept in table)


def over_rank(frames: Mapping[str, Frame], widths: Widths, rank: int | None) -> set[str]:
    """Return the layers that would have more columns on a side than the cap allows."""
    return set() if rank is None else {name for name in frames if max(widths[name]) > rank}


def narrow(
    frames: Mapping[str, Frame],
    axes: Mapping[str, tuple[Tensor, Tensor, Candidates]],
    widths: Widths,
    capacity: Capacity,
    cost: Callable[[Widths], int],
) -> Widths:
    """Return widths in which the rotated layers keep only as many principal axes as cap and budget allow.

    Raises ValueError where the budget leaves a new concept no column to stand on.
    """
    candidates = {name: candidate for name, (_, _, candidate) in axes.items()}
    cap = {name: learned_cap(frames[name], capacity.rank) for name in axes}

    def spend(price: float) -> Widths:
        chosen = choose(candidates, price, cap)
        derived = {name: frames[name].fixed for name in chosen}
        return widths | {name: (derived[name][0] + a, derived[name][1] + b) for name, (a, b) in chosen.items()}

    def affordable(price: float) -> bool:
        return capacity.budget is None or cost(spend(price)) <= capacity.budget

    def stands(price: float) -> bool:
        chosen = spend(price)
        standing = [frame.cores for name, frame in frames.items() if min(chosen[name]) > 0]
        changed = {concept for frame in frames.values() for concept, core in frame.cores.items() if core.any()}
        return all(any(concept in cores for cores in standing) for concept in changed)

    if not axes:
        return widths
    options = prices(candidates)
    if capacity.budget is not None and (least := cost(spend(dearest(options, stands)))) > capacity.budget:
        raise ValueError(
            f"budget is {capacity.budget:,} bytes; with {', '.join(new_names(frames))} in it the file takes {least:,} at "
            "least; raise it"
        )
    return spend(cheapest(options, affordable))


def new_names(frames: Mapping[str, Frame]) -> list[str]:
    """Return the names of the new concepts."""
    return sorted({concept for frame in frames.values() for concept in frame.cores})


def learned_cap(frame: Frame, rank: int | None) -> tuple[int, int]:
    """Return how many learned columns of (alpha, beta) the cap leaves beside the derived ones."""
    if rank is None:
        return frame.alpha.shape[0], frame.beta.shape[0]
    return max(rank - frame.fixed[0], 0), max(rank - frame.fixed[1], 0)


def principal_axes(
    name: str, frame: Frame, held: Mapping[str, Concept], norms: Mapping[str, float]
) -> tuple[Tensor, Tensor, Candidates]:
    """Return the rotations of a frame to the principal axes of all concepts in it, derived columns left alone."""
    cores = relative_cores(name, frame, held, norms)
    alpha, energy_alpha = axes_of(moment([(core.alpha, core.beta) for core in cores]), frame.fixed[0])
    beta, energy_beta = axes_of(moment([(core.beta, core.alpha) for core in cores]), frame.fixed[1])
    costs = frame.basis.alpha.shape[0], frame.basis.beta.shape[0]
    return alpha, beta, Candidates(energy_alpha, energy_beta, costs)


def turned_to_each_other(
    name: str,
    frame: Frame,
    held: Mapping[str, Concept],
    norms: Mapping[str, float],
    start: tuple[Tensor, Tensor],
    width: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Return the axes of both sides, at most (k, width[0]) and (k', width[1]), after SWEEPS of orthogonal iteration (HOOI).

    The principal axes of each side are the best for that side with all of the other; here each side in turn takes the best
    axes for what the other has kept (De Lathauwer, De Moor and Vandewalle 2000), so that the energy held in this merge
    never falls. An axis that holds nothing of what the other side has kept is left out.
    """
    cores = relative_cores(name, frame, held, norms)
    alpha, beta = start[0][:, : width[0]].clone(), start[1][:, : width[1]].clone()
    for _ in range(SWEEPS):
        beta = leading(moment([(core.beta, alpha.mT @ core.alpha) for core in cores]), frame.fixed[1], width[1])
        alpha = leading(moment([(core.alpha, beta.mT @ core.beta) for core in cores]), frame.fixed[0], width[0])
    return alpha, beta


def leading(seen: Tensor, fixed: int, width: int) -> Tensor:
    """Return the first `fixed` axes of a moment and the strongest of the rest that hold anything, `width` at most."""
    rotation, energies = axes_of(seen, fixed)
    return rotation[:, : min(width, fixed + int((energies > 0).sum()))].clone()


def relative_cores(name: str, frame: Frame, held: Mapping[str, Concept], norms: Mapping[str, float]) -> list[Coefficients]:
    """Return every concept's core in a frame, over the concept's norm; the held ones in batches of equal rank.

    They are made a layer at a time, and again for the sweeps: kept for all layers, hundreds of concepts would fill the memory.
    """
    identity = torch.eye(frame.axes.rank[0], dtype=WORK)
    cores = [Coefficients(identity, core / max(norms[concept], 1e-30)) for concept, core in frame.cores.items()]
    ranks: dict[int, list[Coefficients]] = defaultdict(list)
    for concept in held.values():
        if name in concept.coefficients:
            entry = in_axes(concept.coefficients[name], frame)
            ranks[entry.pseudo_rank].append(Coefficients(entry.alpha, entry.beta / max(concept.norm, 1e-30)))
    for entries in ranks.values():
        alpha, beta = (torch.stack([getattr(entry, side) for entry in entries]) for side in ("alpha", "beta"))
        cores.append(Coefficients(alpha, beta))
    return cores


def moment(factors: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the sum of (near far^T)(near far^T)^T over all factors near (.., k, p), far (.., w, p) and their batches."""
    total = torch.zeros(factors[0][0].shape[-2], factors[0][0].shape[-2], dtype=WORK)
    for near, far in factors:
        if far.shape[-2] <= far.shape[-1]:
            whole = near @ far.mT
            total += torch.einsum("...iw,...jw->ij", whole, whole)
        else:
            total += torch.einsum("...ip,...jp->ij", near @ (far.mT @ far), near)
    return total


def in_axes(entry: Coefficients, frame: Frame) -> Coefficients:
    """Return a held concept's coefficients in the frame's axes."""
    return rotate(entry, frame.triangles[0].mT, frame.triangles[1].mT)


def axes_of(moment: Tensor, fixed: int) -> tuple[Tensor, Tensor]:
    """Return the rotation (k, k) that keeps the first `fixed` axes and sorts the rest by energy, and those energies."""
    values, vectors = torch.linalg.eigh(moment[fixed:, fixed:])
    values = torch.where(values > RANK_TOLERANCE**2 * values.sum(), values, 0)
    rotation = torch.block_diag(torch.eye(fixed, dtype=WORK), vectors.flip(-1))
    return rotation, values.flip(-1)


def cut(frame: Frame, width: tuple[int, int], rotation: tuple[Tensor, Tensor] | None) -> Basis:
    """Return the layer's new basis; without a rotation the old columns stay the same bits."""
    if rotation is None:
        extra = width[0] - frame.basis.rank[0], width[1] - frame.basis.rank[1]
        if extra == (0, 0):
            return frame.basis
        return Basis(
            alpha=torch.cat([frame.basis.alpha, frame.alpha[:, : extra[0]].to(frame.basis.alpha)], dim=1),
            beta=torch.cat([frame.basis.beta, frame.beta[:, : extra[1]].to(frame.basis.beta)], dim=1),
        )
    turned = (
        (frame.axes.alpha @ rotation[0]).to(frame.basis.alpha),
        (frame.axes.beta @ rotation[1]).to(frame.basis.beta),
    )
    fixed = frame.fixed
    return Basis(
        alpha=torch.cat([frame.basis.alpha[:, : fixed[0]], turned[0][:, fixed[0] :]], dim=1),
        beta=torch.cat([frame.basis.beta[:, : fixed[1]], turned[1][:, fixed[1] :]], dim=1),
    )


def re_express(concept: Concept, frames: Mapping[str, Frame], rotations: Mapping[str, tuple[Tensor, Tensor]]) -> Concept:
    """Return a held concept in the new bases, its retention lowered by what the truncation may have cost it.

    Two losses at different times need not be orthogonal, so their norms add (triangle inequality): the stored retention
    is a lower bound of the true one.
    """
    touched = {name: in_axes(entry, frames[name]) for name, entry in concept.coefficients.items() if name in rotations}
    if not touched:
        return concept
    moved = {name: rotate(entry, *rotations[name]) for name, entry in touched.items()}
    loss = sum(float(squared(entry) - squared(moved[name])) for name, entry in touched.items())
    lost = (1 - concept.retention) ** 0.5 + (max(loss, 0.0) ** 0.5) / max(concept.norm, 1e-30)
    coefficients = {}
    for name, entry in concept.coefficients.items():
        if name not in moved:
            coefficients[name] = entry
        elif moved[name].alpha.shape[0] and moved[name].beta.shape[0]:  # else its columns are all gone, and it holds nothing
            coefficients[name] = Coefficients(moved[name].alpha.float(), moved[name].beta.float())
    return Concept(
        concept.name, coefficients, concept.norm, max(0.0, 1 - lost**2), concept.kind, concept.trigger, concept.details
    )


def squared(entry: Coefficients) -> Tensor:
    """Return ||core||_F^2 of coefficients without forming the core."""
    alpha, beta = entry.alpha.to(WORK), entry.beta.to(WORK)
    return ((beta.mT @ beta) * (alpha.mT @ alpha)).sum()


def express(
    concept: str,
    frames: Mapping[str, Frame],
    widths: Widths,
    rotations: Mapping[str, tuple[Tensor, Tensor]],
    norm: float,
    ranks: Mapping[str, int],
) -> tuple[dict[str, Coefficients], float]:
    """Return a new concept's coefficients in the final bases and the share of its energy that they hold."""
    coefficients: dict[str, Coefficients] = {}
    if not norm:
        return coefficients, 1.0
    total = 0.0
    for name, frame in frames.items():
        if concept not in frame.cores:
            continue
        core = frame.cores[concept]
        if name in rotations:
            core = rotations[name][1].mT @ core @ rotations[name][0]
        core = core[: widths[name][1], : widths[name][0]]
        entry = factor_core(core, min(ranks[name], *core.shape))
        present = int((entry.alpha.square().sum(0) > RANK_TOLERANCE * norm).sum())
        entry = Coefficients(entry.alpha[:, :present], entry.beta[:, :present])
        total += float(squared(entry))
        if name not in rotations:
            entry = in_frame(entry, frame)
        if present:
            coefficients[name] = Coefficients(entry.alpha.float(), entry.beta.float())
    return coefficients, min(1.0, total / norm**2)


def in_frame(entry: Coefficients, frame: Frame) -> Coefficients:
    """Return coefficients in the leading axes as coefficients in the leading columns of [basis, E]."""
    alpha, beta = (
        torch.linalg.solve_triangular(triangle[: len(side), : len(side)], side, upper=True)
        for triangle, side in zip(frame.triangles, (entry.alpha, entry.beta), strict=True)
    )
    return Coefficients(alpha, beta)
