"""Where a run starts: the concept, its pictures as latents, the frozen base, the subspace so far, and what will train."""

from __future__ import annotations

import math
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from flags import PRECISIONS, ConceptSettings, capacity_of, objective_of, origin_of, variation_of
from torch import nn

from share_diffusion import loop, storage
from share_diffusion.adapt import Adaptation, Learner
from share_diffusion.attached import Attached
from share_diffusion.base import base_name, load_base
from share_diffusion.buckets import batches_in
from share_diffusion.cache import Cache
from share_diffusion.calibration import Survey, begin, shipped
from share_diffusion.class_pictures import class_folder, draw_class, drawn_pictures
from share_diffusion.data import Dataset, join_datasets, read_dataset
from share_diffusion.drawing import BATCH
from share_diffusion.learning import Frozen, denoising_loss, freeze
from share_diffusion.loop import LOOK
from share_diffusion.lora import LoRA
from share_diffusion.memory import checkpoint_gradients, denoiser_of, gather, park, quantise, use_xformers
from share_diffusion.models import family_of
from share_diffusion.models.identity import identify, weight_of
from share_diffusion.models.layers import select, shape_of
from share_diffusion.objective import Draw, Objective
from share_diffusion.picture_set import Framing, PictureSet, prepare_pictures
from share_diffusion.places import nearest
from share_diffusion.price import least_bytes
from share_diffusion.recipe import Recipe, find_recipe
from share_diffusion.step import draw_step
from share_diffusion.subsets import read_subsets
from share_diffusion.subspace import Origin, Subspace, refuse
from share_diffusion.world.render import render_folder

ROOT = Path(__file__).resolve().parents[1]
LOCK_SECONDS = 600.0  # another run may be measuring columns, or fine-tuning after its merge


@dataclass(frozen=True)
class Run:
    """Everything that a run works with, found and checked."""

    settings: ConceptSettings
    accelerator: Accelerator
    recipe: Recipe
    folder: Path
    file: Path
    pipeline: Any
    dataset: Dataset
    pictures: PictureSet
    class_pictures: PictureSet | None
    data: str  # a digest of all pictures and captions
    modules: dict[str, nn.Module]
    subspace: Subspace

    @property
    def adaptation(self) -> str:
        """What trains."""
        return self.settings.adaptation or loop.mode_for(self.subspace)

    @property
    def batch(self) -> int:
        """Pictures of one batch, all processes together."""
        return self.settings.train_batch_size * self.accelerator.num_processes

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.settings.num_train_epochs is None:
            return self.settings.max_train_steps
        batches = batches_in(self.settings.num_train_epochs, self.pictures.buckets, self.batch)
        return math.ceil(batches / self.settings.gradient_accumulation_steps)

    @property
    def warmup(self) -> int:
        """Steps of warm-up, a quarter of a short run."""
        return min(self.settings.lr_warmup_steps, self.steps // 4)

    @property
    def adapted(self) -> set[str]:
        """The components with layers that train."""
        return {path.partition(".")[0] for path in self.modules}

    def draw(self, step: int, whole: bool = False) -> Draw:
        """Return this process's share of what a batch sees, or the whole of it."""
        objective, variation = objective_of(self.settings), variation_of(self.settings)
        drawn = draw_step(self.pipeline, self.pictures, self.batch, self.settings.seed, step, objective, variation)
        return drawn if whole else self.mine(drawn)

    def draw_class(self, step: int) -> Draw:
        """Return this process's share of a batch of class pictures."""
        assert self.class_pictures is not None
        objective = objective_of(self.settings)
        return self.mine(draw_step(self.pipeline, self.class_pictures, self.batch, self.settings.seed + 1, step, objective))

    def draw_plain(self, step: int) -> Draw:
        """Return this process's share of a batch as it is measured on: nothing varies but pictures, times and noise."""
        objective = Objective(weighting=self.settings.weighting_scheme)
        return self.mine(draw_step(self.pipeline, self.pictures, self.batch, self.settings.seed, step, objective))

    def mine(self, whole: Draw) -> Draw:
        """Return one process's share of a batch."""
        return whole.part(slice(self.accelerator.process_index, None, self.accelerator.num_processes))


def start(settings: ConceptSettings, accelerator: Accelerator) -> Run:
    """Find and check everything; raises ValueError before anything is written but drawn or encoded pictures."""
    recipe = recipe_of(settings)
    folder, file = places(settings, recipe)
    with accelerator.main_process_first():
        draw_world(recipe, accelerator)
    dataset = read_pictures(settings, recipe)
    pipeline = load(settings, accelerator)
    modules = select(pipeline, settings.targets, settings.train_text_encoder)
    begin_file(settings, accelerator, pipeline, file, modules)
    subspace = open_subspace(settings, pipeline, file, recipe, modules)
    refuse(merge_problems(settings, subspace, recipe.name, sorted(modules)))
    if settings.quantize_base and subspace.origin.kind == "weights":
        raise ValueError(f"{file} takes its basis from the base's own weights, which --quantize_base changes; leave it out")
    framing = framing_of(settings, pipeline)
    if settings.with_prior_preservation and framing.resolution % 16:
        raise ValueError(
            f"--resolution is {framing.resolution}; with --with_prior_preservation it is a multiple of 16, as pictures of the "
            "class are drawn"
        )
    cache = Cache(settings.cache_dir) if settings.cache_dir else None
    text_frozen = not any(path.startswith("text_encoder") for path in modules)
    pictures = prepare_pictures(pipeline, dataset, framing, cache=cache, freeze_text=text_frozen)
    of_class, class_digest = prepare_class(settings, accelerator, pipeline, framing, cache, text_frozen)
    economise(settings, pipeline)
    if settings.low_vram:
        for name in {family_of(pipeline).denoiser, *(path.partition(".")[0] for path in modules)}:
            getattr(pipeline, name).to(accelerator.device)
        park(pipeline, {path.partition(".")[0] for path in modules})
    if settings.quantize_base:
        modules = select(pipeline, settings.targets, settings.train_text_encoder)  # the quantised layers took their places
    digest = dataset.fingerprint + class_digest
    return Run(settings, accelerator, recipe, folder, file, pipeline, dataset, pictures, of_class, digest, modules, subspace)


def recipe_of(settings: ConceptSettings) -> Recipe:
    """Return what is to be learned."""
    configs = [Path("configs/concepts"), ROOT / "configs/concepts"]
    if settings.concept is None:
        known = sorted(path.stem for path in (ROOT / "configs/concepts").glob("*.toml"))
        raise ValueError(f"--concept is missing; give a name. Ready-made: {', '.join(known)}")
    first = next((str(one.folder) for one in subsets(settings) if not one.of_class), None)
    return find_recipe(
        settings.concept,
        configs,
        Path("data"),
        folder=settings.instance_data_dir or first,
        kind=settings.kind,
        trigger=settings.trigger,
        instance_prompt=settings.instance_prompt,
        prompts=settings.validation_prompt,
    )


def subsets(settings: ConceptSettings) -> list[Any]:
    """Return the folders of the table, if there is one."""
    return read_subsets(settings.dataset_config) if settings.dataset_config else []


def subspace_file(settings: ConceptSettings) -> Path:
    """Return where the subspace file is, or will be."""
    if settings.subspace:
        return Path(settings.subspace)
    return Path(settings.output_dir) / base_name(settings.pretrained_model_name_or_path) / "subspace.safetensors"


def places(settings: ConceptSettings, recipe: Recipe) -> tuple[Path, Path]:
    """Return the concept's output folder and the subspace file; whether all can be written is seen before any work."""
    file = subspace_file(settings)
    folder = Path(settings.output_dir) / base_name(settings.pretrained_model_name_or_path) / recipe.name
    wanted = [(folder, "--output_dir"), (Path(settings.patch or file).parent, "--patch" if settings.patch else "--subspace")]
    wanted += [(Path(settings.cache_dir), "--cache_dir")] if settings.cache_dir else []
    problems = []
    if folder == file:
        problems.append(f"concept {recipe.name!r} would have {folder} for its folder, which is the subspace file; rename one")
    for place, asked in wanted:
        there = nearest(place)
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            problems.append(f"cannot write to {there}, where {place} would be; choose another {asked}")
    if settings.with_prior_preservation and settings.class_data_dir and not nearest(settings.class_data_dir).is_dir():
        problems.append(f"--class_data_dir {settings.class_data_dir} is no folder; give the folder of the class's pictures")
    refuse(problems)
    return folder, file


def draw_world(recipe: Recipe, accelerator: Accelerator) -> None:
    """Render a ready-made concept's pictures on first use."""
    if recipe.world is not None and not recipe.folder.exists():
        accelerator.print(f"drawing {recipe.world.pictures} pictures into {recipe.folder}/")
        world = recipe.world
        render_folder(world.name, recipe.folder, world.pictures, world.seed, world.caption)


def read_pictures(settings: ConceptSettings, recipe: Recipe) -> Dataset:
    """Return the concept's pictures and captions, of one folder or of a table's."""
    options: dict[str, Any] = {
        "trigger": recipe.trigger,
        "caption_from_filename": settings.caption_from_filename,
        "caption_column": settings.caption_column,
    }
    parts = [one for one in subsets(settings) if not one.of_class]
    if not parts:
        return read_dataset(recipe.folder, instance_prompt=recipe.instance_prompt, repeats=settings.repeats, **options)
    asked = [(one.folder, one.prompt or recipe.instance_prompt, settings.repeats * one.repeats) for one in parts]
    return join_datasets(
        [read_dataset(folder, instance_prompt=prompt, repeats=repeats, **options) for folder, prompt, repeats in asked]
    )


def load(settings: ConceptSettings, accelerator: Accelerator) -> Any:
    """Return the frozen base."""
    pipeline = load_base(
        settings.pretrained_model_name_or_path,
        dtype=PRECISIONS[settings.mixed_precision or "no"],
        device="cpu" if settings.low_vram else accelerator.device,
        local_files_only=settings.local_files_only,
    )
    if settings.low_vram:
        pipeline.vae.to(accelerator.device)  # encodes the pictures, then leaves
    if settings.prediction_type:
        if "prediction_type" not in pipeline.scheduler.config:
            raise ValueError(f"--prediction_type {settings.prediction_type}: this base predicts a flow; leave it out")
        pipeline.scheduler.register_to_config(prediction_type=settings.prediction_type)
    freeze(pipeline)
    if problems := objective_of(settings).problems(pipeline):
        raise ValueError("; ".join(problems))
    return pipeline


def framing_of(settings: ConceptSettings, pipeline: Any) -> Framing:
    """Return how pictures are cut."""
    return Framing(
        settings.resolution or family_of(pipeline).native_resolution(pipeline),
        buckets=settings.use_aspect_ratio_buckets,
        step=settings.bucket_step,
        enlarge=settings.bucket_enlarge,
        center_crop=settings.center_crop,
        crops=settings.crops,
        flip=settings.random_flip,
        alpha=settings.alpha_mask,
    )


def prepare_class(
    settings: ConceptSettings, accelerator: Accelerator, pipeline: Any, framing: Framing, cache: Cache | None, text_frozen: bool
) -> tuple[PictureSet | None, str]:
    """Return the class's pictures, missing ones drawn by the base, and their digest; None where there are none to be used."""
    tabled = [one for one in subsets(settings) if one.of_class]
    if not settings.with_prior_preservation and not tabled:
        return None, ""
    folders = [(one.folder, one.prompt or settings.class_prompt, one.repeats) for one in tabled]
    if settings.with_prior_preservation and not tabled:
        assert settings.class_prompt is not None
        own = class_folder(settings.class_prompt, settings.pretrained_model_name_or_path, framing.resolution)
        folder = Path(settings.class_data_dir) if settings.class_data_dir else own
        folders = [(folder, settings.class_prompt, 1)]
        if accelerator.is_main_process and not settings.dry_run:
            if settings.low_vram:
                gather(pipeline, accelerator.device)
            many, side, batch = settings.num_class_images, framing.resolution, min(settings.train_batch_size, BATCH)
            drawn = draw_class(pipeline, folder, settings.class_prompt, many, side, batch=batch)
            if drawn:
                accelerator.print(f"drew {drawn} pictures of {settings.class_prompt!r} into {folder}/")
        accelerator.wait_for_everyone()
        if settings.dry_run and not (folder.is_dir() and any(folder.iterdir())):
            return None, ""
    parts = [
        read_dataset(
            folder,
            instance_prompt=prompt,
            repeats=repeats,
            caption_column=settings.caption_column,
            caption_from_filename=settings.caption_from_filename and not drawn_pictures(folder),
        )
        for folder, prompt, repeats in folders
    ]
    joined = join_datasets(parts)
    return prepare_pictures(pipeline, joined, framing, cache=cache, freeze_text=text_frozen), joined.fingerprint


def economise(settings: ConceptSettings, pipeline: Any) -> None:
    """Apply what saves memory or time without changing what is learned."""
    if settings.enable_xformers_memory_efficient_attention:
        use_xformers(pipeline)
    if settings.quantize_base:
        quantise(pipeline, settings.quantize_base)
    if settings.gradient_checkpointing or settings.low_vram:
        checkpoint_gradients(pipeline)
    if settings.torch_compile:
        denoiser_of(pipeline).compile()


def begin_file(
    settings: ConceptSettings, accelerator: Accelerator, pipeline: Any, file: Path, modules: dict[str, nn.Module]
) -> None:
    """Write the file without concepts where its columns have to be measured on the base, or patches are to be folded into it.

    It is written before anything trains, so that a run that is resumed, other processes and other machines have the same
    columns. A dry run does without.
    """
    if (origin := origin_of(settings)).kind != "activations" or settings.dry_run:
        return
    known = shipped(pipeline, modules, origin)
    if known and not settings.patch:
        return
    if settings.low_vram and not known and not file.exists():
        raise ValueError(
            f"--low_vram keeps the base in parts, and {file} does not exist yet: its columns are measured on the whole base; "
            "begin it where that fits (share-diffusion measure), or leave --basis out"
        )
    if accelerator.is_main_process and not file.exists():  # the others may look when it is there already, and wait all the same
        file.parent.mkdir(parents=True, exist_ok=True)
        with storage.locked(file, timeout=LOCK_SECONDS):  # whoever begins the same file beside this run is waited for
            if not file.exists():
                measure(settings, accelerator, pipeline, file, modules, origin, known)
    accelerator.wait_for_everyone()


def measure(
    settings: ConceptSettings,
    accelerator: Accelerator,
    pipeline: Any,
    file: Path,
    modules: dict[str, nn.Module],
    origin: Origin,
    known: Origin | None,
) -> None:
    """Write the file without concepts; its columns are those `known` of the base, or are measured now."""
    survey = Survey(batch=min(settings.train_batch_size, Survey.batch), resolution=settings.resolution)
    if not known:
        accelerator.print(f"{file} is new: its columns are measured once, on {survey.pictures} pictures that the base draws")
        if settings.gradient_checkpointing:
            checkpoint_gradients(pipeline)
    with accelerator.autocast():
        begin(file, pipeline, modules, origin, base_name(settings.pretrained_model_name_or_path), survey)


def open_subspace(
    settings: ConceptSettings, pipeline: Any, file: Path, recipe: Recipe, modules: dict[str, nn.Module]
) -> Subspace:
    """Return the subspace so far, or an empty one for this base."""
    identity = identify(pipeline, base_name(settings.pretrained_model_name_or_path))
    weights = {path: weight_of(module) for path, module in modules.items()}
    if not file.exists():
        origin = origin_of(settings)
        if origin.kind == "activations":  # where they would have to be measured, a dry run shows as many columns of a seed
            origin = shipped(pipeline, modules, origin) or replace(origin, kind="random")
        empty = Subspace(base=identity, origin=origin)
        return empty.cover({path: shape_of(module) for path, module in modules.items()}, weights)
    subspace = Subspace.load(file, weights)
    if mismatch := subspace.base.mismatch(identity):
        raise ValueError(f"{file}: wrong base: {mismatch}; train on {subspace.base.name!r}, or name another --subspace file")
    if held := [name for name in subspace.concepts if name.casefold() == recipe.name.casefold()]:
        raise ValueError(
            f"{file} already holds the concept {held[0]!r}; choose another --concept name, or take it out first: "
            f"share-diffusion drop {shlex.quote(str(file))} {shlex.quote(held[0])}"
        )
    return subspace.cover({path: shape_of(module) for path, module in modules.items()}, weights)


def merge_problems(settings: ConceptSettings, subspace: Subspace, name: str, adapted: Sequence[str]) -> list[str]:
    """Return what forbids the merge after the training, as far as it can be known before."""
    capacity, mode = capacity_of(settings), settings.adaptation or loop.mode_for(subspace)
    problems = subspace.merge_problems({name: LoRA({}, {})}, capacity, None)
    if not problems and capacity.budget is not None:
        ranks = dict.fromkeys(adapted, settings.pseudo_rank if mode == "coefficients" else 1)
        held = subspace.layers, subspace.fixed, subspace.concepts
        least = subspace.origin.bytes + least_bytes(*held, name, ranks, capacity.budget)
        if capacity.budget < least:
            problems.append(
                f"budget is {capacity.budget:,} bytes; with {name} in it the file takes {least:,} at least; raise it"
            )
    return problems


def start_learner(run: Run, attached: Attached) -> tuple[Learner, float]:
    """Return what will train, and the seconds that one forward and backward pass took."""
    settings, accelerator = run.settings, run.accelerator
    adaptation = Adaptation(run.adaptation, settings.pseudo_rank, settings.temporary_rank, settings.rank)
    frozen, started, passes = Frozen(run.pipeline), time.perf_counter(), []

    def loss(index: int) -> torch.Tensor:
        passes.append(index)
        with accelerator.autocast():
            drawn = run.draw(LOOK + index)
            return denoising_loss(frozen, run.pipeline, run.pictures, drawn, accelerator.device).mean()

    def average(sketch: torch.Tensor) -> torch.Tensor:
        over_processes: Any = accelerator.reduce(sketch, "mean")
        return over_processes

    batches = settings.gradient_batches
    learner = loop.start(attached, run.modules, run.subspace, adaptation, loss, settings.seed, batches, average)
    return learner.to(accelerator.device), (time.perf_counter() - started) / len(passes)


def parked(run: Run, away: bool) -> None:
    """With --low_vram, take what a training step does not need off the accelerator, or back for drawing."""
    if run.settings.low_vram:
        park(run.pipeline, run.adapted, "cpu" if away else run.accelerator.device)
