"""Open the page: `python -m app [--subspace FILE] [--port N]`."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from app.port import check_port, taken
from app.security import ADDRESS, QUEUE, launch_settings, prepare
from share_diffusion.commands.generate import device_flags

FOLDER = "app"  # in the output folder: history, card pictures, uploads


def build() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = argparse.ArgumentParser(prog="python -m app", description="Blend, draw, compare, learn and export concepts.")
    parser.add_argument("--subspace", type=Path, help="the subspace file (default: OUTPUT_DIR/BASE's, else the ready-made one)")
    parser.add_argument("--port", type=int, default=7860, help="where the page answers (default: 7860)")
    parser.add_argument("--pretrained_model_name_or_path", "--base", default="tiny", help="the base (default: tiny)")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs"), help="where history and learned concepts go")
    device_flags(parser)
    parser.add_argument("--local_files_only", action="store_true", help="never ask the hub")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Serve the page until it is stopped; what a person can mend is one message and exit status 1."""
    arguments = build().parse_args(argv)
    try:
        serve(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
    return 0


def serve(arguments: argparse.Namespace) -> None:
    """Load the model and answer on the loopback address."""
    check_port(arguments.port)
    folder = arguments.output_dir / FOLDER
    prepare(folder)
    from share_diffusion.base import usable
    from share_diffusion.commands.generate import best_device, dtype_of

    device = usable(arguments.device or best_device())  # both are seen before the slow part
    from app.engine import open_engine
    from app.page import appearance, create_page

    engine = open_engine(
        arguments.pretrained_model_name_or_path,
        arguments.subspace,
        folder,
        device=str(device),
        dtype=dtype_of(arguments.precision),
        local_files_only=arguments.local_files_only,
    )
    end_on_signals()
    page = create_page(engine).queue(max_size=QUEUE, default_concurrency_limit=4)
    try:
        page.launch(**appearance(), **launch_settings(arguments.port, engine.served), prevent_thread_lock=True)
    except OSError as error:
        raise ValueError(taken(arguments.port, error.strerror or "taken meanwhile")) from None
    print(f"http://{ADDRESS}:{arguments.port}/", flush=True)
    try:
        page.block_thread()
    finally:
        engine.close()
        page.close(verbose=False)


def end_on_signals() -> None:
    """Let a request to end reach `finally`, as Ctrl-C does; one that is ignored, as by nohup, stays ignored."""

    def end(number: int, _frame: Any) -> None:
        raise SystemExit(128 + number)

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, end)


if __name__ == "__main__":
    sys.exit(main())
