"""What a run is going to do and what it has done, in words."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from share_diffusion.adapt import Learner
from share_diffusion.data import Dataset
from share_diffusion.models.layers import components, shape_of
from share_diffusion.recipe import Recipe


def lora_numbers(modules: Mapping[str, nn.Module], rank: int) -> int:
    """Return how many numbers an ordinary LoRA of this rank trains on the layers."""
    return rank * sum(sum(shape_of(module)[0]) for module in modules.values())


def peak_memory() -> int:
    """Return the most memory this process has held, in bytes; the accelerator's where there is one; 0 where nothing tells."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource  # which Windows does not have
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def minutes(seconds: float) -> str:
    """Return a duration as people say it."""
    whole, rest = divmod(round(seconds), 60)
    return f"{whole} min {rest:02d} s" if whole else f"{rest} s"


def plan(
    recipe: Recipe,
    dataset: Dataset,
    pipeline: Any,
    base: str,
    held: list[str],
    learner: Learner,
    mode: str,
    lora: tuple[int, int],
    steps: tuple[int, int, float],
    cut: int,
    file: Path,
) -> str:
    """Return the plan of one concept; `lora` is (rank, numbers), `steps` (count, pictures each, seconds each)."""
    layers = Counter(path.partition(".")[0] for path in learner.by_layer())
    weights = sum(p.numel() * p.element_size() for part in components(pipeline).values() for p in part.parameters())
    count, batch, seconds = steps
    pictures = dataset.report().splitlines()
    if cut:
        pictures.append(f"{cut} captions are longer than the base reads and will be cut")
    rows = [
        ("concept", f"{recipe.name} ({recipe.kind}), trigger {recipe.trigger!r}"),
        *(("pictures" if not number else "", line) for number, line in enumerate(pictures)),
        ("base", f"{base}; held so far: {', '.join(held) or 'nothing'}"),
        ("layers", ", ".join(f"{number} in {component}" for component, number in layers.items())),
        ("trains", f"{learner.trainables:,} numbers ({mode}); a LoRA of rank {lora[0]} would train {lora[1]:,}"),
        ("steps", f"{count} of {batch} pictures, about {minutes(count * seconds)} for this concept's training"),
        ("memory", f"{weights / 2**20:,.0f} MiB of base weights; {peak_memory() / 2**20:,.0f} MiB in all, after a trial step"),
        ("file", str(file)),
    ]
    return "\n".join(["", *(f"  {name:<10}{text}" for name, text in rows), ""])


def summary(name: str, report: Mapping[str, Any], file: Path, results: list[Path]) -> str:
    """Return what a finished run has done."""
    losses, retention = report["losses"], report["retention"]
    lines = [
        "",
        f"{name} is learned: loss {losses['fixed_noise_before']:.4f} -> {losses['fixed_noise_after']:.4f}, "
        f"{report['trainables']:,} numbers trained, {minutes(report['seconds'])} in all",
    ]
    for concept, kept in retention["after"].items():
        earlier = retention["before"].get(concept)
        lines.append(f"  {concept:<20} retention {kept:.4f} " + (f"(before {earlier:.4f})" if earlier is not None else "(new)"))
    if patch := report.get("patch"):
        lines.append(f"  {patch['path']}: {patch['bytes']:,} bytes, against basis version {patch['basis_version']}; then")
        lines.append(f"  share-diffusion merge {file} {patch['path']}")
    else:
        sizes = report["file"]["bytes"]
        lines.append(
            f"  {file}: {sizes['total']:,} bytes, of which the shared basis has {sizes['basis']:,} "
            f"and a concept {sizes['per_concept_mean']:,.0f}"
        )
    return "\n".join([*lines, *(f"  {path}" for path in results)])
