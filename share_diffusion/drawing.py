"""Draw pictures with the ordinary pipeline: one seed one picture on any device, settings inside the PNG."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from share_diffusion.memory import explained_end
from share_diffusion.models import family_of

BATCH = 16
LARGE = 256**2  # pixels above which pictures are decoded one after the other, which takes a fraction of the memory


@dataclass(frozen=True)
class Sampling:
    """How a picture is drawn; None stands for the base's own default."""

    steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.steps is not None and not 1 <= self.steps <= 1000:
            problems.append(f"steps is {self.steps}; it is 1 to 1000")
        for name in ("width", "height"):
            side = getattr(self, name)
            if side is not None and (not 16 <= side <= 4096 or side % 16):
                problems.append(f"{name} is {side}; it is a multiple of 16 from 16 to 4096")
        if self.guidance_scale is not None and not 0 <= self.guidance_scale <= 100:
            problems.append(f"guidance_scale is {self.guidance_scale}; it is 0 to 100")
        if problems:
            raise ValueError("; ".join(problems))

    def resolved(self, pipeline: Any) -> Sampling:
        """Return the settings with every None replaced by the base's default."""
        family = family_of(pipeline)
        side = family.native_resolution(pipeline)
        steps, guidance_scale = family.sampling(pipeline)
        return Sampling(
            steps=self.steps or steps,
            guidance_scale=self.guidance_scale if self.guidance_scale is not None else guidance_scale,
            negative_prompt=self.negative_prompt,
            width=self.width or side,
            height=self.height or side,
        )


def generate(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling | None = None,
    progress: Callable[[int], None] | None = None,
    watch: Callable[[int, Tensor], None] | None = None,
    batch: int = BATCH,
) -> list[Image.Image]:
    """Return one picture for each prompt and seed; equal (prompt, seed, settings) give the same start on every device.

    They are drawn `batch` at a time. `progress` is called with the number of pictures done after every batch; `watch` with
    the step's index and the latents after every denoising step: what it raises ends the drawing there. Raises ValueError
    where memory does not suffice, and where NaN comes out.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds; give one seed a prompt")
    chosen, family = (sampling or Sampling()).resolved(pipeline), family_of(pipeline)
    assert chosen.guidance_scale is not None
    assert chosen.width is not None
    assert chosen.height is not None
    one_by_one = getattr(pipeline.vae, "use_slicing", None) is False and chosen.width * chosen.height > LARGE
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), batch):
        some = list(prompts[start : start + batch])
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch]]
        less = f"{len(some)} pictures of {chosen.width} x {chosen.height} are drawn at once: ask for fewer or smaller ones"
        with torch.no_grad(), explained_end(f"{less}, or load the base in half precision"), decoding(pipeline.vae, one_by_one):
            pictures += pipeline(
                some,
                num_inference_steps=chosen.steps,
                width=chosen.width,
                height=chosen.height,
                generator=generators,
                callback_on_step_end=watched(watch, chosen.steps),
                **family.call_arguments(pipeline, [chosen.negative_prompt] * len(some), chosen.guidance_scale),
            ).images
        if progress is not None:
            progress(len(pictures))
    return pictures


@contextmanager
def decoding(vae: Any, one_by_one: bool) -> Iterator[None]:
    """Have the autoencoder take a batch apart, for as long as that is asked for."""
    if one_by_one:
        vae.enable_slicing()
    try:
        yield
    finally:
        if one_by_one:
            vae.disable_slicing()


def watched(watch: Callable[[int, Tensor], None] | None, steps: int | None) -> Any:
    """Return a watcher in the form in which diffusers calls one; the last of so many `steps` must have left numbers."""

    def after_step(_pipeline: Any, step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if watch is not None:
            watch(step, tensors["latents"])
        if steps is not None and step >= steps - 1 and not bool(torch.isfinite(tensors["latents"]).all()):
            raise ValueError("the picture holds no numbers any more; give smaller weights, or a higher precision")
        return {}

    return after_step


def png_info(prompt: str, seed: int, sampling: Sampling, blend: str, facts: dict[str, Any]) -> PngInfo:
    """Return the settings as PNG text: `share` holds JSON with all of them, `parameters` the line that A1111 reads."""
    info = PngInfo()
    settings = {"prompt": prompt, "blend": blend, "seed": seed, **asdict(sampling), **facts}
    info.add_itxt("share", json.dumps(settings, ensure_ascii=False, sort_keys=True))
    lines = [prompt] + ([f"Negative prompt: {sampling.negative_prompt}"] if sampling.negative_prompt else [])
    lines.append(
        f"Steps: {sampling.steps}, CFG scale: {sampling.guidance_scale:g}, Seed: {seed}, "
        f"Size: {sampling.width}x{sampling.height}, Model: {facts.get('base', '')}, Share blend: {blend}"
    )
    info.add_itxt("parameters", "\n".join(lines))
    return info


def save_png(image: Image.Image, path: str | os.PathLike[str], info: PngInfo | None = None) -> None:
    """Write a PNG whole or not at all."""
    save_whole(path, lambda part: image.save(part, format="PNG", pnginfo=info))


def save_whole(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Have `write` make a file, whole or not at all, and its folder where there is none; raises ValueError."""
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        part.replace(target)
    except OSError as error:
        with suppress(OSError):  # the place may be no folder at all
            part.unlink()
        raise ValueError(f"cannot write {target}: {error.strerror or error}; choose another place") from error


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the settings inside a PNG written here, or {} where there are none."""
    with Image.open(path) as image:
        text = getattr(image, "text", {}).get("share", "")
    try:
        settings = json.loads(text) if 0 < len(text) <= 65_536 else {}
    except (ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def with_size(sampling: Sampling, side: int) -> Sampling:
    """Return the settings for square pictures of another size."""
    return replace(sampling, width=side, height=side)
