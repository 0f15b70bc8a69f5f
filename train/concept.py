"""Learn one concept and merge it into the subspace file.

    accelerate launch train/concept.py --concept watercolor
    accelerate launch train/concept.py --concept mycat --kind subject \\
        --instance_data_dir photos/ --instance_prompt "a photo of mycat"

One run, top to bottom: find the concept and its pictures, load the frozen base and the subspace so far, read new
directions off the gradient, train a few coefficients, merge, write the file, draw a contact sheet, write a report.
The file changes in one step at the end; whatever happens before leaves every earlier concept as it was.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from flags import ELSEWHERE, ConceptSettings, capacity_of, check, comparable
from start import Run, open_subspace, parked, places, recipe_of, start, start_learner
from tqdm import tqdm
from watch import Watch, check_tracker, forgetting, learned_enough, write_whole

from share_diffusion import storage
from share_diffusion.adapt import Adaptation, Learner, make_learner
from share_diffusion.attached import Attached
from share_diffusion.base import base_name
from share_diffusion.checkpoint import find_state, save_state
from share_diffusion.describe import describe
from share_diffusion.drawing import save_png
from share_diffusion.interruption import Interruption
from share_diffusion.learning import Denoiser, bad_pictures, denoising_loss
from share_diffusion.models import family_of
from share_diffusion.models.texts import too_long
from share_diffusion.objective import Draw
from share_diffusion.optimizers import Average, make_optimizer
from share_diffusion.patch import make_patch, write_patch
from share_diffusion.plan import lora_numbers, plan, summary
from share_diffusion.preservation import Preservation
from share_diffusion.progress import ProgressFile
from share_diffusion.schedules import rate_factor
from share_diffusion.settings import parse
from share_diffusion.showcase import draw_base, draw_concepts, make_sheet
from share_diffusion.subspace import Subspace

LOCK_SECONDS = 600.0  # another run may be fine-tuning after its merge
MOST_SKIPPED = 20  # steps in a row that fp16's loss scale may overflow


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; what the user can mend is one message and exit status 1."""
    words = "Learn one concept and merge it into the subspace file."
    settings = parse(ConceptSettings, argv, description=words, elsewhere=ELSEWHERE)
    progress = ProgressFile(Path(settings.progress_file) if settings.progress_file else None)
    try:
        learn(settings, progress)
    except ValueError as error:
        progress.tell(error=str(error))
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the subspace file is as it was. Go on with --resume_from_checkpoint latest", file=sys.stderr)
        return 130
    return 0


def learn(settings: ConceptSettings, progress: ProgressFile | None = None) -> dict[str, Any]:
    """Learn the concept and return the report (empty on all but the main process, and after a dry run)."""
    started = time.perf_counter()
    settings = check(settings)
    check_tracker(settings.report_to)
    folder, file = places(settings, recipe_of(settings))
    torch.use_deterministic_algorithms(settings.deterministic)
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        cpu=settings.cpu,
        log_with=None if settings.report_to == "none" else settings.report_to,
        project_dir=folder / settings.logging_dir,
    )
    run = start(settings, accelerator)
    recipe, pipeline, subspace = run.recipe, run.pipeline, run.subspace
    with Attached(pipeline, sorted(run.modules)) as attached:
        learner, seconds = start_learner(run, attached)
    accelerator.print(plan_of(run, learner, seconds))
    if settings.dry_run:
        return {}
    for place in (folder, Path(settings.patch or file).parent):
        place.mkdir(parents=True, exist_ok=True)
    shown = settings.sheet and accelerator.is_main_process
    if shown:
        parked(run, away=False)
    untouched = draw_base(pipeline, recipe) if shown else []
    before = draw_concepts(pipeline, subspace, "pictures before") if shown else {}

    with Attached(pipeline, sorted({*run.modules, *subspace.layers})) as attached:
        losses = train(run, learner, attached, progress or ProgressFile(None))
    if not accelerator.is_main_process:
        accelerator.wait_for_everyone()
        return {}
    if settings.patch:
        merged = merge(run, subspace, learner)
        patch = make_patch(subspace, recipe.name, learner.lora(), **about(run))
        write_patch(patch, settings.patch)
    else:
        with storage.locked(file, timeout=LOCK_SECONDS):
            if file.exists() and storage.read_header(file).generation != subspace.generation:
                subspace = open_subspace(settings, pipeline, file, recipe, run.modules)
            merged = merge(run, subspace, learner)
            if settings.finetune_steps:
                merged = finetune(run, merged)
            merged = merged.save(file)
    accelerator.wait_for_everyone()
    if shown:
        parked(run, away=False)
        after = draw_concepts(pipeline, merged, "pictures after")
        sheet = make_sheet(recipe, base_name(settings.pretrained_model_name_or_path), untouched, before, after)
        save_png(sheet, folder / "sheet.png")
    report = report_of(run, learner, losses, subspace, merged)
    report["seconds"] = round(time.perf_counter() - started, 1)
    write_whole(folder / "report.json", json.dumps(report, indent=1, sort_keys=True) + "\n")
    results = [folder / "sheet.png", folder / "report.json"] if shown else [folder / "report.json"]
    accelerator.print(summary(recipe.name, report, file, results))
    size = Path(settings.patch or file).stat().st_size
    if progress is not None:
        progress.tell(done=True, concept=recipe.name, retention=report["retention"]["after"], file_bytes=size)
    return report


def plan_of(run: Run, learner: Learner, seconds: float) -> str:
    """Return what the run is going to do, in words."""
    settings, lora = run.settings, (run.settings.rank, lora_numbers(run.modules, run.settings.rank))
    effective = run.batch * settings.gradient_accumulation_steps
    steps = run.steps, effective, seconds * settings.gradient_accumulation_steps
    cut = len(too_long(family_of(run.pipeline), run.pipeline, list(run.pictures.captions)))
    base, held = settings.pretrained_model_name_or_path, list(run.subspace.concepts)
    file = Path(settings.patch or run.file)
    text = plan(run.recipe, run.dataset, run.pipeline, base, held, learner, settings.adaptation, lora, steps, cut, file)
    sizes = sorted({size: run.pictures.buckets.count(size) for size in run.pictures.buckets}.items())
    buckets = ", ".join(f"{count} at {width} x {height}" for (height, width), count in sizes)
    epochs = run.steps * effective / len(run.pictures)
    more = f"  {'sizes':<10}{buckets}; {len(run.pictures.latents[0])} cut(s) of each; {epochs:.1f} passes\n"
    if run.class_pictures is not None:
        more += f"  {'class':<10}{len(run.class_pictures)} pictures, weight {settings.prior_loss_weight:g}\n"
    return text.rstrip() + "\n" + more


def train(run: Run, learner: Learner, attached: Attached, progress: ProgressFile) -> dict[str, Any]:
    """Train the learner; every random number is a function of (seed, step). Returns the losses."""
    settings, accelerator = run.settings, run.accelerator
    groups = learner.parameter_groups(settings.learning_rate, settings.factor_learning_rate, settings.text_encoder_lr)
    optimizer = make_optimizer(settings.optimizer, groups, settings.optimizer_args)
    average = Average(learner, settings.ema_decay) if settings.ema_decay else None
    rates = [group["lr"] for group in optimizer.param_groups]
    first, history, recorded = resume(run, learner, optimizer, average)
    model, optimizer = accelerator.prepare(Denoiser(learner, run.pipeline, attached), optimizer)
    keeper = None
    if settings.preserve_weight:
        keeper = Preservation(run.pipeline, run.subspace, attached, run.pictures, run.recipe.trigger, settings.seed)
    watch = Watch(run, learner, attached, average, progress)
    start_loss = watch.loss(active=False)
    if settings.validation_steps and not first:
        watch.validate(0, recorded)
    parked(run, away=True)
    bar = tqdm(range(first, run.steps), initial=first, total=run.steps, desc="learning", unit="step",
               disable=not accelerator.is_main_process)  # fmt: skip
    skipped = 0
    with Interruption() as interruption:
        for step in bar:
            factor = rate_factor(
                settings.lr_scheduler, step, run.steps, settings.lr_warmup_steps, settings.lr_num_cycles, settings.lr_power
            )
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            total = torch.zeros((), device=accelerator.device)
            for micro in range(settings.gradient_accumulation_steps):
                index = step * settings.gradient_accumulation_steps + micro
                drawn = run.draw(index)
                with accelerator.accumulate(model):
                    losses = denoising_loss(model, run.pipeline, run.pictures, drawn, accelerator.device, *snr(settings))
                    accelerator.backward(losses.mean())
                    total += losses.mean().detach() / settings.gradient_accumulation_steps
                    further_losses(run, model, keeper, drawn, index)
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
                        skipped = refuse_nan(run, losses, norm, drawn, step, skipped)
                        optimizer.step()
                        optimizer.zero_grad()
            if average is not None:
                average.update(learner)
            history.append(round(float(total), 6))
            bar.set_postfix(loss=f"{sum(history[-20:]) / len(history[-20:]):.4f}")
            watch.step(step + 1, history[-1], optimizer.param_groups[0]["lr"])
            if settings.validation_steps and (step + 1) % settings.validation_steps == 0:
                watch.validate(step + 1, recorded)
            done = learned_enough(recorded, settings.early_stop)
            due = (step + 1) % settings.checkpointing_steps == 0 or interruption.wanted
            if due and accelerator.is_main_process:
                keep_state(run, step + 1, learner, optimizer, average, history, recorded)
            if interruption.wanted:
                bar.close()
                raise KeyboardInterrupt
            if done:
                accelerator.print(f"learned after {step + 1} steps: the loss at fixed noise gets no better")
                break
    if average is not None:
        average.copy_to(learner)
    end_loss = watch.loss(active=True)
    if settings.report_to != "none":
        accelerator.end_training()
    losses = {"fixed_noise_before": start_loss, "fixed_noise_after": end_loss, "steps": history}
    return losses | ({"validations": recorded} if recorded else {})


def snr(settings: ConceptSettings) -> tuple[float, ...]:
    """Return the min-SNR gamma, where there is one."""
    return () if settings.snr_gamma is None else (settings.snr_gamma,)


def further_losses(run: Run, model: torch.nn.Module, keeper: Preservation | None, drawn: Draw, index: int) -> None:
    """Add the gradients of the class's pictures and of what is to be preserved."""
    settings, accelerator = run.settings, run.accelerator
    if run.class_pictures is not None and settings.prior_loss_weight:
        of_class = run.draw_class(index)
        losses = denoising_loss(model, run.pipeline, run.class_pictures, of_class, accelerator.device, *snr(settings))
        accelerator.backward(settings.prior_loss_weight * losses.mean())
    if keeper is not None:
        accelerator.backward(settings.preserve_weight * keeper.loss(model, drawn, index, accelerator.device).mean())


def facts_of(run: Run) -> dict[str, Any]:
    """Return what a checkpoint must share with the run that goes on from it."""
    return {
        "data": run.data,
        "basis_version": run.subspace.basis_version,
        "settings": comparable(run.settings),
    }


def keep_state(
    run: Run,
    step: int,
    learner: Learner,
    optimizer: Any,
    average: Average | None,
    history: list[float],
    recorded: list[tuple[int, float]],
) -> None:
    """Write a checkpoint."""
    tensors: dict[str, Any] = {"learner": learner.state_dict(), "optimizer": optimizer.state_dict(), "losses": history}
    tensors |= {"average": average.state_dict()} if average is not None else {}
    tensors |= {"validations": recorded} if recorded else {}
    if run.accelerator.scaler is not None:
        tensors["scaler"] = run.accelerator.scaler.state_dict()
    save_state(run.folder, step, tensors, facts_of(run), run.settings.checkpoints_total_limit)


def resume(
    run: Run, learner: Learner, optimizer: torch.optim.Optimizer, average: Average | None
) -> tuple[int, list[float], list[tuple[int, float]]]:
    """Restore a checkpoint where one is asked for; refuses one taken with other data or settings."""
    settings, accelerator = run.settings, run.accelerator
    if settings.resume_from_checkpoint is None:
        return 0, [], []
    automatic = settings.resume_from_checkpoint == "auto"
    state, notes = find_state(run.folder, "latest" if automatic else settings.resume_from_checkpoint)
    for note in notes:
        accelerator.print(f"passed over: {note}")
    if state is None:
        if not automatic:
            accelerator.print(f"no checkpoint in {run.folder}; starting at step 0")
        return 0, [], []
    facts = facts_of(run)
    ours, theirs = facts["settings"], state.facts["settings"]
    changes = [f"{key} was {theirs.get(key)!r}, now {ours[key]!r}" for key in ours if ours[key] != theirs.get(key)]
    changes += ["the pictures or captions have changed"] if facts["data"] != state.facts["data"] else []
    changes += ["the subspace file has changed"] if facts["basis_version"] != state.facts["basis_version"] else []
    if changes and automatic:
        accelerator.print(f"the checkpoint of step {state.step} is not this run's ({'; '.join(changes)}); starting at step 0")
        return 0, [], []
    if changes:
        raise ValueError(
            f"cannot resume at step {state.step}: {'; '.join(changes)}. Set them back, or start again without resuming"
        )
    learner.load_state_dict(state.tensors["learner"])
    optimizer.load_state_dict(state.tensors["optimizer"])
    if average is not None:
        average.load_state_dict(state.tensors["average"])
    if accelerator.scaler is not None and "scaler" in state.tensors:
        accelerator.scaler.load_state_dict(state.tensors["scaler"])
    accelerator.print(f"resuming after step {state.step}")
    return state.step, state.tensors["losses"], list(state.tensors.get("validations", []))


def refuse_nan(run: Run, losses: torch.Tensor, norm: Any, drawn: Draw, step: int, skipped: int) -> int:
    """Stop before the optimizer step when the loss or the gradient is not finite; return how many steps fp16 has skipped."""
    sound_loss = bool(torch.isfinite(losses).all())
    if sound_loss and (norm is None or bool(torch.isfinite(torch.as_tensor(norm)))):
        return 0
    if sound_loss and run.accelerator.scaler is not None and skipped < MOST_SKIPPED:
        return skipped + 1  # the loss scale was too high: the scaler passes over the step and lowers it
    settings = run.settings
    names = ", ".join(bad_pictures(losses, drawn, run.pictures))
    raise ValueError(
        f"the {'gradient' if sound_loss else 'loss'} is not finite at step {step} (pictures: {names}); nothing was changed by "
        f"this step and nothing is merged. Look at these pictures, or lower --learning_rate ({settings.learning_rate:g}) or "
        f"--factor_learning_rate ({settings.factor_learning_rate:g})"
        + ("" if settings.mixed_precision != "fp16" else ", or use --mixed_precision bf16")
    )


def merge(run: Run, subspace: Subspace, learner: Learner) -> Subspace:
    """Return the subspace with the concept folded in."""
    name = run.recipe.name
    return subspace.merge({name: learner.lora()}, capacity=capacity_of(run.settings), about={name: about(run)})


def about(run: Run) -> dict[str, Any]:
    """Return what the file tells of the concept beside its coefficients."""
    licence = {"license": run.settings.license} if run.settings.license else {}
    return {"kind": run.recipe.kind, "trigger": run.recipe.trigger, "details": {"prompts": list(run.recipe.prompts), **licence}}


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
            drawn = run.draw(3_000_000_000 + step)
            losses = denoising_loss(model, run.pipeline, run.pictures, drawn, device)
            losses.mean().backward()
            norm = torch.nn.utils.clip_grad_norm_(learner.parameters(), settings.max_grad_norm)
            refuse_nan(run, losses, norm, drawn, step, MOST_SKIPPED)
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


if __name__ == "__main__":
    sys.exit(main())
