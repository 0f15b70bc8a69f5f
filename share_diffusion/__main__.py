"""The command line: `share-diffusion` or `python -m share_diffusion`.

share-diffusion show FILE [--json]
share-diffusion generate --subspace FILE --prompt TEXT --blend "watercolor:0.8 + robot:0.5" --output out.png
share-diffusion grid --subspace FILE --prompt TEXT --blend BLEND --x robot=0..1/5 --y seed=0,1,2 --output grid.png
share-diffusion overlap FILE [NAMES ...]
share-diffusion measure FILE --base BASE
share-diffusion fit LORA... --output FILE
share-diffusion merge FILE LORA... [--distil]
share-diffusion compare A B
share-diffusion rename FILE OLD NEW
share-diffusion export FILE --blend "watercolor:0.8 + robot:0.5" --format kohya --output blend.safetensors
share-diffusion verify-export PATH
share-diffusion drop FILE NAME
share-diffusion verify FILE
share-diffusion doctor

Every command is a file in `commands/`; here they are listed, and an error becomes one message.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from share_diffusion.commands import (
    compare,
    doctor,
    drop,
    export,
    fit,
    generate,
    grid,
    measure,
    merge,
    overlap,
    rename,
    show,
    verify,
    verify_export,
)

COMMANDS = {
    "show": show,
    "generate": generate,
    "grid": grid,
    "overlap": overlap,
    "measure": measure,
    "fit": fit,
    "merge": merge,
    "compare": compare,
    "rename": rename,
    "export": export,
    "verify-export": verify_export,
    "drop": drop,
    "verify": verify,
    "doctor": doctor,
}


class Parser(argparse.ArgumentParser):
    """Exits with one line that says what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help tells more)\n")


def build() -> Parser:
    """Return the parser of all commands."""
    parser = Parser(prog="share-diffusion", description="Concepts of text-to-image models in one shared subspace.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, command in COMMANDS.items():
        command.flags(commands.add_parser(name, help=command.HELP, description=command.__doc__))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; what the user can mend is one message and exit status 1."""
    arguments = build().parse_args(argv)
    try:
        COMMANDS[arguments.command].run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads has seen enough, and nothing is to be said at the exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        from share_diffusion.memory import end_message, is_end

        if not is_end(error):
            raise
        print(f"error: {end_message(error, 'ask for less at once, or for a lower precision')}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
