"""Learn one concept and merge it into the subspace file.

    accelerate launch train/concept.py --concept watercolor
    accelerate launch train/concept.py --concept mycat --kind subject \\
        --instance_data_dir photos/ --instance_prompt "a photo of mycat"

One run, top to bottom: find the concept and its pictures, load the frozen base and the subspace so far, train a few
coefficients, merge, write the file, draw a contact sheet, write a report.
The file changes in one step at the end; whatever happens before leaves every earlier concept as it was, and a stop that
comes later says that the concept is held.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from flags import ELSEWHERE, ConceptSettings, check, most_norm, snr_of
from fold import fold_in, report_of
from machines import accelerator_of, keeps_states
from room import less
from start import Run, parked, places, recipe_of, start, start_learner
from states import Beginning, begin, keep_state
from tqdm import tqdm
from watch import Seen, Watch, check_tracker, learned_enough, refuse_nan, write_whole

from share_diffusion.adapt import Learner
from share_diffusion.attached import Attached
from share_diffusion.base import base_name
from share_diffusion.drawing import save_png
from share_diffusion.interruption import Interruption
from share_diffusion.learning import Denoiser, denoising_loss
from share_diffusion.loudness import half_weight
from share_diffusion.memory import explained_end
from share_diffusion.models import family_of
from share_diffusion.models.texts import too_long
from share_diffusion.objective import Draw
from share_diffusion.plan import lora_numbers, plan, summary
from share_diffusion.preservation import Preservation
from share_diffusion.progress import ProgressFile
from share_diffusion.schedules import rate_factor
from share_diffusion.settings import parse
from share_diffusion.showcase import draw_base, draw_concepts, make_sheet


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; what the user can mend is one message and exit status 1."""
    words = "Learn one concept and merge it into the subspace file."
    settings = parse(ConceptSettings, argv, description=words, elsewhere=ELSEWHERE)
    progress = ProgressFile(None)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # it stops as Ctrl-C does
    try:
        told = settings.progress_file if os.environ.get("RANK", "0") == "0" else None  # one process of several tells
        progress = ProgressFile(Path(told) if told else None)
        learn(settings, progress)
    except (ValueError, OSError) as error:
        progress.tell(error=str(error))
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        why = str(stop) or "the subspace file is as it was. Go on with --resume_from_checkpoint latest"
        progress.tell(stopped=why)
        print(f"\nstopped; {why}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def learn(settings: ConceptSettings, progress: ProgressFile | None = None) -> dict[str, Any]:
    """Learn the concept and return the report (empty on all but the main process, and after a dry run).

    A KeyboardInterrupt that comes when the file is written already says so.
    """
    settings = check(settings)
    with explained_end(less(settings)):
        return learn_checked(settings, progress)


def learn_checked(settings: ConceptSettings, progress: ProgressFile | None = None) -> dict[str, Any]:
    """Learn the concept of settings that were found sound; memory may end anywhere in it."""
    started = time.perf_counter()
    check_tracker(settings.report_to)
    folder, file = places(settings, recipe_of(settings))
    torch.use_deterministic_algorithms(settings.deterministic)
    accelerator = accelerator_of(settings, folder)
    run = start(settings, accelerator)
    recipe, pipeline, subspace = run.recipe, run.pipeline, run.subspace
    with Attached(pipeline, sorted(run.modules)) as attached:
        learner, seconds = start_learner(run, attached)
    accelerator.print(plan_of(run, learner, seconds))
    state = begin(run, learner)
    if settings.dry_run:
        return {}
    for place in (folder, Path(settings.patch or file).parent):
        place.mkdir(parents=True, exist_ok=True)
    shown = settings.sheet and accelerator.is_main_process
    untouched, before = [], {}
    if shown:
        with for_sheet():
            parked(run, away=False)
            untouched, before = draw_base(pipeline, recipe), draw_concepts(pipeline, subspace, "pictures before")

    with Attached(pipeline, sorted({*run.modules, *subspace.layers})) as attached:
        losses = train(run, learner, attached, state, progress or ProgressFile(None))
    if not accelerator.is_main_process:
        accelerator.wait_for_everyone()
        return {}
    subspace, merged, stopped = fold_in(run, learner, losses)
    held = f"{recipe.name} is learned all the same: {settings.patch or file} holds it"
    try:
        report = report_of(run, learner, losses, subspace, merged)
        report["seconds"] = round(time.perf_counter() - started, 1)
        write_whole(folder / "report.json", json.dumps(report, indent=1, sort_keys=True) + "\n")
        if stopped:
            raise KeyboardInterrupt
        accelerator.wait_for_everyone()
        if shown:
            with for_sheet():
                parked(run, away=False)
                after = draw_concepts(pipeline, merged, "pictures after")
            sheet = make_sheet(recipe, base_name(settings.pretrained_model_name_or_path), untouched, before, after)
            save_png(sheet, folder / "sheet.png")
    except KeyboardInterrupt:
        raise KeyboardInterrupt(held) from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; {held}") from error
    results = [folder / "sheet.png", folder / "report.json"] if shown else [folder / "report.json"]
    accelerator.print(summary(recipe.name, report, file, results))
    size = Path(settings.patch or file).stat().st_size
    if progress is not None:
        progress.tell(done=True, concept=recipe.name, retention=report["retention"]["after"], file_bytes=size)
    return report


@contextmanager
def for_sheet() -> Iterator[None]:
    """Add how to do without the sheet to whatever stops its pictures."""
    try:
        with explained_end("drawing takes more than training"):
            yield
    except ValueError as error:
        raise ValueError(f"{error}; --no-sheet draws no pictures") from error


def plan_of(run: Run, learner: Learner, seconds: float) -> str:
    """Return what the run is going to do, in words."""
    settings, lora = run.settings, (run.settings.rank, lora_numbers(run.modules, run.settings.rank))
    effective = run.batch * settings.gradient_accumulation_steps
    steps = run.steps, effective, seconds * settings.gradient_accumulation_steps
    cut = len(too_long(family_of(run.pipeline), run.pipeline, list(run.pictures.captions)))
    base, held = settings.pretrained_model_name_or_path, list(run.subspace.concepts)
    file = Path(settings.patch or run.file)
    text = plan(run.recipe, run.dataset, run.pipeline, base, held, learner, run.adaptation, lora, steps, cut, file)
    sizes = sorted({size: run.pictures.buckets.count(size) for size in run.pictures.buckets}.items())
    buckets = ", ".join(f"{count} at {width} x {height}" for (height, width), count in sizes)
    epochs = run.steps * effective / len(run.pictures)
    more = f"  {'sizes':<10}{buckets}; {len(run.pictures.latents[0])} cut(s) of each; {epochs:.1f} passes\n"
    if run.class_pictures is not None:
        more += f"  {'class':<10}{len(run.class_pictures)} pictures, weight {settings.prior_loss_weight:g}\n"
    return text.rstrip() + "\n" + more


def train(run: Run, learner: Learner, attached: Attached, beginning: Beginning, progress: ProgressFile) -> dict[str, Any]:
    """Train the learner; every random number is a function of (seed, step). Returns the losses."""
    settings, accelerator = run.settings, run.accelerator
    average, rates, first = beginning.average, beginning.rates, beginning.first
    history, recorded = beginning.history, beginning.recorded
    model, optimizer = accelerator.prepare(Denoiser(learner, run.pipeline, attached), beginning.optimizer)
    keeper = None
    if settings.preserve_weight:
        keeper = Preservation(run.pipeline, run.subspace, attached, run.pictures, run.recipe.trigger, settings.seed)
    watch = Watch(run, learner, attached, average, progress)
    start_loss = watch.loss(0.0)
    if settings.validation_steps and not first:
        watch.validate(0, recorded)
    parked(run, away=True)
    bar = tqdm(range(first, run.steps), initial=first, total=run.steps, desc="learning", unit="step",
               disable=not accelerator.is_main_process)  # fmt: skip
    skipped = 0
    done = learned_enough(recorded, settings.early_stop)  # a state may have been taken at the step that was the last
    with Interruption() as interruption:
        for step in () if done else bar:
            factor = rate_factor(settings.lr_scheduler, step, run.steps, run.warmup, settings.lr_num_cycles, settings.lr_power)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            total, seen = torch.zeros((), device=accelerator.device), []
            for micro in range(settings.gradient_accumulation_steps):
                index = step * settings.gradient_accumulation_steps + micro
                drawn = run.draw(index)
                with accelerator.accumulate(model):
                    losses = denoising_loss(model, run.pipeline, run.pictures, drawn, accelerator.device, *snr_of(settings))
                    accelerator.backward(losses.mean())
                    total += losses.mean().detach() / settings.gradient_accumulation_steps
                    seen += [(losses.detach(), drawn, run.pictures), *further_losses(run, model, keeper, drawn, index)]
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(model.parameters(), most_norm(settings))
                        skipped = refuse_nan(run, seen, norm, step, skipped)
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
            stop = agreed(accelerator, interruption.wanted)
            due = (step + 1) % settings.checkpointing_steps == 0 or stop
            if due and accelerator.is_main_process and keeps_states(accelerator):
                keep_state(run, step + 1, learner, optimizer, average, history, recorded)
            if stop:
                bar.close()
                kept = keeps_states(accelerator)
                raise KeyboardInterrupt("" if kept else "the subspace file is as it was; no state was kept to go on from")
            if done:
                accelerator.print(f"learned after {step + 1} steps: the loss at fixed noise gets no better")
                break
    if average is not None:
        average.copy_to(learner)
    end_loss = watch.loss()
    half = half_weight(watch.loss, start_loss, end_loss)
    for tracker in accelerator.trackers:  # `end_training` would end the processes' group as well
        tracker.finish()
    losses = {"fixed_noise_before": start_loss, "fixed_noise_after": end_loss, "half_weight": half, "steps": history}
    return losses | ({"validations": recorded} if recorded else {})


def agreed(accelerator: Accelerator, wanted: bool) -> bool:
    """Whether any process was asked to stop: all leave after the same step, or one would wait for the others for ever."""
    if accelerator.num_processes == 1:
        return wanted
    return bool(accelerator.reduce(torch.tensor(float(wanted), device=accelerator.device), "sum"))


def further_losses(run: Run, model: torch.nn.Module, keeper: Preservation | None, drawn: Draw, index: int) -> list[Seen]:
    """Add the gradients of the class's pictures and of what is to be preserved; return the class's losses."""
    settings, accelerator, seen = run.settings, run.accelerator, []
    if run.class_pictures is not None and settings.prior_loss_weight:
        of_class = run.draw_class(index)
        losses = denoising_loss(model, run.pipeline, run.class_pictures, of_class, accelerator.device, *snr_of(settings))
        accelerator.backward(settings.prior_loss_weight * losses.mean())
        seen.append((losses.detach(), of_class, run.class_pictures))
    if keeper is not None:
        with accelerator.autocast():  # the model casts by itself, the frozen one that it is held against does not
            held = keeper.loss(model, drawn, index, accelerator.device).mean()
        accelerator.backward(settings.preserve_weight * held)
    return seen


if __name__ == "__main__":
    sys.exit(main())
