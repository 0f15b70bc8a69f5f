"""The engine that a run is spread by: one process, DDP, FSDP or DeepSpeed, as accelerate was configured.

What trains is a few ten thousand float32 numbers, and the frozen base is no part of the module that accelerate wraps: there
is nothing worth sharding, and an engine that shards or rounds what trains would only hand back other numbers. So FSDP runs
with NO_SHARD and DeepSpeed with ZeRO 1 or 2 in float32, which compute what DDP computes; everything else is refused here,
before any work, with what to use instead.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from flags import ConceptSettings

from share_diffusion.subsets import read_subsets

NO_SHARD = "NO_SHARD"
PATIENCE = timedelta(hours=12)  # the others wait while one process draws class pictures, measures columns or awaits the file
INSTEAD = "use configs/accelerate/multi_gpu.yaml, which trains the same without it"


def accelerator_of(settings: ConceptSettings, folder: Path) -> Accelerator:
    """Return the accelerator of a run; raises ValueError, with everything at once, where its engine does not fit."""
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        cpu=settings.cpu,
        log_with=None if settings.report_to == "none" else settings.report_to,
        project_dir=folder / settings.logging_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    accelerator.gradient_accumulation_steps = settings.gradient_accumulation_steps  # which accelerate's variable would change
    problems = []
    if accelerator.distributed_type == DistributedType.FSDP:
        engine: Any = accelerator.state.fsdp_plugin
        problems = problems_of_fsdp(engine)
        engine.mixed_precision_policy = None  # what trains stays float32; the forward is cast as in DDP
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        plugin: Any = accelerator.state.deepspeed_plugin
        problems = problems_of_deepspeed(settings, plugin.zero_stage)
        plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": settings.train_batch_size,
            "gradient_accumulation_steps": settings.gradient_accumulation_steps,
            "gradient_clipping": settings.max_grad_norm,
        }
    if problems:
        raise ValueError("; ".join(problems))
    return accelerator


def keeps_states(accelerator: Accelerator) -> bool:
    """Whether the engine's optimizer can be written to a checkpoint and read back as it is."""
    return accelerator.distributed_type != DistributedType.DEEPSPEED


def problems_of_fsdp(plugin: Any) -> list[str]:
    """Return why an FSDP configuration does not fit."""
    if plugin.fsdp_version == 2:
        return [f"fsdp_version is 2, which shards what trains; it is 1 with {NO_SHARD} here, or {INSTEAD}"]
    if plugin.sharding_strategy.name != NO_SHARD:
        return [f"fsdp_sharding_strategy is {plugin.sharding_strategy.name}; it is {NO_SHARD} here, or {INSTEAD}"]
    return []


def problems_of_deepspeed(settings: ConceptSettings, stage: int) -> list[str]:
    """Return why a DeepSpeed configuration, or what was asked for beside it, does not fit."""
    problems = []
    if stage > 2:
        problems.append(f"DeepSpeed's zero_stage is {stage}, which shards what trains; it is 2 at most, or {INSTEAD}")
    if settings.mixed_precision not in (None, "no"):
        problems.append(
            f"DeepSpeed with mixed_precision {settings.mixed_precision} rounds what trains to it; set it to 'no', or {INSTEAD}"
        )
    if settings.resume_from_checkpoint not in (None, "auto"):
        problems.append(f"--resume_from_checkpoint: no checkpoints are kept under DeepSpeed; {INSTEAD}")
    several = [f"--{name}" for name in ("with_prior_preservation", "preserve_weight") if getattr(settings, name)]
    if settings.dataset_config and any(one.of_class for one in read_subsets(settings.dataset_config)):
        several.append(f"class pictures in {settings.dataset_config}")
    if several:
        words = " and ".join(several)
        problems.append(f"{words}: DeepSpeed takes a step at every backward pass, and there would be more than one; {INSTEAD}")
    return problems
