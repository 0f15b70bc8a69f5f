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
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from share_diffusion import storage
from share_diffusion.adapt import MODES, Adaptation, Learner, gradient_directions, make_learner
from share_diffusion.attached import Attached
from share_diffusion.base import base_name, load_base
from share_diffusion.basis import Basis
from share_diffusion.capacity import Capacity, parse_bytes
from share_diffusion.checkpoint import find_state, save_state
from share_diffusion.data import Dataset, read_dataset
from share_diffusion.describe import describe
from share_diffusion.drawing import generate, save_png
from share_diffusion.interruption import Interruption
from share_diffusion.learning import (
    Denoiser,
    Frozen,
    Materials,
    bad_pictures,
    denoising_loss,
    fixed_noise_loss,
    freeze,
    prepare,
    rate_factor,
)
from share_diffusion.models.identity import identify, weight_of
from share_diffusion.models.layers import select, shape_of
from share_diffusion.models.stable_diffusion import native_resolution, too_long
from share_diffusion.objective import Draw, draw
from share_diffusion.plan import lora_numbers, plan, summary
from share_diffusion.progress import ProgressFile
from share_diffusion.recipe import Recipe, find_recipe
from share_diffusion.settings import flag, parse
from share_diffusion.showcase import draw_base, draw_concepts, make_sheet
from share_diffusion.subspace import Origin, Subspace
from share_diffusion.world.render import render_folder

ROOT = Path(__file__).resolve().parents[1]
LOCK_SECONDS = 600.0  # another run may be fine-tuning after its merge
PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ConceptSettings:
    """How one concept is learned."""

    concept: str | None = flag(None, "its name; configs/concepts/NAME.toml or data/NAME/ is used where present")
    pretrained_model_name_or_path: str = flag(
        "tiny", "the base: tiny, a hub id, a diffusers folder or a .safetensors file", aliases=("base",)
    )
    subspace: str | None = flag(None, "the subspace file (default: OUTPUT_DIR/BASE/subspace.safetensors)")
    output_dir: str = flag("outputs", "where files, sheets and reports go")
    instance_data_dir: str | None = flag(None, "a folder of pictures and captions", aliases=("train_data_dir",))
    instance_prompt: str | None = flag(None, "the caption of pictures that have none, e.g. 'a photo of mycat'")
    caption_from_filename: bool = flag(False, "use file names as captions")
    kind: str | None = flag(None, "style or subject", choices=("style", "subject"))
    trigger: str | None = flag(None, "the word that calls the concept in a prompt")
    validation_prompt: tuple[str, ...] = flag((), "prompts to draw on the sheet", aliases=("sample_prompts",))
    adaptation: str = flag("gradient", "what trains", choices=MODES)
    pseudo_rank: int = flag(4, "rank of the concept inside the subspace (p)")
    temporary_rank: int = flag(4, "new directions per layer (phi)")
    rank: int = flag(8, "rank of an ordinary LoRA, which starts an empty subspace", aliases=("network_dim",))
    basis: str = flag("adapters", "where a new subspace's first columns come from", choices=("adapters", "weights", "random"))
    derived_rank: int = flag(8, "columns taken from the base's weights or a seed, with --basis weights or random")
    basis_rank: int | None = flag(None, "most columns a side of a layer", aliases=("num_components",))
    budget: str | None = flag(None, "most bytes of the file, e.g. 60MB")
    retain: float = flag(0.999, "share of the new concept's energy that the merge keeps")
    targets: str = flag("attention", "layers: attention, attention+ff, all-linear or a regular expression")
    train_text_encoder: bool = flag(True, "adapt the text encoder's layers as well")
    resolution: int | None = flag(None, "side of the training pictures (default: the base's own)")
    train_batch_size: int = flag(8, "pictures per step and process")
    gradient_accumulation_steps: int = flag(1, "batches per optimizer step")
    max_train_steps: int = flag(200, "optimizer steps")
    learning_rate: float = flag(2e-2, "rate of the coefficients")
    factor_learning_rate: float = flag(2e-3, "rate of temporary factors and of ordinary LoRAs")
    lr_scheduler: str = flag("cosine", "schedule", choices=("constant", "cosine", "linear"))
    lr_warmup_steps: int = flag(10, "steps of linear warm-up")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm")
    finetune_steps: int = flag(0, "steps on the newest concept's coefficients after the merge")
    gradient_batches: int = flag(8, "batches whose gradient gives the new directions")
    mixed_precision: str = flag("no", "precision of the forward pass", choices=tuple(PRECISIONS))
    seed: int = flag(
        0,
        "decides noise, order and starting values",
    )
    checkpointing_steps: int = flag(50, "steps between two checkpoints")
    checkpoints_total_limit: int | None = flag(2, "checkpoints that are kept", aliases=("save_last_n_steps",))
    resume_from_checkpoint: str | None = flag(
        None, "a checkpoint folder, latest, or auto (the latest if it fits this run)", aliases=("resume",)
    )
    sheet: bool = flag(True, "draw the contact sheet")
    validation_steps: int | None = flag(None, "steps between two sample pictures while it learns (default: none)")
    progress_file: str | None = flag(None, "a file of JSON lines that tells other programs how far the run is")
    local_files_only: bool = flag(False, "never ask the hub")
    cpu: bool = flag(False, "train on the CPU even where there is an accelerator")


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; what the user can mend is one message and exit status 1."""
    settings = parse(ConceptSettings, argv, description="Learn one concept and merge it into the subspace file.")
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
    """Learn the concept and return the report (empty on all but the main process)."""
    progress = progress or ProgressFile(None)
    started = time.perf_counter()
    recipe = recipe_of(settings)
    folder, file = places(settings, recipe)
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        cpu=settings.cpu,
    )
    capacity = capacity_of(settings)
    with accelerator.main_process_first():
        draw_world(recipe, accelerator)
    dataset = read_pictures(settings, recipe)
    base = settings.pretrained_model_name_or_path
    pipeline = load_base(
        base,
        dtype=PRECISIONS[settings.mixed_precision],
        device=accelerator.device,
        local_files_only=settings.local_files_only,
    )
    freeze(pipeline)
    modules = select(pipeline, settings.targets, settings.train_text_encoder)
    subspace = open_subspace(settings, pipeline, file, recipe, modules)
    materials = prepare(pipeline, dataset, settings.resolution or native_resolution(pipeline))

    attached = Attached(pipeline, sorted(modules))
    learner, seconds = start_learner(settings, accelerator, pipeline, subspace, materials, attached, modules)
    lora = settings.rank, lora_numbers(modules, settings.rank)
    batch = settings.train_batch_size * settings.gradient_accumulation_steps * accelerator.num_processes
    steps = settings.max_train_steps, batch, seconds * settings.gradient_accumulation_steps
    cut = len(too_long(pipeline, [example.caption for example in dataset.examples]))
    held = list(subspace.concepts)
    accelerator.print(plan(recipe, dataset, pipeline, base, held, learner, settings.adaptation, lora, steps, cut, file))
    attached.detach()
    for place in (folder, file.parent):
        place.mkdir(parents=True, exist_ok=True)
    shown = settings.sheet and accelerator.is_main_process
    untouched = draw_base(pipeline, recipe) if shown else []
    before = draw_concepts(pipeline, subspace, "pictures before") if shown else {}

    with Attached(pipeline, sorted(modules)) as attached:
        main = accelerator.is_main_process
        watch = watcher(settings, pipeline, learner, attached, recipe, folder, progress) if main else None
        facts = dataset, subspace.basis_version
        losses = train(settings, accelerator, pipeline, learner, attached, materials, facts, folder, watch)
    if not accelerator.is_main_process:
        accelerator.wait_for_everyone()
        return {}
    with storage.locked(file, timeout=LOCK_SECONDS):
        merged, retention = merge(settings, capacity, pipeline, subspace, recipe, learner, file, modules)
        if settings.finetune_steps:
            merged = finetune(settings, accelerator, pipeline, merged, recipe, materials, modules)
        merged = merged.save(file)
    accelerator.wait_for_everyone()
    if shown:
        after = draw_concepts(pipeline, merged, "pictures after")
        save_png(make_sheet(recipe, base_name(base), untouched, before, after), folder / "sheet.png")
    report = {
        "concept": recipe.name,
        "settings": asdict(settings),
        "losses": losses,
        "retention": retention,
        "trainables": learner.trainables,
        "lora_trainables": lora[1],
        "seconds": round(time.perf_counter() - started, 1),
        "file": describe(merged, file),
    }
    write_whole(folder / "report.json", json.dumps(report, indent=1, sort_keys=True) + "\n")
    results = [folder / "sheet.png", folder / "report.json"] if shown else [folder / "report.json"]
    accelerator.print(summary(recipe.name, report, file, results))
    progress.tell(done=True, concept=recipe.name, retention=retention["after"], file_bytes=file.stat().st_size)
    return report


def recipe_of(settings: ConceptSettings) -> Recipe:
    """Return what is to be learned."""
    configs = [Path("configs/concepts"), ROOT / "configs/concepts"]
    if settings.concept is None:
        known = sorted(path.stem for path in (ROOT / "configs/concepts").glob("*.toml"))
        raise ValueError(f"--concept is missing; give a name. Ready-made: {', '.join(known)}")
    return find_recipe(
        settings.concept,
        configs,
        Path("data"),
        folder=settings.instance_data_dir,
        kind=settings.kind,
        trigger=settings.trigger,
        instance_prompt=settings.instance_prompt,
        prompts=settings.validation_prompt,
    )


def subspace_file(settings: ConceptSettings) -> Path:
    """Return where the subspace file is, or will be."""
    if settings.subspace:
        return Path(settings.subspace)
    return Path(settings.output_dir) / base_name(settings.pretrained_model_name_or_path) / "subspace.safetensors"


def places(settings: ConceptSettings, recipe: Recipe) -> tuple[Path, Path]:
    """Return the concept's output folder and the subspace file; whether they can be written is seen before any work."""
    file = subspace_file(settings)
    folder = Path(settings.output_dir) / base_name(settings.pretrained_model_name_or_path) / recipe.name
    for place in (folder, file.parent):
        present = next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
        if not present.is_dir() or not os.access(present, os.W_OK | os.X_OK):
            raise ValueError(f"cannot write to {present}, where {place} would be; choose another --output_dir or --subspace")
    return folder, file


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def read_pictures(settings: ConceptSettings, recipe: Recipe) -> Dataset:
    """Return the concept's pictures and captions."""
    return read_dataset(
        recipe.folder,
        trigger=recipe.trigger,
        instance_prompt=recipe.instance_prompt,
        caption_from_filename=settings.caption_from_filename,
    )


def draw_world(recipe: Recipe, accelerator: Accelerator) -> None:
    """Render a ready-made concept's pictures on first use."""
    if recipe.world is not None and not recipe.folder.exists():
        accelerator.print(f"drawing {recipe.world.pictures} pictures into {recipe.folder}/")
        world = recipe.world
        render_folder(world.name, recipe.folder, world.pictures, world.seed, world.caption)


def open_subspace(
    settings: ConceptSettings, pipeline: Any, file: Path, recipe: Recipe, modules: dict[str, torch.nn.Module]
) -> Subspace:
    """Return the subspace so far, or an empty one for this base."""
    identity = identify(pipeline, base_name(settings.pretrained_model_name_or_path))
    weights = {path: weight_of(module) for path, module in modules.items()}
    if not file.exists():
        rank = 0 if settings.basis == "adapters" else settings.derived_rank
        empty = Subspace(base=identity, origin=Origin(settings.basis, rank, settings.seed if settings.basis == "random" else 0))
        return empty.cover({path: shape_of(module) for path, module in modules.items()}, weights)
    subspace = Subspace.load(file, weights)
    if mismatch := subspace.base.mismatch(identity):
        raise ValueError(f"{file}: wrong base: {mismatch}; train on {subspace.base.name!r}, or name another --subspace file")
    if recipe.name.casefold() in (name.casefold() for name in subspace.concepts):
        raise ValueError(
            f"{file} already holds the concept {recipe.name!r}; choose another --concept name, or take it out first: "
            f"share-diffusion drop {file} {recipe.name}"
        )
    return subspace.cover({path: shape_of(module) for path, module in modules.items()}, weights)


def step_draw(settings: ConceptSettings, pipeline: Any, materials: Materials, step: int, accelerator: Accelerator) -> Draw:
    """Return this process's share of a step's pictures, times and noise."""
    everybody = accelerator.num_processes
    whole = draw(
        len(materials),
        settings.train_batch_size * everybody,
        tuple(materials.latents.shape[1:]),
        pipeline.scheduler.config.num_train_timesteps,
        settings.seed,
        step,
    )
    mine = slice(accelerator.process_index, None, everybody)
    return Draw(whole.indices[mine], whole.times[mine], whole.noise[mine])


def start_learner(
    settings: ConceptSettings,
    accelerator: Accelerator,
    pipeline: Any,
    subspace: Subspace,
    materials: Materials,
    attached: Attached,
    modules: dict[str, torch.nn.Module],
) -> tuple[Learner, float]:
    """Return what will train, and the seconds that one forward and backward pass took."""
    adaptation = Adaptation(settings.adaptation, settings.pseudo_rank, settings.temporary_rank, settings.rank)
    bases = {path: basis for path, basis in subspace.layers.items() if path in modules}
    first = all(min(basis.rank) == 0 for basis in bases.values())
    rank = settings.rank if first and settings.adaptation == "gradient" else settings.temporary_rank
    frozen = Frozen(pipeline)

    def loss(index: int) -> torch.Tensor:
        drawn = step_draw(settings, pipeline, materials, 1_000_000_000 + index, accelerator)
        with accelerator.autocast():
            return denoising_loss(frozen, pipeline, materials, drawn, accelerator.device).mean()

    def average(sketch: torch.Tensor) -> torch.Tensor:
        over_processes: Any = accelerator.reduce(sketch, "mean")
        return over_processes

    started = time.perf_counter()
    wanted = adaptation.looks_at_gradient and not (first and settings.adaptation == "hybrid")
    batches = settings.gradient_batches if wanted else 1
    directions: dict[str, Basis] = gradient_directions(attached, bases, rank, loss, batches, settings.seed, average)
    seconds = (time.perf_counter() - started) / batches
    learner = make_learner(modules, bases, adaptation, directions if wanted else {}, settings.seed)
    return learner.to(accelerator.device), seconds


def train(
    settings: ConceptSettings,
    accelerator: Accelerator,
    pipeline: Any,
    learner: Learner,
    attached: Attached,
    materials: Materials,
    learned_from: tuple[Dataset, str],
    folder: Path,
    watch: Callable[[int, float], None] | None = None,
) -> dict[str, Any]:
    """Train the learner; every random number is a function of (seed, step). Returns the losses.

    `learned_from` is (data, version of the bases); `watch` is called with the number of steps done and the last loss.
    """
    dataset, basis_version = learned_from
    optimizer = torch.optim.AdamW(
        learner.parameter_groups(settings.learning_rate, settings.factor_learning_rate),
        betas=(0.9, 0.99),
        weight_decay=0.0,
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    facts = {"data": dataset.fingerprint, "basis_version": basis_version, "settings": comparable(settings)}
    first, history = resume(settings, accelerator, learner, optimizer, folder, facts)
    model, optimizer = accelerator.prepare(Denoiser(learner, pipeline, attached), optimizer)
    fixed = [step_draw(settings, pipeline, materials, 2_000_000_000 + index, accelerator) for index in range(4)]
    start_loss = fixed_noise_loss(Frozen(pipeline), pipeline, materials, fixed, accelerator.device)
    bar = tqdm(
        range(first, settings.max_train_steps),
        initial=first,
        total=settings.max_train_steps,
        desc="learning",
        unit="step",
        disable=not accelerator.is_main_process,
    )
    with Interruption() as interruption:
        for step in bar:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * rate_factor(
                    settings.lr_scheduler, step, settings.max_train_steps, settings.lr_warmup_steps
                )
            total = torch.zeros((), device=accelerator.device)
            for micro in range(settings.gradient_accumulation_steps):
                drawn = step_draw(
                    settings, pipeline, materials, step * settings.gradient_accumulation_steps + micro, accelerator
                )
                with accelerator.accumulate(model):
                    losses = denoising_loss(model, pipeline, materials, drawn, accelerator.device)
                    loss = losses.mean()
                    accelerator.backward(loss)
                    total += loss.detach() / settings.gradient_accumulation_steps
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
                        refuse_nan(settings, losses, norm, drawn, materials, step)
                        optimizer.step()
                        optimizer.zero_grad()
            history.append(round(float(total), 6))
            bar.set_postfix(loss=f"{sum(history[-20:]) / len(history[-20:]):.4f}")
            if watch is not None:
                watch(step + 1, history[-1])
            due = (step + 1) % settings.checkpointing_steps == 0 or interruption.wanted
            if due and accelerator.is_main_process:
                tensors = {"learner": learner.state_dict(), "optimizer": optimizer.state_dict(), "losses": history}
                save_state(folder, step + 1, tensors, facts, settings.checkpoints_total_limit)
            if interruption.wanted:
                bar.close()
                raise KeyboardInterrupt
    attached.set(learner.updates())
    end_loss = fixed_noise_loss(Frozen(pipeline), pipeline, materials, fixed, accelerator.device)
    attached.set({})
    return {"fixed_noise_before": start_loss, "fixed_noise_after": end_loss, "steps": history}


def watcher(
    settings: ConceptSettings,
    pipeline: Any,
    learner: Learner,
    attached: Attached,
    recipe: Recipe,
    folder: Path,
    progress: ProgressFile,
) -> Callable[[int, float], None]:
    """Return what tells other programs of every step, and draws a sample now and then."""
    steps = settings.max_train_steps

    def watch(step: int, loss: float) -> None:
        progress.tell(step=step, steps=steps, loss=loss)
        if settings.validation_steps and step % settings.validation_steps == 0:
            with torch.no_grad():
                attached.set(learner.updates())
                picture = generate(pipeline, recipe.prompts[:1], [0])[0]
            name = f"sample-{step:06d}.png"
            save_png(picture, folder / name)
            progress.tell(step=step, steps=steps, sample=name)

    return watch


def comparable(settings: ConceptSettings) -> dict[str, Any]:
    """Return the settings that must not change between a run and its resumption."""
    free = {
        "resume_from_checkpoint",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "sheet",
        "output_dir",
        "subspace",
        "validation_prompt",
        "local_files_only",
        "finetune_steps",
        "instance_data_dir",
        "validation_steps",
        "progress_file",
    }
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in asdict(settings).items() if key not in free
    }


def resume(
    settings: ConceptSettings,
    accelerator: Accelerator,
    learner: Learner,
    optimizer: torch.optim.Optimizer,
    folder: Path,
    facts: dict[str, Any],
) -> tuple[int, list[float]]:
    """Restore a checkpoint where one is asked for; refuses one taken with other data or settings."""
    if settings.resume_from_checkpoint is None:
        return 0, []
    automatic = settings.resume_from_checkpoint == "auto"
    state, notes = find_state(folder, "latest" if automatic else settings.resume_from_checkpoint)
    for note in notes:
        accelerator.print(f"passed over: {note}")
    if state is None:
        if not automatic:
            accelerator.print(f"no checkpoint in {folder}; starting at step 0")
        return 0, []
    ours, theirs = facts["settings"], state.facts["settings"]
    changes = [f"{key} was {theirs.get(key)!r}, now {ours[key]!r}" for key in ours if ours[key] != theirs.get(key)]
    changes += ["the pictures or captions have changed"] if facts["data"] != state.facts["data"] else []
    changes += ["the subspace file has changed"] if facts["basis_version"] != state.facts["basis_version"] else []
    if changes and automatic:
        accelerator.print(f"the checkpoint of step {state.step} is not this run's ({'; '.join(changes)}); starting at step 0")
        return 0, []
    if changes:
        raise ValueError(
            f"cannot resume at step {state.step}: {'; '.join(changes)}. Set them back, or start again without resuming"
        )
    learner.load_state_dict(state.tensors["learner"])
    optimizer.load_state_dict(state.tensors["optimizer"])
    accelerator.print(f"resuming after step {state.step}")
    return state.step, state.tensors["losses"]


def refuse_nan(
    settings: ConceptSettings, losses: torch.Tensor, norm: Any, drawn: Draw, materials: Materials, step: int
) -> None:
    """Stop before the optimizer step when the loss or the gradient is not finite."""
    if torch.isfinite(losses).all() and (norm is None or torch.isfinite(torch.as_tensor(norm))):
        return
    what = "loss" if not torch.isfinite(losses).all() else "gradient"
    raise ValueError(
        f"the {what} is not finite at step {step} (pictures: {', '.join(bad_pictures(losses, drawn, materials))}); nothing "
        f"was changed by this step and nothing is merged. Look at these pictures, or lower --learning_rate "
        f"({settings.learning_rate:g}) or --factor_learning_rate ({settings.factor_learning_rate:g})"
        + ("" if settings.mixed_precision != "fp16" else ", or use --mixed_precision bf16")
    )


def capacity_of(settings: ConceptSettings) -> Capacity:
    """Return the limits of the merge."""
    return Capacity(settings.retain, settings.basis_rank, parse_bytes(settings.budget) if settings.budget else None)


def merge(
    settings: ConceptSettings,
    capacity: Capacity,
    pipeline: Any,
    subspace: Subspace,
    recipe: Recipe,
    learner: Learner,
    file: Path,
    modules: dict[str, torch.nn.Module],
) -> tuple[Subspace, dict[str, Any]]:
    """Fold the concept into the file's newest state and return it with every concept's retention before and after."""
    if file.exists() and storage.read_header(file).generation != subspace.generation:
        subspace = open_subspace(settings, pipeline, file, recipe, modules)
    about = {"kind": recipe.kind, "trigger": recipe.trigger, "details": {"prompts": list(recipe.prompts)}}
    lora = learner.lora()
    merged = subspace.merge({recipe.name: lora}, capacity=capacity, about={recipe.name: about})
    before = {name: concept.retention for name, concept in subspace.concepts.items()}
    after = {name: concept.retention for name, concept in merged.concepts.items()}
    return merged, {"before": before, "after": after}


def finetune(
    settings: ConceptSettings,
    accelerator: Accelerator,
    pipeline: Any,
    subspace: Subspace,
    recipe: Recipe,
    materials: Materials,
    modules: dict[str, torch.nn.Module],
) -> Subspace:
    """Train the newest concept's coefficients alone, in the merged and now frozen bases."""
    concept = subspace[recipe.name]
    chosen = {path: modules[path] for path in concept.coefficients}
    bases = {path: subspace.layers[path] for path in chosen}
    learner = make_learner(chosen, bases, Adaptation("coefficients", concept.pseudo_rank), {}, settings.seed)
    learner.start_from(concept.coefficients)
    learner.to(accelerator.device)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=settings.learning_rate / 4, betas=(0.9, 0.99), weight_decay=0.0)
    with Attached(pipeline, sorted(chosen)) as attached:
        model = Denoiser(learner, pipeline, attached)
        for step in tqdm(range(settings.finetune_steps), desc="fine-tuning", unit="step"):
            optimizer.param_groups[0]["lr"] = (
                settings.learning_rate / 4 * rate_factor("cosine", step, settings.finetune_steps, 0)
            )
            drawn = step_draw(settings, pipeline, materials, 3_000_000_000 + step, accelerator)
            losses = denoising_loss(model, pipeline, materials, drawn, accelerator.device)
            losses.mean().backward()
            norm = torch.nn.utils.clip_grad_norm_(learner.parameters(), settings.max_grad_norm)
            refuse_nan(settings, losses, norm, drawn, materials, step)
            optimizer.step()
            optimizer.zero_grad()
    return subspace.with_coefficients(recipe.name, learner.coefficients())


if __name__ == "__main__":
    sys.exit(main())
