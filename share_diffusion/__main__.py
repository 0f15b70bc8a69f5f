"""The command line: `share-diffusion` or `python -m share_diffusion`.

share-diffusion show FILE [--json]
share-diffusion generate --subspace FILE --prompt TEXT --blend "watercolor:0.8 + robot:0.5" --output out.png
share-diffusion drop FILE NAME
share-diffusion verify FILE
share-diffusion doctor
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Exits with one line that says what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help tells more)\n")


def build() -> Parser:
    """Return the parser of all commands."""
    parser = Parser(prog="share-diffusion", description="Concepts of text-to-image models in one shared subspace.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    show = commands.add_parser("show", help="what a subspace file holds and what it costs")
    show.add_argument("file", type=Path)
    show.add_argument("--json", action="store_true", help="print JSON with stable keys")
    draw = commands.add_parser("generate", help="draw a blend of concepts")
    draw.add_argument("--subspace", type=Path, help="the subspace file; without it the untouched base is drawn")
    draw.add_argument("--prompt", required=True)
    draw.add_argument("--negative_prompt", default="")
    draw.add_argument("--blend", default="", help="e.g. 'watercolor:0.8 + robot:0.5'; empty is the untouched base")
    draw.add_argument("--seed", type=int, default=0)
    draw.add_argument("--count", type=int, default=1, help="pictures, at seeds SEED, SEED + 1, ...")
    draw.add_argument("--steps", type=int, help="denoising steps (default: the base's)")
    draw.add_argument("--guidance_scale", type=float, help="classifier-free guidance (default: the base's)")
    draw.add_argument("--width", type=int)
    draw.add_argument("--height", type=int)
    draw.add_argument("--output", type=Path, default=Path("share.png"), help="a .png; more pictures are numbered")
    draw.add_argument("--pretrained_model_name_or_path", "--base", default="tiny", help="the base (default: tiny)")
    draw.add_argument("--local_files_only", action="store_true")
    draw.add_argument("--device", help="cpu, cuda, mps (default: the best there is)")
    drop = commands.add_parser("drop", help="take a concept out of a subspace file")
    drop.add_argument("file", type=Path)
    drop.add_argument("name")
    verify = commands.add_parser("verify", help="check every byte of a subspace file")
    verify.add_argument("file", type=Path)
    commands.add_parser("doctor", help="versions, device, what is missing and how to get it")
    return parser


def show(arguments: argparse.Namespace) -> None:
    """Print what a file holds."""
    from share_diffusion.describe import describe, table
    from share_diffusion.file import load

    facts = describe(load(arguments.file, look=True), arguments.file)
    print(json.dumps(facts, indent=1) if arguments.json else table(facts))


def generate(arguments: argparse.Namespace) -> None:
    """Draw pictures and write them with their settings inside."""
    from share_diffusion.attached import attach
    from share_diffusion.base import load_base
    from share_diffusion.blend import Blend
    from share_diffusion.drawing import Sampling, png_info, save_png
    from share_diffusion.drawing import generate as draw
    from share_diffusion.models.identity import weights_of
    from share_diffusion.subspace import Subspace

    blend = Blend.parse(arguments.blend)
    wished = Sampling(arguments.steps, arguments.guidance_scale, arguments.negative_prompt, arguments.width, arguments.height)
    check_drawing(arguments, blend)
    pipeline = load_base(
        arguments.pretrained_model_name_or_path,
        device=arguments.device or best_device(),
        local_files_only=arguments.local_files_only,
    )
    facts: dict[str, Any] = {"base": arguments.pretrained_model_name_or_path}
    if arguments.subspace is not None:
        subspace = Subspace.load(arguments.subspace, weights_of(pipeline))
        facts |= {"subspace": arguments.subspace.name, "basis_version": subspace.basis_version}
        attach(pipeline, subspace).set_blend(blend)
    sampling = wished.resolved(pipeline)
    seeds = list(range(arguments.seed, arguments.seed + arguments.count))
    pictures = draw(pipeline, [arguments.prompt] * len(seeds), seeds, sampling)
    for number, (picture, seed) in enumerate(zip(pictures, seeds, strict=True)):
        output = arguments.output
        path = output if len(seeds) == 1 else output.with_stem(f"{output.stem}-{number:03d}")
        save_png(picture, path, png_info(arguments.prompt, seed, sampling, str(blend), facts))
        print(path)


def check_drawing(arguments: argparse.Namespace, blend: Any) -> None:
    """Refuse what cannot be drawn before anything slow is loaded, all problems at once."""
    problems = []
    if arguments.output.suffix.lower() != ".png":
        problems.append(f"--output {arguments.output} must end in .png")
    if not 1 <= arguments.count <= 1000:
        problems.append(f"--count is {arguments.count}; it is 1 to 1000")
    if not 0 <= arguments.seed < 2**63:
        problems.append(f"--seed is {arguments.seed}; it is 0 or more")
    if blend.weights and arguments.subspace is None:
        problems.append("--blend names concepts, but there is no --subspace file to take them from")
    if not arguments.prompt.strip():
        problems.append("--prompt is empty")
    if problems:
        raise ValueError("; ".join(problems))
    if blend.weights and arguments.subspace is not None:
        from share_diffusion.file import listing

        known = [concept["name"] for concept in listing(arguments.subspace).concepts]
        if unknown := [name for name in blend.weights if name not in known]:
            names = ", ".join(map(repr, unknown))
            raise ValueError(f"unknown concept {names}; {arguments.subspace} holds: {', '.join(known) or 'none yet'}")


def best_device() -> str:
    """Return the fastest device there is."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def drop(arguments: argparse.Namespace) -> None:
    """Take a concept out of a file, under the file's lock."""
    from share_diffusion import storage
    from share_diffusion.file import drop_concept

    with storage.locked(arguments.file):
        left = drop_concept(arguments.file, arguments.name)
    print(f"dropped {arguments.name}; {arguments.file} holds: {', '.join(left) or 'nothing'} (the file as it was: .bak)")


def verify(arguments: argparse.Namespace) -> None:
    """Check a file against its checksum and its own description."""
    from share_diffusion.file import load

    subspace = load(arguments.file, look=True)
    print(f"{arguments.file} is sound: {len(subspace.concepts)} concepts, generation {subspace.generation}")


def doctor(arguments: argparse.Namespace) -> None:
    """Print versions, the device, and what is missing."""
    from share_diffusion.doctor import examine

    print(examine())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; what the user can mend is one message and exit status 1."""
    arguments = build().parse_args(argv)
    commands = {"show": show, "generate": generate, "drop": drop, "verify": verify, "doctor": doctor}
    try:
        commands[arguments.command](arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
