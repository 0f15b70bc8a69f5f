"""What this installation has and lacks, with the command that would mend it."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from share_diffusion.base import TINY

NEEDED = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "filelock", "pillow", "numpy", "tqdm")
OPTIONAL = {
    "gradio": ("the page", "pip install -e '.[app]', in the repository"),
    "xformers": ("memory-efficient attention on NVIDIA GPUs", "pip install xformers"),
    "tensorboard": ("training curves", "pip install tensorboard"),
    "wandb": ("training curves on Weights & Biases", "pip install wandb"),
}


def version(package: str) -> str | None:
    """Return an installed package's version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device() -> str:
    """Return a line about the accelerator, or the processor where there is none."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return f"{torch.cuda.get_device_name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    if torch.backends.mps.is_available():
        return "Apple GPU (mps)"
    return f"no GPU; the CPU with {torch.get_num_threads()} threads is used, which is enough for the base `tiny`"


def examine() -> str:
    """Return the whole report."""
    lines = [f"python         {platform.python_version()} on {platform.system()}", f"device         {device()}"]
    for package in NEEDED:
        found = version(package)
        lines.append(f"{package:<14} {found or 'MISSING: pip install -e ., in the repository'}")
    for package, (purpose, remedy) in OPTIONAL.items():
        lines.append(f"{package:<14} {version(package) or f'not installed; for {purpose}: {remedy}'}")
    present = (TINY / "model_index.json").is_file()
    lines.append(f"base tiny      {'present' if present else 'MISSING: reinstall the package, or run train/base.py'}")
    return "\n".join(lines)
