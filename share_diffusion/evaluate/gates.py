"""The gate of a base: does it draw what it is asked for, in combinations that it was never shown?

Prompts are scenes from the held-out combinations in the grammar's own words; a judge says what the pictures show. One
generator per picture, on the CPU, makes a picture depend on its seed alone, whatever the batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from share_diffusion.evaluate.judge import Judge
from share_diffusion.pictures import to_picture
from share_diffusion.world.render import PLAIN
from share_diffusion.world.scene import Scene, sample_scene

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

ASKED = ("subject", "colour", "background", "count")
BLANK = 0.02  # standard deviation of a picture in [-1, 1] under which it shows nothing


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn: denoising steps, guidance scale, seed of the first picture, pictures at once."""

    steps: int = 25
    guidance: float = 2.0
    seed: int = 0
    batch: int = 32


def unseen_scenes(count: int, seed: int) -> list[Scene]:
    """Return scenes from the combinations held out of the base's training."""
    generator = np.random.default_rng((seed, *b"gate"))
    return [sample_scene(generator, unseen=True) for _ in range(count)]


def generate(pipeline: StableDiffusionPipeline, prompts: Sequence[str], sampling: Sampling) -> Iterator[Tensor]:
    """Yield one picture per prompt, (3, height, width) in [-1, 1] on the CPU."""
    for start in range(0, len(prompts), sampling.batch):
        part = list(prompts[start : start + sampling.batch])
        seeds = [sampling.seed * 1_000_003 + start + index for index in range(len(part))]
        drawn: Any = pipeline(
            part,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
        )
        yield from drawn.images.float().cpu() * 2 - 1


def check_base(
    pipeline: StableDiffusionPipeline, judge: Judge, count: int = 512, sampling: Sampling = Sampling()
) -> tuple[Tensor, list[Scene], dict[str, Any]]:
    """Draw `count` scenes of unseen combinations and return pictures (n, 3, 64, 64), their scenes and the measures."""
    scenes = unseen_scenes(count, sampling.seed)
    pictures = torch.stack(list(generate(pipeline, [scene.describe() for scene in scenes], sampling)))
    broken = ~torch.isfinite(pictures).all(dim=(1, 2, 3)) | (pictures.std(dim=(1, 2, 3)) < BLANK)
    measures = compare(judge(pictures.nan_to_num()), scenes)
    return pictures, scenes, {**measures, "broken": int(broken.sum()), **vars(sampling)}


def compare(said: Mapping[str, Sequence[str]], scenes: Sequence[Scene]) -> dict[str, Any]:
    """Return how often each factor asked for is seen: over all, per label, all at once, and what was taken for what."""
    asked = {"subject": [scene.subject for scene in scenes], "colour": [scene.colour for scene in scenes]}
    asked["background"] = [scene.background for scene in scenes]
    asked["count"] = [str(scene.count) for scene in scenes]
    right = {head: [truth == label for truth, label in zip(asked[head], said[head], strict=True)] for head in ASKED}
    pairs = Counter(
        (head, truth, label) for head in ASKED for truth, label in zip(asked[head], said[head], strict=True) if truth != label
    )
    return {
        "pictures": len(scenes),
        "accuracy": {head: share(hits) for head, hits in right.items()},
        "subject, colour and background": share([all(hits) for hits in zip(*list(right.values())[:3], strict=True)]),
        "plain": share([label == PLAIN for label in said["style"]]),
        "per label": {head: share_by_label(asked[head], right[head]) for head in ASKED},
        "mistakes": [[*pair, times] for pair, times in sorted(pairs.items(), key=lambda item: (-item[1], item[0]))],
    }


def share(hits: Sequence[bool]) -> float:
    """Return the share of hits, to four digits."""
    return round(sum(hits) / len(hits), 4)


def share_by_label(truths: Sequence[str], hits: Sequence[bool]) -> dict[str, float]:
    """Return the share of hits among the pictures of each true label."""
    pairs = list(zip(truths, hits, strict=True))
    return {label: share([hit for truth, hit in pairs if truth == label]) for label in sorted(set(truths))}


def sheet(
    pictures: Tensor | Sequence[Tensor], captions: Sequence[str], columns: int = 8, scale: int = 2, lines: int = 2
) -> Image.Image:
    """Return a contact sheet: pictures (3, height, width) in [-1, 1], enlarged without smoothing, captions below."""
    if len(pictures) != len(captions) or not len(captions):
        raise ValueError(f"{len(pictures)} pictures and {len(captions)} captions; a sheet needs one caption per picture")
    size, gap = 11, 6
    font = ImageFont.load_default(size=size)
    tiles = [to_picture(picture) for picture in pictures]
    width, height = tiles[0].width * scale, tiles[0].height * scale
    columns = min(columns, len(tiles))
    step = (width + gap, height + lines * (size + 3) + gap)
    page = Image.new("RGB", (columns * step[0] + gap, -(-len(tiles) // columns) * step[1] + gap), (255, 255, 255))
    draw = ImageDraw.Draw(page)
    for index, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
        left, top = gap + index % columns * step[0], gap + index // columns * step[1]
        page.paste(tile.resize((width, height), Image.Resampling.NEAREST), (left, top))
        for row, text in enumerate(islice(_wrapped(caption, font, width), lines)):
            draw.text((left, top + height + 1 + row * (size + 3)), text, fill=(40, 40, 40), font=font)
    return page


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> Iterator[str]:
    """Yield the lines of a text broken between words to fit a width in pixels."""
    line = ""
    for word in text.split():
        if line and font.getlength(f"{line} {word}") > width:
            yield line
            line = word
        else:
            line = f"{line} {word}".strip()
    yield line
