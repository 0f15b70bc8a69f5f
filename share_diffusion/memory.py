"""Fit a large frozen base into small memory: recompute, park, quantise; the faster attentions; and words for where it ends.

Nothing here is needed; a package that is absent is told by name. The base is quantised in memory only and after its identity
was taken, so the subspace file is the same one that the unquantised base reads.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from share_diffusion.models import family_of
from share_diffusion.models.layers import components

QUANTISED = {"int8": "torchao", "nf4": "bitsandbytes"}


def denoiser_of(pipeline: Any) -> Any:
    """Return the pipeline's UNet or transformer."""
    return getattr(pipeline, family_of(pipeline).denoiser)


def require(package: str, flag: str, instead: str) -> None:
    """Raise ValueError where a package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{flag} needs {package}, which is not installed: pip install {package}; {instead}")


def checkpoint_gradients(pipeline: Any) -> None:
    """Let the denoiser compute its activations again in the backward pass instead of keeping them."""
    denoiser_of(pipeline).enable_gradient_checkpointing()


def use_xformers(pipeline: Any) -> None:
    """Switch the denoiser to xformers' attention."""
    require("xformers", "--enable_xformers_memory_efficient_attention", "without the flag torch's own attention is used")
    denoiser_of(pipeline).enable_xformers_memory_efficient_attention()


def quantise(pipeline: Any, kind: str) -> None:
    """Hold the denoiser's linear layers in 8 bits (torchao) or 4 (bitsandbytes, on CUDA); they stay frozen."""
    require(QUANTISED[kind], f"--quantize_base {kind}", "without the flag the base keeps its precision")
    denoiser = denoiser_of(pipeline)
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_  # type: ignore[import-not-found]

        quantize_(denoiser, Int8WeightOnlyConfig())
        return
    import bitsandbytes  # type: ignore[import-not-found]

    device = next(denoiser.parameters()).device
    for name, module in [(n, m) for n, m in denoiser.named_modules() if type(m) is nn.Linear]:
        small = bitsandbytes.nn.Linear4bit(
            module.in_features, module.out_features, module.bias is not None, module.weight.dtype, quant_type="nf4"
        )
        small.load_state_dict(module.state_dict())
        holder, _, attribute = name.rpartition(".")
        setattr(denoiser.get_submodule(holder), attribute, small.requires_grad_(False).to(device))


def gather(pipeline: Any, device: str | torch.device) -> None:
    """Move everything that drawing needs to a device."""
    for name in ("vae", *components(pipeline)):
        getattr(pipeline, name).to(device)


def park(pipeline: Any, adapted: set[str], device: str | torch.device = "cpu") -> None:
    """Move what no training step needs, the autoencoder and the text encoders that are not adapted, to a device."""
    family = family_of(pipeline)
    idle = [name for name in components(pipeline) if name != family.denoiser and name not in adapted]
    for name in ("vae", *idle):
        getattr(pipeline, name).to(device)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def explained_end(remedy: str) -> Iterator[None]:
    """Raise ValueError, with what the allocator said and the remedy, where the memory of a device ends inside."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_end(error):
            raise
        raise ValueError(end_message(error, remedy)) from error


def is_end(error: BaseException) -> bool:
    """Tell whether an error says that there is no memory left, on an accelerator or beside it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = str(error)  # torch has no type for the end of main memory, nor for that of every accelerator
    return isinstance(error, RuntimeError) and ("can't allocate memory" in said or "out of memory" in said)


def end_message(error: BaseException, remedy: str) -> str:
    """Return what is told where memory has ended."""
    return f"the memory does not suffice ({first_words(error)}); {remedy}"


def first_words(error: BaseException) -> str:
    """Return what was asked for and what there was, without the allocator's advice."""
    said = re.sub(r"\[enforce fail at [^\]]*\] *(?:\.|err == 0\.)? *", "", " ".join(str(error).split()))
    sentences = re.split(r"(?<=[a-zA-Z])\.(?= |$)", said)
    return ".".join(sentences[:3]).strip(" .") or type(error).__name__
