"""A data set as a training loop needs it: pictures as latents in one or more cuts, captions as inputs, masks.

Shapes: latents (v, c, h, w) a picture, where v counts its cuts (mirrored, at other places); masks (v, 1, h, w) in [0, 1].
Pictures of one batch have one size; with buckets there are several sizes among the batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from share_diffusion.buckets import Size, bucket_sizes, choose_bucket
from share_diffusion.cache import Cache, TextCache, identity_of, key_of
from share_diffusion.data import Dataset, Example
from share_diffusion.models import family_of
from share_diffusion.models.family import Family
from share_diffusion.models.layers import components
from share_diffusion.models.texts import tokenize
from share_diffusion.objective import Draw, step_generator
from share_diffusion.pictures import cut_picture, open_alpha, open_mask, open_picture, to_tensor, window

BATCH = 16  # pictures that the autoencoder is given at once,
PIXELS = 2**20  # of so many pixels together: one of 1024 x 1024 takes 1.3 GB in half precision


@dataclass(frozen=True)
class Framing:
    """How pictures are cut: square at `resolution`, or in buckets of `step`; centred, or at `crops` places; mirrored as well.

    A step of None is 64, or a quarter of the resolution where that is less. `enlarge` puts small pictures into full-sized
    buckets; `alpha` takes a picture's transparency as its mask.
    """

    resolution: int
    buckets: bool = False
    step: int | None = None
    enlarge: bool = False
    center_crop: bool = True
    crops: int = 4
    flip: bool = False
    alpha: bool = False

    def size(self, picture: Size, grain: int) -> Size:
        """Return the size (height, width) at which a picture (height, width) is trained."""
        if not self.buckets:
            return self.resolution, self.resolution
        step = self.step or max(grain, min(64, self.resolution // 4) // grain * grain)
        if step % grain:
            raise ValueError(f"bucket_step is {step}; with this base it is a multiple of {grain}")
        return choose_bucket(picture, bucket_sizes(self.resolution, step), step, self.enlarge)

    def cuts(self, digest: str) -> list[tuple[tuple[float, float], bool]]:
        """Return every cut of a picture as (place, mirrored); places are a function of the picture's content alone."""
        places = [(0.5, 0.5)]
        if not self.center_crop:
            generator = step_generator(int(digest[:8] or "0", 16), 0)
            places = [(x, y) for x, y in torch.rand(self.crops, 2, generator=generator).tolist()]
        return list(itertools.product(places, (False, True) if self.flip else (False,)))


@dataclass(frozen=True)
class PictureSet:
    """What the loop draws from; `places` names the picture of every index, so that repeats share their tensors.

    `inputs` {name: (n, ...)} is the family's, one row a picture: token ids by text encoder; `framings` its further inputs,
    (v, ...) a picture. With `texts` the captions' states are looked up instead of being encoded in every step.
    """

    latents: tuple[Tensor, ...]
    masks: tuple[Tensor | None, ...]
    captions: tuple[str, ...]
    inputs: Mapping[str, Tensor]
    framings: tuple[Mapping[str, Tensor], ...]
    files: tuple[str, ...]
    sizes: tuple[Size, ...]
    places: tuple[int, ...]
    texts: TextCache | None = None
    tokens: Any = field(default=None, repr=False)  # captions -> {text encoder: (n, L)}

    def __len__(self) -> int:
        return len(self.places)

    @property
    def names(self) -> tuple[str, ...]:
        """The file name of every index."""
        return tuple(self.files[place] for place in self.places)

    @cached_property
    def buckets(self) -> tuple[Size, ...]:
        """The size (height, width) of every index."""
        return tuple(self.sizes[place] for place in self.places)

    def shape(self, index: int = 0) -> tuple[int, ...]:
        """Return (c, h, w) of the latents of an index."""
        return tuple(self.latents[self.places[index]].shape[1:])

    def cuts(self, drawn: Draw) -> list[tuple[int, int]]:
        """Return (picture, cut) of everything drawn; a draw without cuts means each picture's first."""
        variants = [0.0] * len(drawn.indices) if drawn.variants is None else drawn.variants.tolist()
        pictures = [self.places[index] for index in drawn.indices.tolist()]
        return [(picture, int(v * len(self.latents[picture]))) for picture, v in zip(pictures, variants, strict=True)]

    def latents_of(self, drawn: Draw, device: torch.device) -> Tensor:
        """Return the latents (n, c, h, w) of a draw."""
        return torch.stack([self.latents[picture][cut] for picture, cut in self.cuts(drawn)]).to(device)

    def mask_of(self, drawn: Draw, device: torch.device) -> Tensor | None:
        """Return the masks (n, 1, h, w) of a draw, None where no picture has one."""
        cuts = self.cuts(drawn)
        found = [self.masks[picture] for picture, _ in cuts]
        if all(mask is None for mask in found):
            return None
        like = torch.ones(1, *self.latents[cuts[0][0]].shape[2:])
        masks = [like if mask is None else mask[cut] for mask, (_, cut) in zip(found, cuts, strict=True)]
        return torch.stack(masks).to(device)

    def conditions_of(self, drawn: Draw, device: torch.device) -> dict[str, Tensor]:
        """Return the family's inputs of a draw."""
        cuts = self.cuts(drawn)
        pictures = [picture for picture, _ in cuts]
        inputs: dict[str, Tensor] = {}
        if self.texts is not None:
            inputs = self.texts.states(drawn.captions or [self.captions[picture] for picture in pictures])
        elif drawn.captions is not None:
            inputs = self.tokens(drawn.captions)
        else:
            inputs = {name: tensor[pictures] for name, tensor in self.inputs.items()}
        for name in self.framings[0]:
            inputs[name] = torch.stack([self.framings[picture][name][cut] for picture, cut in cuts])
        return {name: tensor.to(device) for name, tensor in inputs.items()}


def prepare_pictures(
    pipeline: Any,
    dataset: Dataset,
    framing: Framing | int,
    *,
    cache: Cache | None = None,
    freeze_text: bool = False,
) -> PictureSet:
    """Encode every cut of every picture once; a picture with repeats counts as often as it repeats.

    With a cache each is encoded by itself, so that what is stored does not depend on what was missing. `freeze_text`
    says that no text encoder is adapted: captions' states are then kept as well.
    """
    family = family_of(pipeline)
    framing = Framing(framing) if isinstance(framing, int) else framing
    grain = family.grain(pipeline)
    if framing.resolution < 1 or framing.resolution % grain:
        raise ValueError(f"resolution is {framing.resolution}; with this base it is a multiple of {grain}")
    examples = dataset.examples
    originals = [original_size(example) for example in examples]
    sizes = [framing.size(original, grain) for original in originals]
    captions = tuple(example.caption for example in examples)
    return PictureSet(
        latents=tuple(encode_all(pipeline, family, examples, sizes, framing, cache)),
        masks=tuple(
            encode_mask(example, size, framing, family, pipeline) for example, size in zip(examples, sizes, strict=True)
        ),
        captions=captions,
        inputs=tokenize(family, pipeline, captions),
        framings=tuple(
            frame(pipeline, family, framing, example, original, size)
            for example, original, size in zip(examples, originals, sizes, strict=True)
        ),
        files=tuple(example.picture.name for example in examples),
        sizes=tuple(sizes),
        places=tuple(place for place, example in enumerate(examples) for _ in range(example.repeats)),
        texts=text_cache(pipeline, family, cache, captions) if freeze_text else None,
        tokens=lambda texts: tokenize(family, pipeline, texts),
    )


def original_size(example: Example) -> Size:
    """Return a picture's (height, width) as it lies in its file, upright."""
    width, height = open_picture(example.picture).size
    return height, width


def encode_all(
    pipeline: Any, family: Family, examples: Sequence[Example], sizes: Sequence[Size], framing: Framing, cache: Cache | None
) -> list[Tensor]:
    """Return the latents (v, c, h, w) of every picture, in order."""
    jobs = [
        (number, place, flip, size)
        for number, (example, size) in enumerate(zip(examples, sizes, strict=True))
        for place, flip in framing.cuts(example.digest)
    ]
    vae = identity_of(pipeline.vae) if cache is not None else ""
    keys = [key_of("latents", vae, examples[number].digest, size, place, flip) for number, place, flip, size in jobs]
    found = [cache.find(key) if cache is not None else None for key in keys]
    done = [None if entry is None else entry["latents"] for entry in found]
    missing = [index for index, latents in enumerate(done) if latents is None]
    for batch in batches(missing, jobs, 1 if cache is not None else BATCH):
        pictures = torch.stack([cut_tensor(examples, jobs[index]) for index in batch])
        for index, latents in zip(batch, family.encode_pictures(pipeline, pictures).cpu(), strict=True):
            done[index] = latents
            if cache is not None:
                cache.keep(keys[index], {"latents": latents})
    by_picture: list[list[Tensor]] = [[] for _ in examples]
    for (number, *_), latents in zip(jobs, done, strict=True):
        assert latents is not None
        by_picture[number].append(latents)
    return [torch.stack(cuts) for cuts in by_picture]


def batches(indices: Sequence[int], jobs: Sequence[Any], most: int) -> list[list[int]]:
    """Return the jobs in batches of one size each and of at most `PIXELS`, in order."""
    by_size: dict[Size, list[int]] = {}
    for index in indices:
        by_size.setdefault(jobs[index][3], []).append(index)
    found = []
    for (height, width), some in by_size.items():
        count = max(1, min(most, PIXELS // (height * width)))
        found += [some[start : start + count] for start in range(0, len(some), count)]
    return found


def cut_tensor(examples: Sequence[Example], job: tuple[int, tuple[float, float], bool, Size]) -> Tensor:
    """Return one cut of a picture (3, height, width)."""
    number, place, flip, size = job
    return to_tensor(cut_picture(open_picture(examples[number].picture), size, place, flip))


def encode_mask(example: Example, size: Size, framing: Framing, family: Family, pipeline: Any) -> Tensor | None:
    """Return a picture's mask at the latents' size (v, 1, h, w), each the mean of the pixels it stands for."""
    image = open_mask(example.mask) if example.mask else open_alpha(example.picture) if framing.alpha else None
    if image is None:
        return None
    shape = family.latent_shape(pipeline, size)[1:]
    cuts = [cut_picture(image, size, place, flip) for place, flip in framing.cuts(example.digest)]
    return torch.stack([F.adaptive_avg_pool2d(grey(cut), shape) for cut in cuts])


def grey(image: Image.Image) -> Tensor:
    """Return a grey picture as (1, height, width) in [0, 1]."""
    return torch.from_numpy(np.array(image)).float()[None] / 255


def frame(
    pipeline: Any, family: Family, framing: Framing, example: Example, original: Size, size: Size
) -> Mapping[str, Tensor]:
    """Return the family's inputs about each cut of a picture, (v, ...): its size, and where the cut lies."""
    scale = max(size[0] / original[0], size[1] / original[1])
    boxes = [window((original[1], original[0]), size, place) for place, _ in framing.cuts(example.digest)]
    corners = [(round(top * scale), round(left * scale)) for left, top, _, _ in boxes]
    return family.framing(pipeline, [original] * len(corners), corners, size)


def text_cache(pipeline: Any, family: Family, cache: Cache | None, captions: Sequence[str]) -> TextCache:
    """Return the states of captions from the frozen text encoders."""

    @torch.no_grad()
    def encode(caption: str) -> Mapping[str, Tensor]:
        return family.encode_text(pipeline, tokenize(family, pipeline, [caption]))

    encoders = [module for name, module in sorted(components(pipeline).items()) if name != family.denoiser]
    identity = ""
    if cache is not None and cache.folder:
        lengths = {name: ids.shape[1] for name, ids in sorted(tokenize(family, pipeline, [""]).items())}
        identity = "".join(identity_of(module) for module in encoders) + str(lengths)
    return TextCache(encode, identity, cache or Cache(), captions)
