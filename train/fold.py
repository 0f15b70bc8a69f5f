"""From what was trained to the file that holds it: merge, fine-tuning in the merged bases, and the report."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from flags import capacity_of, most_norm, rates_of, snr_of
from start import LOCK_SECONDS, Run, open_subspace
from tqdm import tqdm
from watch import forgetting, refuse_nan

from share_diffusion import storage
from share_diffusion.adapt import Adaptation, Learner, make_learner
from share_diffusion.attached import Attached
from share_diffusion.describe import describe
from share_diffusion.interruption import Interruption
from share_diffusion.learning import Denoiser, denoising_loss
from share_diffusion.patch import make_patch, write_patch
from share_diffusion.plan import lora_numbers
from share_diffusion.schedules import rate_factor
from share_diffusion.subspace import Subspace


def fold_in(run: Run, learner: Learner, losses: dict[str, Any]) -> tuple[Subspace, Subspace, bool]:
    """Write what was learned; return the subspace before and after, and whether a signal came while the file was written."""
    settings, subspace, facts = run.settings, run.subspace, about(run, losses["half_weight"])
    if settings.patch:
        merged = merge(run, subspace, learner, facts)
        patch = make_patch(subspace, run.recipe.name, learner.lora(), **facts)
        with Interruption() as interruption:
            write_patch(patch, settings.patch)
        return subspace, merged, interruption.wanted
    with storage.locked(run.file, timeout=LOCK_SECONDS):
        if run.file.exists() and storage.read_header(run.file).generation != subspace.generation:
            subspace = open_subspace(settings, run.pipeline, run.file, run.recipe, run.modules)
        merged = merge(run, subspace, learner, facts)
        if settings.finetune_steps:
            merged = finetune(run, merged)
        with Interruption() as interruption:
            merged = merged.save(run.file)
        return subspace, merged, interruption.wanted


def merge(run: Run, subspace: Subspace, learner: Learner, facts: dict[str, Any]) -> Subspace:
    """Return the subspace with the concept, and what `about` tells of it, folded in; ValueError where nothing was learned."""
    name, lora, settings = run.recipe.name, learner.lora(), run.settings
    if not lora.norm:
        raise ValueError(
            f"{name!r} has learned nothing: every number of its update is 0, and nothing is merged; raise {rates_of(settings)}"
        )
    return subspace.merge({name: lora}, capacity=capacity_of(settings), about={name: facts})


def about(run: Run, half_weight: float | None) -> dict[str, Any]:
    """Return what the file tells of the concept beside its coefficients."""
    details: dict[str, Any] = {"prompts": list(run.recipe.prompts)}
    if half_weight is not None:
        details["half_weight"] = half_weight
    if run.settings.license:
        details["license"] = run.settings.license
    return {"kind": run.recipe.kind, "trigger": run.recipe.trigger, "details": details}


def finetune(run: Run, subspace: Subspace) -> Subspace:
    """Train the newest concept's coefficients alone, in the merged and now frozen bases."""
    settings, concept, device = run.settings, subspace[run.recipe.name], run.accelerator.device
    chosen = {path: run.modules[path] for path in concept.coefficients}
    bases = {path: subspace.layers[path] for path in chosen}
    learner = make_learner(chosen, bases, Adaptation("coefficients", concept.pseudo_rank), {}, settings.seed)
    learner.start_from(concept.coefficients)
    learner.to(device)
    rate = settings.learning_rate / 4
    optimizer = torch.optim.AdamW(learner.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    with Attached(run.pipeline, sorted(chosen)) as attached:
        model = Denoiser(learner, run.pipeline, attached)
        for step in tqdm(range(settings.finetune_steps), desc="fine-tuning", unit="step"):
            optimizer.param_groups[0]["lr"] = rate * rate_factor("cosine", step, settings.finetune_steps, 0)
            drawn = run.draw(3_000_000_000 + step, whole=True)
            with run.accelerator.autocast():
                losses = denoising_loss(model, run.pipeline, run.pictures, drawn, device, *snr_of(settings))
            losses.mean().backward()
            norm = torch.nn.utils.clip_grad_norm_(learner.parameters(), most_norm(settings))
            refuse_nan(run, [(losses.detach(), drawn, run.pictures)], norm, step)
            optimizer.step()
            optimizer.zero_grad()
    return subspace.with_coefficients(run.recipe.name, learner.coefficients())


def report_of(run: Run, learner: Learner, losses: dict[str, Any], before: Subspace, merged: Subspace) -> dict[str, Any]:
    """Return everything that a finished run has done, as it is written to report.json."""
    settings = run.settings
    report: dict[str, Any] = {
        "concept": run.recipe.name,
        "settings": asdict(settings),
        "losses": losses,
        "retention": {
            "before": {name: concept.retention for name, concept in before.concepts.items()},
            "after": {name: concept.retention for name, concept in merged.concepts.items()},
        },
        "earlier": forgetting(before, merged),
        "trainables": learner.trainables,
        "lora_trainables": lora_numbers(run.modules, settings.rank),
    }
    if settings.patch:
        size = Path(settings.patch).stat().st_size
        report["patch"] = {"path": settings.patch, "basis_version": before.basis_version, "bytes": size}
    else:
        report["file"] = describe(merged, run.file)
    return report
