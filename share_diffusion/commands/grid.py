"""Draw a sweep over weights or seeds, or a strip from blend to blend, as one labelled picture.

share-diffusion grid --subspace FILE --prompt TEXT --blend "watercolor + robot" --x robot=0..1/5 --y seed=0,1,2
share-diffusion grid --subspace FILE --prompt TEXT --strip watercolor blueprint --frames 12 --gif strip.gif
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from share_diffusion.commands.generate import (
    best_device,
    blend_flags,
    device_flags,
    dtype_of,
    masks_of,
    output_problems,
    read_blend_flags,
)

HELP = "draw a sweep over weights or seeds, or a strip from blend to blend"


def flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("--subspace", type=Path, required=True, help="the subspace file")
    parser.add_argument("--prompt", required=True, help="what is drawn; <share:watercolor:0.8> in it is part of --blend")
    parser.add_argument("--negative_prompt", default="", help="what is not drawn")
    blend_flags(parser)
    parser.add_argument("--x", help="what changes from left to right: robot=0..1/5 (five values), robot=0,0.5,1 or seed=0,1,2")
    parser.add_argument("--y", help="what changes from top to bottom, written as --x")
    parser.add_argument("--strip", nargs="+", metavar="BLEND", help="instead of --x: blends to go through, from first to last")
    parser.add_argument("--frames", type=int, default=8, help="pictures of the strip")
    parser.add_argument("--seed", type=int, default=0, help="of every cell that --x and --y do not change (default: 0)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the base's)")
    parser.add_argument("--guidance_scale", type=float, help="classifier-free guidance (default: the base's)")
    parser.add_argument("--width", type=int, help="of a cell in pixels, a multiple of 16 (default: the base's)")
    parser.add_argument("--height", type=int, help="as --width")
    parser.add_argument("--output", type=Path, default=Path("grid.png"), help="the labelled sheet, a .png")
    parser.add_argument("--cells", type=Path, metavar="FOLDER", help="write every cell there as well, with its settings")
    parser.add_argument("--gif", type=Path, help="write the cells as a film as well")
    parser.add_argument("--pretrained_model_name_or_path", "--base", default="tiny", help="the base (default: tiny)")
    parser.add_argument("--local_files_only", action="store_true", help="never ask the hub")
    device_flags(parser)


def run(arguments: argparse.Namespace) -> None:
    """Draw the cells and write sheet, cells and film."""
    from share_diffusion.attached import attach
    from share_diffusion.base import base_name, load_base
    from share_diffusion.blend import Blend
    from share_diffusion.drawing import Sampling
    from share_diffusion.grid import Axis, strip, sweep
    from share_diffusion.models.identity import weights_of
    from share_diffusion.subspace import Subspace

    prompt, blend = read_blend_flags(arguments)
    check(arguments, bool(blend.terms))
    axes = [Axis.parse(text) for text in (arguments.x, arguments.y) if text]
    masks = masks_of(arguments, *([Blend.parse(text) for text in arguments.strip] if arguments.strip else [blend]))
    sampling = Sampling(arguments.steps, arguments.guidance_scale, arguments.negative_prompt, arguments.width, arguments.height)
    base = arguments.pretrained_model_name_or_path
    pipeline = load_base(
        base,
        dtype=dtype_of(arguments.precision),
        device=arguments.device or best_device(),
        local_files_only=arguments.local_files_only,
    )
    subspace = Subspace.load(arguments.subspace, weights_of(pipeline))
    more: dict[str, Any] = {
        "seed": arguments.seed,
        "sampling": sampling,
        "masks": masks,
        "facts": {"base": base_name(base), "subspace": arguments.subspace.name, "basis_version": subspace.basis_version},
    }
    with attach(pipeline, subspace) as handle:
        if arguments.strip:
            grid = strip(pipeline, handle, prompt, arguments.strip, arguments.frames, **more)
        else:
            grid = sweep(pipeline, handle, prompt, blend, axes[0], axes[1] if len(axes) > 1 else None, **more)
    grid.save(arguments.output)
    print(arguments.output)
    if arguments.cells:
        print(f"{len(grid.save_frames(arguments.cells))} cells in {arguments.cells}")
    if arguments.gif:
        grid.save_gif(arguments.gif)
        print(arguments.gif)


def check(arguments: argparse.Namespace, blended: bool) -> None:
    """Refuse what cannot be drawn before anything slow is loaded, all problems at once; tags of the prompt blend as well."""
    from share_diffusion.places import file_problem

    problems = []
    if bool(arguments.x) == bool(arguments.strip):
        problems.append("give either --x (a sweep) or --strip (blends to go through)")
    if arguments.y and not arguments.x:
        problems.append("--y needs --x")
    if arguments.strip and (blended or arguments.method or arguments.regions):
        problems.append(
            "--blend, --method, --regions and tags in --prompt say nothing about --strip; write them into its blends"
        )
    if not arguments.subspace.is_file():
        problems.append(f"there is no subspace file {arguments.subspace}; give the path of one with --subspace")
    problems += output_problems(arguments.output)
    if arguments.gif and arguments.gif.suffix.lower() != ".gif":
        problems.append(f"--gif {arguments.gif} must end in .gif")
    for flag, path in (("--gif", arguments.gif), ("--cells", arguments.cells and arguments.cells / "frame-000.png")):
        if path and (problem := file_problem(path)):
            problems.append(f"{flag} {problem}")
    if not 0 <= arguments.seed < 2**63:
        problems.append(f"--seed is {arguments.seed}; it is 0 to 2**63 - 1")
    if problems:
        raise ValueError("; ".join(problems))
