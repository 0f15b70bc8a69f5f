"""The contract of a base-model family: everything that differs between bases, as functions of the live pipeline.

Legend: n pictures, c latent channels, (h, w) a latent's sides, (height, width) a picture's, L tokens.

    pictures      (n, 3, height, width) float32 in [-1, 1]
    latents       (n, c, h, w) float32, shifted and scaled as the denoiser sees them, never packed
    times         (n) as the denoiser takes them: integers below `num_train_timesteps` (diffusion), or floats
                  sigma * `num_train_timesteps` (flow matching)
    inputs        {name: (n, ...)}: what is fixed about a picture's caption and framing. Token ids (n, L) under the name
                  of their text encoder, and what `framing` returns; every entry can be indexed by picture and cached
    conditioning  inputs and what `encode_text` made of them: `states` (n, L, width) and, where the denoiser takes one,
                  `pooled` (n, width)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from share_diffusion.models import latents
from share_diffusion.models.noise import Noise

Size = tuple[int, int]  # (height, width)


class Reader(NamedTuple):
    """How one text encoder reads: its tokeniser, and how many tokens it takes."""

    tokenizer: Any
    length: int


def not_framed(pipeline: Any, originals: Sequence[Size], corners: Sequence[Size], size: Size) -> dict[str, Tensor]:
    """Return nothing: this denoiser is not told how a picture was cut."""
    return {}


def inner(module: Any) -> Any:
    """Return what `torch.compile` has wrapped, or the module itself."""
    return getattr(module, "_orig_mod", module)


def as_drawn(pipeline: Any, drawn: Tensor, size: Size) -> Tensor:
    """Return latents as they are: most pipelines hand them out unpacked."""
    return drawn


def nothing_idle(pipeline: Any) -> tuple[str, ...]:
    """Return no path: every layer has a say."""
    return ()


@dataclass(frozen=True)
class Family:
    """A family of bases; every function takes the pipeline first and changes nothing on it."""

    name: str  # short and stable, e.g. "sdxl"
    title: str  # for people, e.g. "Stable Diffusion XL"
    denoiser: str  # the pipeline's component that denoises: "unet" or "transformer"
    owns: Callable[[Any], bool]  # whether a pipeline is of this family, told from its parts
    attention: str  # regular expression of the attention's layers, searched in whole paths
    feed_forward: str  # the same for the layers that the preset `attention+ff` adds
    readers: Callable[[Any], dict[str, Reader]]  # text encoders that are present, by component, in order
    encode_text: Callable[[Any, Mapping[str, Tensor]], dict[str, Tensor]]  # inputs -> states (and pooled), with gradients
    predict: Callable[[Any, Tensor, Tensor, Mapping[str, Tensor]], Tensor]  # noisy, times, conditioning -> like noisy
    noise: Noise  # what noise does to latents, and which times training visits
    native_resolution: Callable[[Any], int]  # side of the pictures that the base was made for
    grain: Callable[[Any], int]  # sides of pictures are multiples of this
    sampling: Callable[[Any], tuple[int, float]]  # default steps and guidance scale
    call_arguments: Callable[[Any, Sequence[str], float], dict[str, Any]]  # negative prompts, guidance -> for pipeline(...)
    version: Callable[[Any], str]  # kohya's ss_base_model_version, e.g. "sdxl_base_v1-0"
    architecture: Callable[[Any], str]  # ModelSpec's name without the adapter, e.g. "stable-diffusion-xl-v1-base"
    kohya_prefixes: Mapping[str, str]  # component -> what kohya's names of its layers start with, "lora_unet_"
    convolution: str = ""  # the layers that `attention+ff+conv` adds, where the denoiser has convolutions
    idle: Callable[[Any], tuple[str, ...]] = nothing_idle  # starts of paths whose layers cannot influence a picture
    framing: Callable[[Any, Sequence[Size], Sequence[Size], Size], dict[str, Tensor]] = not_framed
    encode_pictures: Callable[[Any, Tensor], Tensor] = latents.encode_pictures  # pictures -> latents, without gradients
    decode_latents: Callable[[Any, Tensor], Tensor] = latents.decode_latents  # latents -> pictures, without gradients
    latents_of_drawn: Callable[[Any, Tensor, Size], Tensor] = as_drawn  # pipeline(output_type="latent") -> latents
    latent_shape: Callable[[Any, Size], tuple[int, int, int]] = latents.latent_shape  # (height, width) -> (c, h, w)

    def components(self, pipeline: Any) -> tuple[str, ...]:
        """Return the names of the adaptable components that are present, the denoiser first."""
        return (self.denoiser, *self.readers(pipeline))

    def targets(self) -> dict[str, str]:
        """Return the presets of layers as regular expressions of paths."""
        blocks = f"{self.attention}|{self.feed_forward}"
        more = f"{blocks}|{self.convolution}" if self.convolution else blocks
        return {"attention": self.attention, "attention+ff": blocks, "attention+ff+conv": more, "all-linear": ""}
