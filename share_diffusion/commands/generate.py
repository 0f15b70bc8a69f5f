"""Draw a blend of concepts; a prompt may carry it as tags, `<share:watercolor:0.8>` or `<lora:watercolor:0.8>`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from share_diffusion.blend import Blend
from share_diffusion.grammar import read_prompt

HELP = "draw a blend of concepts"
PRECISIONS = ("float32", "bfloat16", "float16")


def flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("--subspace", type=Path, help="the subspace file; without it the untouched base is drawn")
    parser.add_argument("--prompt", required=True, help="what is drawn; <share:watercolor:0.8> in it is part of the blend")
    parser.add_argument("--negative_prompt", default="", help="what is not drawn")
    blend_flags(parser)
    parser.add_argument("--seed", type=int, default=0, help="the first picture's (default: 0)")
    parser.add_argument("--count", type=int, default=1, help="pictures, at seeds SEED, SEED + 1, ...")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the base's)")
    parser.add_argument("--guidance_scale", type=float, help="classifier-free guidance (default: the base's)")
    parser.add_argument("--width", type=int, help="in pixels, a multiple of 16 (default: the base's)")
    parser.add_argument("--height", type=int, help="as --width")
    parser.add_argument("--output", type=Path, default=Path("share.png"), help="a .png; more pictures are numbered")
    parser.add_argument("--pretrained_model_name_or_path", "--base", default="tiny", help="the base (default: tiny)")
    parser.add_argument("--local_files_only", action="store_true", help="never ask the hub")
    device_flags(parser)


def run(arguments: argparse.Namespace) -> None:
    """Draw pictures and write them with their settings inside."""
    from share_diffusion.attached import attach
    from share_diffusion.base import base_name, load_base
    from share_diffusion.drawing import BATCH, Sampling, png_info, save_png
    from share_diffusion.drawing import generate as draw
    from share_diffusion.models.identity import weights_of
    from share_diffusion.subspace import Subspace

    arguments.prompt, blend = read_blend_flags(arguments)
    wished = Sampling(arguments.steps, arguments.guidance_scale, arguments.negative_prompt, arguments.width, arguments.height)
    check_drawing(arguments, blend)
    masks = masks_of(arguments, blend)
    pipeline = load_base(
        arguments.pretrained_model_name_or_path,
        dtype=dtype_of(arguments.precision),
        device=arguments.device or best_device(),
        local_files_only=arguments.local_files_only,
    )
    facts: dict[str, Any] = {"base": base_name(arguments.pretrained_model_name_or_path)}
    if arguments.subspace is not None:
        subspace = Subspace.load(arguments.subspace, weights_of(pipeline))
        facts |= {"subspace": arguments.subspace.name, "basis_version": subspace.basis_version}
        attach(pipeline, subspace).set_blend(blend, masks=masks)
    sampling = wished.resolved(pipeline)
    seeds = list(range(arguments.seed, arguments.seed + arguments.count))
    for start in range(0, len(seeds), BATCH):  # so that a stop loses no more than what is being drawn
        some = seeds[start : start + BATCH]
        pictures = draw(pipeline, [arguments.prompt] * len(some), some, sampling)
        for number, (picture, seed) in enumerate(zip(pictures, some, strict=True), start=start):
            output = arguments.output
            path = output if len(seeds) == 1 else output.with_stem(f"{output.stem}-{number:03d}")
            save_png(picture, path, png_info(arguments.prompt, seed, sampling, str(blend), facts))
            print(path, flush=True)


def device_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where a base is loaded, and how."""
    parser.add_argument("--device", help="cpu, cuda, mps (default: the best there is)")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="of the base; half of the memory in bfloat16 or float16, and other pictures in their last digits",
    )


def blend_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is blended, how and where."""
    parser.add_argument(
        "--blend",
        default="",
        help="e.g. 'watercolor:0.8 + robot:0.5[steps=0.2..1][blocks=down,mid]'; empty is the untouched base",
    )
    parser.add_argument(
        "--method",
        help="linear (default), 'ties density=0.5', 'dare drop=0.5 seed=0', tsv, norm-equalised, 'loss-equalised strength=0.5'",
    )
    parser.add_argument(
        "--regions",
        nargs="+",
        default=[],
        metavar="NAME=REGION",
        help="where concepts act: robot=left, 'owl=0.5,0,1,1 soft=0.1' or owl=@hat",
    )
    parser.add_argument("--masks", nargs="+", default=[], metavar="NAME=FILE", help="pictures of the regions @NAME")


def read_blend_flags(arguments: argparse.Namespace) -> tuple[str, Blend]:
    """Return the prompt without tags, and the blend that flags and tags make together."""
    prompt, tagged = read_prompt(arguments.prompt)
    blend = Blend.parse(arguments.blend)
    method = blend.method
    if arguments.method:
        method = Blend.parse(f"x | {arguments.method}").method
    terms = [*blend.terms, *tagged.terms]
    placed: list[str] = []
    for entry in arguments.regions:
        name, equal, place = entry.partition("=")
        if not equal or name not in [term.name for term in terms]:
            raise ValueError(f"--regions {entry!r} is not NAME=REGION of a concept in the blend, as in robot=left")
        if name in placed:
            raise ValueError(f"--regions names {name!r} twice; a concept in two places is two terms of --blend")
        placed.append(name)
        region = Blend.parse(f"x[region={place}]").terms[0].region
        terms = [replace(term, region=region) if term.name == name else term for term in terms]
    return prompt, Blend(terms, method)


def read_masks(entries: list[str]) -> dict[str, Any]:
    """Return the pictures of `--masks`, by name."""
    from PIL import Image

    masks = {}
    for entry in entries:
        name, _, file = entry.partition("=")
        try:
            with Image.open(file) as picture:
                masks[name] = picture.convert("L")
        except (OSError, Image.DecompressionBombError) as error:
            reason = getattr(error, "strerror", None) or "it is no picture of a usable size"
            raise ValueError(f"--masks {entry!r}: cannot read {file!r} ({reason}); give NAME=FILE") from None
    return masks


def masks_of(arguments: argparse.Namespace, *blends: Blend) -> dict[str, Any]:
    """Return the pictures of `--masks`; ValueError where a blend has a region that none of them is for."""
    masks = read_masks(arguments.masks)
    if missing := sorted({name for blend in blends for name in blend.masks if name not in masks}):
        raise ValueError(f"there is no picture for @{missing[0]}; give --masks {' '.join(f'{name}=FILE' for name in missing)}")
    return masks


def check_drawing(arguments: argparse.Namespace, blend: Any) -> None:
    """Refuse what cannot be drawn before anything slow is loaded, all problems at once."""
    problems = []
    problems += output_problems(arguments.output)
    if not 1 <= arguments.count <= 1000:
        problems.append(f"--count is {arguments.count}; it is 1 to 1000")
    if not 0 <= arguments.seed < 2**63 - 1000:
        problems.append(f"--seed is {arguments.seed}; it is 0 to 2**63 - 1001")
    if blend.weights and arguments.subspace is None:
        problems.append("--blend names concepts, but there is no --subspace file to take them from")
    if arguments.subspace is not None and not arguments.subspace.is_file():
        problems.append(f"there is no subspace file {arguments.subspace}; give the path of one with --subspace")
    if not arguments.prompt.strip():
        problems.append("--prompt is empty")
    if problems:
        raise ValueError("; ".join(problems))
    if blend.weights and arguments.subspace is not None:
        from share_diffusion.concept import unknown_concept
        from share_diffusion.file import listing

        known = [concept["name"] for concept in listing(arguments.subspace).concepts]
        if unknown := [name for name in blend.weights if name not in known]:
            raise ValueError("; ".join(unknown_concept(name, known, str(arguments.subspace)) for name in unknown))


def output_problems(path: Path) -> list[str]:
    """Return why a PNG cannot be written to `--output`."""
    from share_diffusion.places import file_problem

    problem = file_problem(path)
    problems = [f"--output {path} must end in .png"] if path.suffix.lower() != ".png" else []
    return [*problems, *([f"--output {problem}"] if problem else [])]


def dtype_of(precision: str) -> Any:
    """Return torch's dtype of a `--precision`."""
    import torch

    return getattr(torch, precision)


def best_device() -> str:
    """Return the fastest device there is."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
