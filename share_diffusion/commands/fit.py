"""Make a subspace file from LoRA files of any dialect."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

HELP = "make a subspace file from LoRA files"


def flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    source_flags(parser)
    parser.add_argument("--output", type=Path, required=True, help="the subspace file to write; it must not be there yet")


def source_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `fit` and `merge` share."""
    parser.add_argument("loras", nargs="*", metavar="LORA", help="a LoRA file, or the folder that PEFT or diffusers wrote")
    parser.add_argument("--name", action="append", default=[], metavar="NAME=PATH", help="a file under this name")
    parser.add_argument("--kind", action="append", default=[], metavar="[NAME=]KIND", help="style (the default) or subject")
    parser.add_argument("--trigger", action="append", default=[], metavar="[NAME=]WORDS", help="what calls it in a prompt")
    parser.add_argument("--retain", type=float, default=0.999, help="share of each concept that is kept (default: 0.999)")
    parser.add_argument("--basis_rank", "--num_components", type=int, help="most columns a side of a layer")
    parser.add_argument("--budget", help="most bytes of the file, e.g. 60MB")
    parser.add_argument("--pseudo_rank", type=int, help="most of each concept's rank (default: all of it)")
    parser.add_argument("--pretrained_model_name_or_path", "--base", help="the base: shapes are checked and it is recorded")
    parser.add_argument("--local_files_only", action="store_true")
    parser.add_argument("--dry_run", action="store_true", help="say what would be kept and write nothing")


def run(arguments: argparse.Namespace) -> None:
    """Fit LoRA files, say what each keeps, and write the subspace."""
    from share_diffusion import storage
    from share_diffusion.account import report
    from share_diffusion.intake import take_in
    from share_diffusion.subspace import BaseIdentity, Subspace

    found = sources_of(arguments)
    if arguments.output.exists():
        raise ValueError(f"{arguments.output} is there already; merge into it with `merge`, or give another --output")
    if not arguments.output.parent.is_dir():
        raise ValueError(f"{arguments.output.parent} is not a folder; create it first")
    capacity, pipeline = capacity_of(arguments), open_base(arguments.pretrained_model_name_or_path, arguments)
    empty = Subspace(base=identity(pipeline, arguments) if pipeline else BaseIdentity())
    with storage.locked(arguments.output, needed=not arguments.dry_run):
        with all_unreadable(found):
            subspace, account = take_in(empty, found, capacity, pseudo_rank=arguments.pseudo_rank, progress=reading)
        if pipeline is None and account.family:
            subspace = replace(subspace, base=BaseIdentity(f"{account.family}, by its layers"))
        refuse_wrong_base(pipeline, subspace)
        print(report(empty, subspace, account))
        write(arguments, subspace, arguments.output)


def sources_of(arguments: argparse.Namespace) -> list[Any]:
    """Return the LoRA files with their names; ValueError where one file is given two names."""
    from share_diffusion.intake import sources

    named: dict[str, list[str]] = {}
    for entry in arguments.name:
        name, _, path = entry.partition("=")
        named.setdefault(path, []).append(name)
    if twice := [
        f"--name gives {path} the names {', '.join(names)}; give it one" for path, names in named.items() if names[1:]
    ]:
        raise ValueError("; ".join(twice))
    return sources(arguments.loras, arguments.name, arguments.kind, arguments.trigger)


@contextmanager
def all_unreadable(found: list[Any]) -> Iterator[None]:
    """Within the block, the first LoRA file that cannot be read is told together with all others that cannot be."""
    from share_diffusion.lora import LoRA

    try:
        yield
    except ValueError as first:
        problems = []
        for source in found:
            try:
                LoRA.read(source.path)
            except ValueError as error:
                problems.append(str(error))
        if str(first) in problems:
            raise ValueError("; ".join(problems)) from None
        raise


def capacity_of(arguments: argparse.Namespace) -> Any:
    """Return the limits that the flags give; a cap or a budget without --retain is filled to the brim."""
    from share_diffusion.capacity import Capacity, parse_bytes

    return Capacity(arguments.retain, arguments.basis_rank, parse_bytes(arguments.budget) if arguments.budget else None)


def open_base(name: str | None, arguments: argparse.Namespace) -> Any:
    """Return the base's pipeline, or None where none is named."""
    from share_diffusion.base import load_base

    return load_base(name, local_files_only=arguments.local_files_only) if name else None


def identity(pipeline: Any, arguments: argparse.Namespace) -> Any:
    """Return the identity that the file records."""
    from share_diffusion.base import base_name
    from share_diffusion.models.identity import identify

    return identify(pipeline, base_name(arguments.pretrained_model_name_or_path))


def refuse_wrong_base(pipeline: Any, subspace: Any) -> None:
    """Raise ValueError where the subspace has layers that the base has not, or in another shape."""
    from share_diffusion.attached import attach_problems

    if pipeline is not None and (problems := attach_problems(pipeline, subspace, strict=True)):
        raise ValueError("; ".join(problems))


def reading(done: int, whole: int) -> None:
    """Say how far the reading is, on a terminal's error stream."""
    if whole > 1 and sys.stderr.isatty():
        print(f"\r{done} of {whole} files", end="\n" if done == whole else "", file=sys.stderr, flush=True)


def write(arguments: argparse.Namespace, subspace: Any, file: Path) -> None:
    """Write the file, unless only asked what it would be, and say what it costs."""
    from share_diffusion.describe import describe

    if arguments.dry_run:
        print(f"{file} is not written (--dry_run)")
        return
    sizes = describe(subspace.save(file), file)["bytes"]
    print(
        f"{file}: {sizes['total']:,} bytes, of which the shared basis has {sizes['basis']:,} and a concept "
        f"{sizes['per_concept_mean']:,.0f}; as separate LoRAs of the same ranks {sizes['as_separate_loras']:,}"
    )
