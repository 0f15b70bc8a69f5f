"""Write a concept or a blend for other programs: LoRA files, a fused pipeline, a checkpoint, a ComfyUI folder."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

HELP = "write a concept or a blend for other programs"
FORMATS = ("kohya", "diffusers", "diffusers-old", "peft", "pipeline", "checkpoint", "comfyui")


def flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("file", type=Path, help="the subspace file")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--blend", help="e.g. 'watercolor:0.8 + robot:0.5', or one concept's name")
    what.add_argument("--each", action="store_true", help="every concept on its own, into the folder --output")
    parser.add_argument("--format", choices=FORMATS, default="kohya", help="kohya (default) is the LoRA that all programs read")
    parser.add_argument("--output", type=Path, required=True, help="a .safetensors file, or a folder (peft, pipeline, comfyui)")
    parser.add_argument("--name", help="of the LoRA and workflow in a ComfyUI folder (default: the folder's)")
    parser.add_argument("--rank", type=int, help="truncate a LoRA to this rank; the error is told (default: full rank)")
    parser.add_argument("--precision", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--replace", action="store_true", help="overwrite what is there")
    parser.add_argument("--preview", action=argparse.BooleanOptionalAction, default=True, help="draw a picture beside it")
    parser.add_argument("--pretrained_model_name_or_path", "--base", help="the base (default: tiny, where the file is tiny's)")
    parser.add_argument("--other_weights", action="store_true", help="accept a fine-tune of the base")
    parser.add_argument("--local_files_only", action="store_true")


def run(arguments: argparse.Namespace) -> None:
    """Write the exports and print what each program will match of them."""
    import torch

    from share_diffusion.export import export
    from share_diffusion.models.identity import weights_of
    from share_diffusion.subspace import Subspace

    wanted = requests(arguments)
    pipeline = base_of(arguments)
    subspace = Subspace.load(arguments.file, weights_of(pipeline) if pipeline is not None else None)
    for blend, output in wanted:
        done = export(
            subspace,
            blend,
            output,
            arguments.format,
            pipeline=pipeline,
            rank=arguments.rank,
            dtype=getattr(torch, arguments.precision),
            preview=arguments.preview,
            replace=arguments.replace,
            strict=not arguments.other_weights,
            name=arguments.name,
        )
        print("\n".join(done.lines()))


def requests(arguments: argparse.Namespace) -> list[tuple[Any, Path]]:
    """Return what goes where, known from the file's header alone, before anything slow is loaded."""
    from share_diffusion.blend import Blend
    from share_diffusion.concept import unknown_concept
    from share_diffusion.export.earlier import folder_problem
    from share_diffusion.export.filename import safe_name
    from share_diffusion.export.whole import in_the_way
    from share_diffusion.file import listing

    known = [concept["name"] for concept in listing(arguments.file).concepts]
    if not arguments.each:
        blend = Blend.parse(arguments.blend)
        if unknown := [name for name in blend.weights if name not in known]:
            raise ValueError("; ".join(unknown_concept(name, known, str(arguments.file)) for name in unknown))
        if os.path.realpath(arguments.output) == os.path.realpath(arguments.file):
            raise ValueError(f"the output {arguments.output} is the subspace file itself; choose another place")
        return [(blend, arguments.output)]
    if not known:
        raise ValueError(f"{arguments.file} holds no concept yet, and --each has nothing to export")
    if arguments.format == "comfyui":
        raise ValueError("--each has no comfyui format: a workflow belongs to one blend; export them one by one")
    ending = ".safetensors" if arguments.format in ("kohya", "diffusers", "diffusers-old", "checkpoint") else ""
    wanted = [(Blend({name: 1.0}), arguments.output / f"{safe_name(name)}{ending}") for name in known]
    if problems := [problem for _, path in wanted if (problem := folder_problem(path, arguments.format))]:
        raise ValueError("; ".join(problems))
    if os.path.realpath(arguments.file) in [os.path.realpath(path) for _, path in wanted]:
        raise ValueError(f"one of the outputs is the subspace file {arguments.file} itself; choose another folder")
    if not arguments.replace:
        in_the_way([path for _, path in wanted])
    return wanted


def base_of(arguments: argparse.Namespace) -> Any:
    """Return the base where it is needed or wanted, else None."""
    from share_diffusion.base import load_base
    from share_diffusion.storage import read_header

    metadata = read_header(arguments.file).metadata
    name, derived = metadata["base"]["name"], metadata["origin"]["kind"] == "weights"
    chosen = arguments.pretrained_model_name_or_path or ("tiny" if name == "tiny" else None)
    needed = derived or arguments.format in ("pipeline", "checkpoint")
    if chosen is None:
        if needed:
            why = "its basis comes from the base's weights" if derived else f"format {arguments.format} holds the whole base"
            raise ValueError(f"{why}; give --pretrained_model_name_or_path (the file belongs to {name or 'an unnamed base'!r})")
        return None
    # A preview alone is no reason to load a base that nobody named, except the small embedded one.
    wished = arguments.preview or arguments.format == "comfyui"
    return load_base(chosen, local_files_only=arguments.local_files_only) if needed or wished else None
