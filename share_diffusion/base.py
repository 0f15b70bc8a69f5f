"""Load a frozen base: the embedded `tiny`, a diffusers folder, a hub id or a single .safetensors file."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from share_diffusion.single_file import open_checkpoint, open_folder

TINY = Path(__file__).parent / "assets" / "tiny"


def base_name(name_or_path: str | os.PathLike[str]) -> str:
    """Return a short name fit for a folder: `tiny`, the last part of a hub id or path."""
    return Path(name_or_path).name.removesuffix(".safetensors") or "base"


def load_base(
    name_or_path: str | os.PathLike[str] = "tiny",
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    local_files_only: bool = False,
    config: str | os.PathLike[str] | None = None,
) -> Any:
    """Return the base's ordinary diffusers pipeline, in evaluation mode and without a progress bar of its own.

    A safety checker of Stable Diffusion 1.x is left out: it would hand out black pictures where it is in doubt, and training
    would take those for pictures of a class.
    `config` is a diffusers folder from which a single file takes its configurations and tokenisers. Raises ValueError
    with the remedy when there is no such base here and none can be fetched, and when there is no such device.
    """
    device = usable(device)
    source = TINY if str(name_or_path) == "tiny" else Path(name_or_path)
    if str(name_or_path) == "tiny" and not (TINY / "model_index.json").is_file():
        raise ValueError(f"the embedded base is missing ({TINY}); reinstall the package, or make it with train/base.py")
    if source.suffix in (".ckpt", ".pt", ".bin"):
        raise ValueError(f"base {str(source)!r}: pickled files can run code; convert it to .safetensors first")
    try:
        with quiet():
            pipeline = open_pipeline(str(name_or_path), source, dtype, local_files_only, Path(config) if config else None)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"cannot load the base {str(name_or_path)!r}: {first.rstrip('.')}. Give `tiny`, a diffusers folder, a "
            ".safetensors file, or a hub id that can be reached (or is in the local cache, with --local_files_only)"
        ) from error
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.register_modules(safety_checker=None)
        pipeline.register_to_config(requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def usable(device: str | torch.device) -> torch.device:
    """Return a device that is there; raises ValueError with those that are."""
    try:
        wanted = torch.device(device)
        torch.empty(1, device=wanted)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        there += ["mps"] if torch.backends.mps.is_available() else []
        raise ValueError(f"device {str(device)!r} cannot be used here; there are: {', '.join(there)}") from error
    return wanted


def open_pipeline(name: str, source: Path, dtype: torch.dtype, local_files_only: bool, config: Path | None) -> Any:
    """Return the pipeline of a single file, a folder or a hub id."""
    from diffusers import DiffusionPipeline

    options: dict[str, Any] = {"torch_dtype": dtype, "local_files_only": local_files_only}
    if source.suffix == ".safetensors":
        if not source.is_file():
            raise ValueError(f"there is no file {name}")
        return open_checkpoint(source, config, options)
    if source.is_dir():
        return open_folder(source, options)
    return DiffusionPipeline.from_pretrained(name, use_safetensors=True, **options)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' loading bars and their notices about optional packages; their errors still come through."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    levels = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        diffusers_logging.set_verbosity(levels[0])
        transformers_logging.set_verbosity(levels[1])
        diffusers_logging.enable_progress_bar()
        transformers_logging.enable_progress_bar()
