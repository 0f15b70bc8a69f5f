"""What can be seen of a run while it goes on: losses, samples of this and every earlier concept, when it has learned enough."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from flags import rates_of
from start import Run, parked

from share_diffusion.adapt import Learner
from share_diffusion.attached import Attached
from share_diffusion.base import base_name
from share_diffusion.drawing import generate, save_png
from share_diffusion.layer import weighted
from share_diffusion.learning import Frozen, bad_pictures, fixed_noise_loss
from share_diffusion.objective import Draw
from share_diffusion.optimizers import Average
from share_diffusion.picture_set import PictureSet
from share_diffusion.preservation import concept_updates
from share_diffusion.progress import ProgressFile
from share_diffusion.sheet import Row, contact_sheet
from share_diffusion.showcase import COLUMNS, drawn_concepts
from share_diffusion.subspace import Subspace

FIXED = 4  # batches of fixed noise
MOST_SKIPPED = 20  # steps in a row that fp16's loss scale may overflow
Seen = tuple[torch.Tensor, Draw, PictureSet]  # losses (batch), their draw, and the pictures that it is of
BETTER = 0.99  # a loss below this share of the best so far is progress


def check_tracker(name: str) -> None:
    """Raise ValueError where a tracker is not installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ValueError(f"--report_to {name} needs {name}, which is not installed: pip install {name}; or --report_to none")


class Watch:
    """Tells and draws how a run goes; asks nothing of the random numbers of the steps."""

    def __init__(self, run: Run, learner: Learner, attached: Attached, average: Average | None, progress: ProgressFile) -> None:
        self.run, self.learner, self.attached, self.average = run, learner, attached, average
        self.progress = progress
        self.fixed = [run.draw_plain(2_000_000_000 + index) for index in range(FIXED)]
        if run.settings.report_to != "none":
            run.accelerator.init_trackers(f"share-{run.recipe.name}")

    def loss(self, weight: float = 1.0) -> float:
        """Return the loss at fixed noise, with the concept as it stands at a weight."""
        before = self.average.copy_to(self.learner) if self.average and weight else {}
        with torch.no_grad():
            self.attached.set(weighted(self.learner.updates(), weight))
        run = self.run
        value = fixed_noise_loss(Frozen(run.pipeline), run.pipeline, run.pictures, self.fixed, run.accelerator.device)
        self.attached.set({})
        restore(self.learner, before)
        whole: Any = run.accelerator.reduce(torch.tensor(value, device=run.accelerator.device), "mean")
        return float(whole) if run.accelerator.num_processes > 1 else value

    def step(self, step: int, loss: float, rate: float) -> None:
        """Tell of a step that was done."""
        self.progress.tell(step=step, steps=self.run.steps, loss=loss)
        if self.run.settings.report_to != "none":
            self.run.accelerator.log({"loss": loss, "learning_rate": rate}, step=step)

    def validate(self, step: int, recorded: list[tuple[int, float]]) -> None:
        """Measure the loss at fixed noise and, in the main process, draw what is known."""
        recorded.append((step, round(self.loss(), 6)))
        if self.run.settings.report_to != "none":
            self.run.accelerator.log({"fixed_noise_loss": recorded[-1][1]}, step=step)
        if self.run.accelerator.is_main_process:
            self.sample(step)
        self.run.accelerator.wait_for_everyone()

    def sample(self, step: int) -> None:
        """Draw this concept and every earlier one, as `generate` draws them, on one sheet; and one picture by itself."""
        run = self.run
        before = self.average.copy_to(self.learner) if self.average else {}
        parked(run, away=False)
        with torch.no_grad():
            own = self.draw(self.learner.updates(), list(run.recipe.prompts))
            rows = [Row(run.recipe.name, f"after {step} steps", own, run.recipe.prompts[:COLUMNS])]
            for name in drawn_concepts(run.subspace):
                concept = run.subspace[name]
                prompts = list(concept.details.get("prompts") or [concept.trigger])
                updates = {path: [update] for path, update in concept_updates(run.subspace, name).items()}
                rows.append(Row(name, "learned earlier", self.draw(updates, prompts), prompts[:COLUMNS]))
        parked(run, away=True)
        restore(self.learner, before)
        sheet = contact_sheet(f"{run.recipe.name} on {base_name(run.settings.pretrained_model_name_or_path)}", rows)
        save_png(sheet, run.folder / f"validation-{step:06d}.png")
        name = f"sample-{step:06d}.png"
        save_png(own[0], run.folder / name)
        self.progress.tell(step=step, steps=run.steps, sample=name)

    def draw(self, updates: Any, prompts: list[str]) -> list[Any]:
        """Return pictures of prompts at seeds 0, 1, ... with updates active."""
        self.attached.set(updates)
        pictures = generate(self.run.pipeline, prompts[:COLUMNS], list(range(len(prompts[:COLUMNS]))))
        self.attached.set({})
        return pictures


def refuse_nan(run: Run, seen: Sequence[Seen], norm: Any, step: int, skipped: int = MOST_SKIPPED) -> int:
    """Stop before the optimizer step when a loss or the gradient is not finite; return how many steps fp16 has skipped."""
    bad = [one for one in seen if not bool(torch.isfinite(one[0]).all())]
    sound_loss = not bad
    if sound_loss and (norm is None or bool(torch.isfinite(torch.as_tensor(norm)))):
        return 0
    if sound_loss and run.accelerator.scaler is not None and skipped < MOST_SKIPPED:
        return skipped + 1  # the loss scale was too high: the scaler passes over the step and lowers it
    settings = run.settings
    names = ", ".join(dict.fromkeys(name for one in bad or seen for name in bad_pictures(*one)))
    raise ValueError(
        f"the {'gradient' if sound_loss else 'loss'} is not finite at step {step} (pictures: {names}); nothing was changed by "
        f"this step and nothing is merged. Look at these pictures, or lower {rates_of(settings)}"
        + ("" if settings.mixed_precision != "fp16" else ", or use --mixed_precision bf16")
    )


def restore(learner: Learner, before: dict[str, torch.Tensor]) -> None:
    """Put back what an average has replaced."""
    with torch.no_grad():
        for name, parameter in learner.named_parameters():
            if name in before:
                parameter.copy_(before[name])


def learned_enough(recorded: list[tuple[int, float]], patience: int | None) -> bool:
    """Tell whether the last `patience` validations brought no loss 1 % better than the best before them."""
    if patience is None or len(recorded) <= patience:
        return False
    losses = [loss for _, loss in recorded]
    return min(losses[-patience:]) > BETTER * min(losses[:-patience])


def forgetting(before: Subspace, after: Subspace) -> dict[str, dict[str, Any]]:
    """Return every earlier concept's retention before and after, and whether its coefficients are the same bits."""
    table = {}
    for name, concept in before.concepts.items():
        now = after[name]
        same = all(
            torch.equal(entry.alpha, now.coefficients[path].alpha) and torch.equal(entry.beta, now.coefficients[path].beta)
            for path, entry in concept.coefficients.items()
        )
        table[name] = {"before": concept.retention, "after": now.retention, "unchanged": same}
    return table


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
