"""Fold LoRA files into a subspace file, by their weights or (--distil) by what they do; or patches, learned elsewhere."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from share_diffusion.commands import fit

HELP = "fold LoRA files or patches into a subspace file"


def flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("file", type=Path, help="the subspace file")
    fit.source_flags(parser)
    parser.add_argument(
        "--against", nargs="+", type=Path, default=[], metavar="FILE", help="files that patches were learned against"
    )
    distil = parser.add_argument_group("distilling", "learn each LoRA again in the file's own bases; needs the base")
    distil.add_argument("--distil", action="store_true", help="match what the LoRA does instead of its weights")
    distil.add_argument("--distil_prompts", type=Path, metavar="FILE", help="prompts, one a line (default: ready-made ones)")
    distil.add_argument("--distil_steps", type=int, default=200, help="optimizer steps (default: 200)")
    distil.add_argument("--distil_rank", type=int, default=4, help="rank of the concept inside the subspace (default: 4)")
    distil.add_argument(
        "--distil_directions", type=int, default=2, help="columns added where the bases fall short (default: 2)"
    )
    distil.add_argument("--device", help="cpu, cuda, mps (default: cpu)")


def run(arguments: argparse.Namespace) -> None:
    """Merge LoRA files, say what everything keeps, and write the file."""
    from share_diffusion import storage
    from share_diffusion.account import report
    from share_diffusion.intake import take_in
    from share_diffusion.models.identity import weights_of
    from share_diffusion.patch import is_patch
    from share_diffusion.subspace import Subspace

    if any(is_patch(path) for path in arguments.loras):
        fold(arguments)
        return
    if arguments.against:
        raise ValueError("--against is for patches, and no patch is given; leave it out")
    found = fit.sources_of(arguments)
    own = read_prompts(arguments.distil_prompts) if arguments.distil_prompts else []
    name = base_of(arguments)
    pipeline = fit.open_base(name, arguments)
    with storage.locked(arguments.file, needed=not arguments.dry_run):
        weights = weights_of(pipeline) if pipeline is not None else None
        subspace = Subspace.load(arguments.file, weights)
        fit.refuse_wrong_base(pipeline, subspace)
        if arguments.distil:
            merged = distilled(arguments, pipeline, subspace, found, own)
        else:
            limits = {"weights": weights, "pseudo_rank": arguments.pseudo_rank, "progress": fit.reading}
            with fit.all_unreadable(found):
                merged, account = take_in(subspace, found, fit.capacity_of(arguments), **limits)
            print(report(subspace, merged, account))
        fit.refuse_wrong_base(pipeline, merged)
        if pipeline is None and (new := merged.layers.keys() - subspace.layers.keys()):
            print(f"note: {len(new)} layers are new to the file ({min(new)}, ...) and no base was given to check them with")
        fit.write(arguments, merged, arguments.file)


def fold(arguments: argparse.Namespace) -> None:
    """Fold patches in, the file made anew where there is none; the order of the patches changes nothing."""
    from share_diffusion.asynchronous import merge_files
    from share_diffusion.models.identity import weights_of
    from share_diffusion.patch import is_patch

    others = [path for path in arguments.loras if not is_patch(path)]
    others += [f"--{flag}" for flag in ("name", "kind", "trigger", "pseudo_rank", "distil") if getattr(arguments, flag)]
    if others:
        raise ValueError(
            "patches are merged by themselves, with the name, kind, trigger and rank that each has; leave out "
            + ", ".join(others)
        )
    pipeline = fit.open_base(arguments.pretrained_model_name_or_path, arguments)
    weights = weights_of(pipeline) if pipeline is not None else None
    capacity, write = fit.capacity_of(arguments), not arguments.dry_run
    merged = merge_files(
        arguments.file, arguments.loras, capacity=capacity, weights=weights, against=arguments.against, write=write
    )
    for name, concept in merged.concepts.items():
        print(f"{name:<20} retention {concept.retention:.4f}")
    print(f"{arguments.file}: {len(merged.concepts)} concepts" + ("" if write else " (dry run: nothing written)"))


def base_of(arguments: argparse.Namespace) -> str | None:
    """Return the base to load: the one given, or `tiny` where the file says it is for that."""
    from share_diffusion.file import listing

    told = listing(arguments.file).base
    name = arguments.pretrained_model_name_or_path or ("tiny" if told == "tiny" else None)
    if arguments.distil and name is None:
        raise ValueError(
            f"distilling needs the base that the LoRA is for ({told or 'the file does not tell which'}); "
            "give --pretrained_model_name_or_path"
        )
    return name


def distilled(arguments: argparse.Namespace, pipeline: Any, subspace: Any, found: list[Any], own: list[str]) -> Any:
    """Return the subspace with every LoRA learned again in it, one after the other."""
    from share_diffusion.account import Account
    from share_diffusion.base import usable
    from share_diffusion.distil import Distillation, default_prompts, distil
    from share_diffusion.intake import about, read_all, refuse_taken
    from share_diffusion.learning import freeze

    settings = Distillation(arguments.distil_steps, pseudo_rank=arguments.distil_rank, directions=arguments.distil_directions)
    refuse_taken(subspace, found)
    pipeline.to(usable(arguments.device or "cpu"))
    freeze(pipeline)
    for source, lora in read_all(subspace, found, account := Account()):
        facts = about(source, lora)
        prompts = own or default_prompts(facts["trigger"], source.kind)
        student = distil(pipeline, subspace, lora, prompts, settings, learning)
        facts["details"] |= {"functional_retention": round(student.functional, 4), "source": source.path.name}
        merged = subspace.merge({source.name: student.lora}, capacity=fit.capacity_of(arguments), about={source.name: facts})
        numbers = account.facts[source.name]["numbers"]
        columns = sum(sum(side) for side in grown(subspace, merged).values())
        cost = merged[source.name].numbers + columns
        added = f" ({student.columns} directions a side added)" if student.columns else ""
        print(
            f"{source.name}: projected, the bases keep {student.weights:.4f} of its weights and {student.projected:.4f} of its "
            f"effect; distilled, {student.functional:.4f} of its effect{added}, in {cost:,} numbers (the LoRA has {numbers:,})"
        )
        subspace = merged
    return subspace


def grown(before: Any, after: Any) -> dict[str, tuple[int, int]]:
    """Return how many numbers a merge added to (alpha, beta) of each layer's basis."""
    return {
        layer: (
            basis.alpha.numel() - (before.layers[layer].alpha.numel() if layer in before.layers else 0),
            basis.beta.numel() - (before.layers[layer].beta.numel() if layer in before.layers else 0),
        )
        for layer, basis in after.layers.items()
    }


def read_prompts(path: Path) -> list[str]:
    """Return the lines of a file of prompts."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as text ({error}); give a file with one prompt a line") from None
    prompts = [line for line in lines if line]
    if len(prompts) < 2:
        raise ValueError(f"{path}: {len(prompts)} prompts; at least 2 are needed, some to learn from and some to measure with")
    return prompts


def learning(step: int, steps: int, loss: float) -> None:
    """Say how far the distilling is, on a terminal's error stream."""
    if sys.stderr.isatty():
        print(f"\rstep {step} of {steps}, loss {loss:.5f}", end="\n" if step == steps else "", file=sys.stderr, flush=True)
