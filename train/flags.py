"""What can be set for a run that learns a concept, and what other trainers' flags are called here."""

from __future__ import annotations

import inspect
import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from ranges import COUNT, SEEDS, WHOLE, Rule, is_count, out_of_range
from torch import nn

from share_diffusion.adapt import MODES
from share_diffusion.capacity import Capacity, parse_bytes
from share_diffusion.captions import Variation
from share_diffusion.loop import ORIGIN, TARGETS
from share_diffusion.memory import QUANTISED
from share_diffusion.models.noise import WEIGHTINGS
from share_diffusion.objective import Objective
from share_diffusion.optimizers import FACTOR_RATE, LORA_RATE, RATE, SHRINK, make_optimizer
from share_diffusion.optimizers import FREE as FREE_RATES
from share_diffusion.schedules import SCHEDULES
from share_diffusion.settings import flag, side
from share_diffusion.subspace import ORIGINS, Origin

PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TRACKERS = ("none", "tensorboard", "wandb")


@dataclass(frozen=True)
class ConceptSettings:
    """How one concept is learned."""

    # what is learned, and where it goes
    concept: str | None = flag(
        None, "its name; configs/concepts/NAME.toml or data/NAME/ is used where present", aliases=("output_name",)
    )
    pretrained_model_name_or_path: str = flag(
        "tiny", "the base: tiny, a hub id, a diffusers folder or a .safetensors file", aliases=("base",)
    )
    subspace: str | None = flag(None, "the subspace file (default: OUTPUT_DIR/BASE/subspace.safetensors)")
    patch: str | None = flag(None, "write the concept into this file, for a later merge, and leave the subspace file alone")
    output_dir: str = flag("outputs", "where files, sheets and reports go")
    kind: str | None = flag(None, "style or subject", choices=("style", "subject"))
    trigger: str | None = flag(None, "the word that calls the concept in a prompt")
    license: str | None = flag(None, "the licence that exports of the concept carry, e.g. CC-BY-4.0")
    # pictures and captions
    instance_data_dir: str | None = flag(None, "a folder of pictures and captions", aliases=("train_data_dir",))
    dataset_config: str | None = flag(None, "a TOML table of several folders, as kohya's [[datasets.subsets]]")
    instance_prompt: str | None = flag(None, "the caption of pictures that have none, e.g. 'a photo of mycat'")
    caption_from_filename: bool = flag(False, "use file names as captions")
    caption_column: str = flag("text", "the captions' name in metadata.jsonl or metadata.csv")
    repeats: int = flag(1, "how often every picture counts", aliases=("num_repeats", "dataset_repeats"))
    resolution: int | None = flag(None, "side of the training pictures (default: the base's own)", read=side)
    use_aspect_ratio_buckets: bool = flag(False, "train pictures in their own shapes", aliases=("enable_bucket",))
    bucket_step: int | None = flag(
        None, "sides of buckets are multiples of this (default: 64, or a quarter of a small resolution)",
        aliases=("bucket_reso_steps",),
    )  # fmt: skip
    bucket_enlarge: bool = flag(False, "enlarge pictures that are smaller than their bucket")
    center_crop: bool = flag(True, "cut pictures at their centre; --no-center_crop cuts at random places")
    crops: int = flag(4, "random cuts of each picture, with --no-center_crop")
    random_flip: bool = flag(False, "mirror pictures at random", aliases=("flip_aug",))
    alpha_mask: bool = flag(False, "take a picture's transparency as its mask (001.mask.png is always used)")
    caption_dropout_rate: float = flag(0.0, "share of captions left out")
    shuffle_caption: bool = flag(False, "shuffle a caption's tags, those behind the first KEEP_TOKENS")
    keep_tokens: int = flag(1, "tags that are neither shuffled nor dropped")
    caption_tag_dropout_rate: float = flag(0.0, "share of a caption's tags left out")
    cache_dir: str | None = flag(None, "keep latents and text states in this folder, by content (default: memory)")
    with_prior_preservation: bool = flag(False, "train on pictures of the class as well; missing ones are drawn by the base")
    class_data_dir: str | None = flag(
        None, "the class's pictures (default: data/class/PROMPT-DIGEST/)", aliases=("reg_data_dir",)
    )
    class_prompt: str | None = flag(None, "what they show, e.g. 'a photo of a cat'")
    num_class_images: int = flag(100, "how many pictures of the class there should be")
    prior_loss_weight: float = flag(1.0, "weight of their loss")
    # what trains
    adaptation: str | None = flag(
        None, "what trains (default: coefficients, or gradient in a file whose basis comes from adapters)", choices=MODES
    )
    pseudo_rank: int = flag(4, "rank of the concept inside the subspace (p)")
    temporary_rank: int = flag(4, "new directions per layer (phi)")
    rank: int = flag(8, "rank of an ordinary LoRA, which starts an empty subspace", aliases=("network_dim",))
    basis: str | None = flag(
        None,
        "where a new subspace's first columns come from (default: activations; random with --low_vram; adapters for modes that "
        "make columns)",
        choices=ORIGINS,
    )
    derived_rank: int = flag(
        ORIGIN.rank, "columns a side of a basis that is not made of adapters (with activations on average)"
    )
    basis_rank: int | None = flag(None, "most columns a side of a layer", aliases=("num_components",))
    budget: str | None = flag(None, "most bytes of the file, e.g. 60MB")
    retain: float = flag(0.999, "share of the new concept's energy that the merge keeps")
    targets: str = flag(TARGETS, "layers: attention, attention+ff, attention+ff+conv, all-linear or a regular expression")
    train_text_encoder: bool = flag(True, "adapt the text encoder's layers as well")
    # the objective
    prediction_type: str | None = flag(None, "what a diffusion base predicts, where its config is wrong",
                                       choices=("epsilon", "v_prediction", "sample"))  # fmt: skip
    snr_gamma: float | None = flag(None, "min-SNR weighting of diffusion times, 5 is usual", aliases=("min_snr_gamma",))
    noise_offset: float = flag(0.0, "noise that is one value a channel, 0.05 is usual")
    weighting_scheme: str | None = flag(None, "which times are visited (default: the family's)", choices=WEIGHTINGS)
    preserve_weight: float = flag(0.0, "hold the base's and earlier concepts' predictions with this weight")
    # optimisation
    train_batch_size: int = flag(8, "pictures per step and process")
    gradient_accumulation_steps: int = flag(1, "batches per optimizer step")
    max_train_steps: int = flag(400, "optimizer steps")
    num_train_epochs: int | None = flag(None, "passes over the pictures, in place of steps", aliases=("max_train_epochs",))
    optimizer: str = flag("adamw", "adamw, adam, sgd, adafactor, adamw8bit, prodigy, lion or module:Class",
                          aliases=("optimizer_type",))  # fmt: skip
    optimizer_args: tuple[str, ...] = flag(
        (), f"its arguments, as weight_decay=0.5 fused=True (adamw decays by {SHRINK:g} / (rate x steps) by itself)"
    )
    learning_rate: float = flag(RATE, "rate of the coefficients", aliases=("unet_lr",))
    factor_learning_rate: float | None = flag(
        None, f"rate of temporary factors (default: {FACTOR_RATE:g}) and of ordinary LoRAs (default: {LORA_RATE:g})"
    )
    text_encoder_lr: float | None = flag(None, "rate of coefficients in text encoders (default: LEARNING_RATE)")
    lr_scheduler: str = flag("cosine", "schedule", choices=SCHEDULES)
    lr_warmup_steps: int = flag(10, "steps of linear warm-up")
    lr_num_cycles: int = flag(1, "falls of cosine_with_restarts", aliases=("lr_scheduler_num_cycles",))
    lr_power: float = flag(1.0, "power of polynomial", aliases=("lr_scheduler_power",))
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm; 0 clips nothing")
    ema_decay: float | None = flag(None, "keep a moving average of what trains, 0.99 is usual")
    finetune_steps: int = flag(0, "steps on the newest concept's coefficients after the merge")
    gradient_batches: int = flag(8, "batches whose gradient gives the new directions")
    mixed_precision: str | None = flag(
        None, "precision of the forward pass (default: what accelerate was told, else no)", choices=tuple(PRECISIONS)
    )
    gradient_checkpointing: bool = flag(False, "save memory by computing activations twice")
    torch_compile: bool = flag(False, "compile the denoiser")
    enable_xformers_memory_efficient_attention: bool = flag(False, "use xformers", aliases=("xformers",))
    quantize_base: str | None = flag(None, "hold the frozen denoiser in 8 or 4 bits", choices=tuple(QUANTISED))
    low_vram: bool = flag(False, "gradient checkpointing, and whatever a step does not need stays off the accelerator")
    seed: int = flag(0, "decides noise, order and starting values")
    deterministic: bool = flag(False, "only operations that give the same bits every time")
    # watching
    validation_prompt: tuple[str, ...] = flag((), "prompts to draw on the sheet", aliases=("sample_prompts",))
    validation_steps: int | None = flag(
        None, "steps between two validations: a sheet and the loss at fixed noise", aliases=("sample_every_n_steps",)
    )
    early_stop: int | None = flag(None, "stop after this many validations in a row without 1 % better loss")
    report_to: str = flag("none", "where losses are logged", choices=TRACKERS, aliases=("log_with",))
    logging_dir: str = flag("logs", "the logs' folder, below the concept's own")
    checkpointing_steps: int = flag(50, "steps between two checkpoints", aliases=("save_every_n_steps",))
    checkpoints_total_limit: int | None = flag(2, "checkpoints that are kept")
    resume_from_checkpoint: str | None = flag(
        None, "a checkpoint folder, latest, or auto (the latest if it fits this run)", aliases=("resume",)
    )
    sheet: bool = flag(True, "draw the contact sheet")
    progress_file: str | None = flag(None, "a file of JSON lines that tells other programs how far the run is")
    dry_run: bool = flag(
        False, "print the plan and what is wrong with the data, and learn nothing (a ready-made concept's pictures are drawn)"
    )
    local_files_only: bool = flag(False, "never ask the hub")
    cpu: bool = flag(False, "train on the CPU even where there is an accelerator")


FREE = {
    "resume_from_checkpoint",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "sheet",
    "output_dir",
    "subspace",
    "patch",
    "validation_prompt",
    "local_files_only",
    "finetune_steps",
    "license",
    "instance_data_dir",
    "dataset_config",
    "class_data_dir",
    "cache_dir",
    "report_to",
    "logging_dir",
    "dry_run",
    "progress_file",
    "basis_rank",
    "budget",
    "retain",
}
RULES: tuple[Rule, ...] = (
    (COUNT, is_count, ("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "gradient_batches", "crops",
                       "bucket_step", "checkpointing_steps", "num_train_epochs", "validation_steps", "early_stop",
                       "lr_num_cycles", "num_class_images", "pseudo_rank", "temporary_rank", "rank", "derived_rank",
                       "basis_rank", "repeats", "resolution")),
    (f"{COUNT}; a number above that of all checkpoints keeps them all", is_count, ("checkpoints_total_limit",)),
    (WHOLE, lambda value: value == 0 or is_count(value), ("keep_tokens", "lr_warmup_steps", "finetune_steps")),
    (f"0 to {SEEDS:,}", lambda value: 0 <= value <= SEEDS, ("seed",)),
    ("0 or more, and finite", lambda value: value >= 0,
     ("preserve_weight", "prior_loss_weight", "learning_rate", "factor_learning_rate", "text_encoder_lr", "lr_power")),
    ("0 or more, and finite; 0 clips nothing", lambda value: value >= 0, ("max_grad_norm",)),
    ("a share from 0 to 1", lambda value: 0 <= value <= 1, ("caption_dropout_rate", "caption_tag_dropout_rate")),
    ("a share above 0 and at most 1", lambda value: 0 < value <= 1, ("retain",)),
    ("0 to 1, 0.05 is usual", lambda value: 0 <= value <= 1, ("noise_offset",)),
    ("above 0 and at most 1,000, 5 is usual", lambda value: 0 < value <= 1000, ("snr_gamma",)),
    ("above 0 and below 1, 0.99 is usual; without the flag there is no average", lambda value: 0 < value < 1, ("ema_decay",)),
)  # fmt: skip

NONE = inspect.Parameter("closure", inspect.Parameter.KEYWORD_ONLY, default=None)
ALWAYS = "leave it out, that is always so"
ELSEWHERE = {
    "network_module": "leave it out; what trains is chosen by --adaptation",
    "network_alpha": "leave it out; every scale is folded into the update, set --learning_rate instead",
    "lora_alpha": "leave it out; every scale is folded into the update, set --learning_rate instead",
    "network_args": "use --targets for the layers and --pseudo_rank, --temporary_rank for the size",
    "network_dropout": "there is none; use --caption_dropout_rate or --preserve_weight against overfitting",
    "network_train_unet_only": "use --no-train_text_encoder",
    "network_train_text_encoder_only": "use --targets text_encoder",
    "network_weights": "merge that file first: share-diffusion merge FILE LORA",
    "caption_extension": "leave it out; .txt and .caption are both read",
    "cache_latents": ALWAYS,
    "cache_latents_to_disk": "use --cache_dir FOLDER",
    "cache_text_encoder_outputs": "use --no-train_text_encoder, then they are kept",
    "sdpa": ALWAYS,
    "mem_eff_attn": ALWAYS,
    "save_model_as": "leave it out; the file is .safetensors",
    "save_precision": "leave it out; the file holds float16, and what trains is float32",
    "save_last_n_steps": "use --checkpoints_total_limit, which counts checkpoints",
    "revision": "give --pretrained_model_name_or_path a folder of that revision",
    "variant": "leave it out, or give --pretrained_model_name_or_path a folder of that variant",
    "adam_beta1": "use --optimizer_args betas=(0.9,0.99)",
    "adam_beta2": "use --optimizer_args betas=(0.9,0.99)",
    "adam_weight_decay": "use --optimizer_args weight_decay=0.01",
    "adam_epsilon": "use --optimizer_args eps=1e-8",
    "scale_lr": "leave it out, and set --learning_rate to what it would come to",
    "discrete_flow_shift": "leave it out; times are shifted as the base's own scheduler shifts them",
    "guidance_scale": "leave it out; bases that are told a guidance are trained at 1",
    "sample_batch_size": "leave it out; pictures of a class are drawn --train_batch_size at a time",
    "hub_token": "log in with `hf auth login`",
    "hub_model_id": "leave it out; upload the file by hand",
    "num_validation_images": "give as many prompts to --validation_prompt",
    "save_every_n_epochs": "use --checkpointing_steps",
    "save_state": ALWAYS,
    "max_data_loader_n_workers": "leave it out; pictures are encoded once and kept",
    "persistent_data_loader_workers": "leave it out; pictures are encoded once and kept",
    "dataloader_num_workers": "leave it out; pictures are encoded once and kept",
    "min_bucket_reso": "leave it out; buckets have the area of --resolution and sides of at most 2 : 1",
    "max_bucket_reso": "leave it out; buckets have the area of --resolution and sides of at most 2 : 1",
    "bucket_no_upscale": ALWAYS,
    "random_crop": "use --no-center_crop",
    "color_aug": "there is none; it would teach wrong colours",
    "clip_skip": "leave it out; the text encoder is read as the base's own pipeline reads it",
    "max_token_length": "leave it out; the base's own length is used",
    "sample_every_n_epochs": "use --validation_steps",
    "sample_sampler": "leave it out; samples are drawn as share-diffusion generate draws them",
    "v2": "leave it out; the base's kind is seen from its files",
    "v_parameterization": "leave it out, or use --prediction_type v_prediction",
    "vae": "put it into the base's folder",
    "no_half_vae": "use --mixed_precision no or bf16",
    "full_fp16": "use --mixed_precision fp16; what trains stays float32",
    "full_bf16": "use --mixed_precision bf16; what trains stays float32",
    "fp8_base": "use --quantize_base int8",
    "lowram": "use --low_vram",
    "scale_weight_norms": "leave it out; --max_grad_norm bounds every step",
    "in_json": "write metadata.jsonl beside the pictures",
    "use_8bit_adam": "use --optimizer adamw8bit",
    "use_prodigy": "use --optimizer prodigy",
    "train_text_encoder_ti": "leave it out; the trigger is an ordinary word",
    "push_to_hub": "leave it out; upload the file by hand",
    "validation_epochs": "use --validation_steps",
    "allow_tf32": "set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1",
}


def comparable(settings: ConceptSettings) -> dict[str, Any]:
    """Return the settings that must not change between a run and its resumption."""
    free = FREE if settings.early_stop else FREE | {"validation_steps"}
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in asdict(settings).items() if key not in free
    }


def capacity_of(settings: ConceptSettings) -> Capacity:
    """Return the limits of the merge."""
    return Capacity(settings.retain, settings.basis_rank, budget_of(settings))


def budget_of(settings: ConceptSettings) -> int | None:
    """Return the most bytes of the file."""
    return Capacity(budget=parse_bytes(settings.budget)).budget if settings.budget is not None else None


def optimizer_of(settings: ConceptSettings) -> torch.optim.Optimizer:
    """Return the optimizer as it is asked for, on a weight that stands for what will train; ValueError where it cannot be."""
    weight = nn.Parameter(torch.zeros(2, 2))
    optimizer = make_optimizer(settings.optimizer, [{"params": [weight], "lr": RATE}], settings.optimizer_args, 1)
    if inspect.signature(type(optimizer).step).parameters.get("closure", NONE).default is inspect.Parameter.empty:
        raise ValueError(f"optimizer {settings.optimizer} takes a closure, which no step here has; choose another one")
    return optimizer


def with_free_rate(settings: ConceptSettings) -> ConceptSettings:
    """Return the settings with the rate 1 where the optimizer finds its own; ValueError where the rates differ."""
    if settings.optimizer.lower() not in FREE_RATES:
        return settings
    rate = 1.0 if settings.learning_rate == RATE else settings.learning_rate
    others = {"text_encoder_lr": settings.text_encoder_lr, "factor_learning_rate": settings.factor_learning_rate}
    if wrong := [f"--{name} {value:g}" for name, value in others.items() if value not in (None, rate)]:
        raise ValueError(
            f"{' and '.join(wrong)}: {settings.optimizer} finds one rate for all, as a factor of {rate:g}; leave it out"
        )
    return replace(settings, learning_rate=rate, factor_learning_rate=rate)


def rates_of(settings: ConceptSettings) -> str:
    """Return the flags of the rates with what they come to, for a message."""
    factors = settings.factor_learning_rate
    told = f"{FACTOR_RATE:g}, of LoRAs {LORA_RATE:g}" if factors is None else f"{factors:g}"
    return f"--learning_rate ({settings.learning_rate:g}) or --factor_learning_rate ({told})"


def snr_of(settings: ConceptSettings) -> tuple[float, ...]:
    """Return the min-SNR gamma, where there is one."""
    return () if settings.snr_gamma is None else (settings.snr_gamma,)


def most_norm(settings: ConceptSettings) -> float:
    """Return the norm that gradients are clipped to."""
    return settings.max_grad_norm or math.inf


def objective_of(settings: ConceptSettings) -> Objective:
    """Return what is minimised."""
    return Objective(settings.snr_gamma, settings.noise_offset, settings.weighting_scheme)


def variation_of(settings: ConceptSettings) -> Variation:
    """Return how captions vary."""
    return Variation(
        settings.caption_dropout_rate, settings.shuffle_caption, settings.keep_tokens, settings.caption_tag_dropout_rate
    )


def origin_of(settings: ConceptSettings) -> Origin:
    """Return where a new subspace's first columns come from."""
    kind = settings.basis or ORIGIN.kind
    if settings.basis is None and settings.adaptation not in (None, "coefficients"):
        kind = "adapters"
    elif settings.basis is None and settings.low_vram:  # which never holds the base whole, as measuring it would
        kind = "random"
    return Origin(kind, settings.derived_rank if kind != "adapters" else 0, settings.seed if kind == "random" else 0)


def mixed_precision_of(settings: ConceptSettings) -> str:
    """Return the precision of the forward pass that is asked for, by the flag or by accelerate."""
    return settings.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def check(settings: ConceptSettings) -> ConceptSettings:
    """Return the settings with their precision known; refuses what cannot be meant, before any work and all at once."""
    told = mixed_precision_of(settings)
    problems = out_of_range(settings, RULES)
    for part in (optimizer_of, budget_of, with_free_rate):
        try:
            part(settings)
        except ValueError as error:
            problems.append(str(error))
    if told not in PRECISIONS:
        problems.append(f"mixed_precision is {told!r}; it is one of {', '.join(PRECISIONS)}")
    if settings.early_stop and not settings.validation_steps:
        problems.append("--early_stop needs --validation_steps, to know how the loss goes")
    if settings.with_prior_preservation and not settings.class_prompt:
        problems.append("--with_prior_preservation needs --class_prompt, as in 'a photo of a cat'")
    if settings.class_data_dir and not settings.with_prior_preservation:
        problems.append(f"--class_data_dir {settings.class_data_dir} is of no use without --with_prior_preservation; add it")
    if settings.class_prompt and not (settings.with_prior_preservation or settings.dataset_config):
        problems.append(f"--class_prompt {settings.class_prompt!r} is of no use without --with_prior_preservation; add it")
    if settings.finetune_steps and settings.preserve_weight:
        problems.append(
            f"--finetune_steps {settings.finetune_steps} would undo what --preserve_weight {settings.preserve_weight:g} holds; "
            "give one"
        )
    if files := [words for words in settings.validation_prompt if Path(words).suffix.lower() == ".txt"]:
        problems.append(f"--validation_prompt {' '.join(files)} names a file; give the prompts themselves")
    if settings.dataset_config and settings.instance_data_dir:
        problems.append("--dataset_config and --instance_data_dir both name pictures; give one")
    if settings.resume_from_checkpoint not in (None, "auto", "latest") and not Path(settings.resume_from_checkpoint).is_dir():
        problems.append(
            f"--resume_from_checkpoint {settings.resume_from_checkpoint}: there is no such folder; give one called "
            "checkpoint-STEP, latest or auto"
        )
    if settings.patch and Path(settings.patch).exists():
        problems.append(f"--patch {settings.patch} exists already; merge it, remove it or choose another name")
    if settings.patch and settings.finetune_steps:
        problems.append(f"--finetune_steps {settings.finetune_steps} needs the merge, which --patch leaves to others")
    if problems:
        raise ValueError("; ".join(problems))
    return replace(with_free_rate(settings), mixed_precision=told)
