"""Aspect-ratio buckets: which size each picture is trained at, and batches whose pictures are all of one size.

A bucket is a size (height, width) of about resolution ** 2 pixels whose sides are multiples of a step; a picture goes to
the one whose shape is nearest to its own, so that little of it is cut away. Sizes larger than the picture are
not used unless asked for. The batches of an epoch are a pure function of (seed, epoch).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from share_diffusion.objective import batch_indices, step_generator

Size = tuple[int, int]  # (height, width)
WIDEST = 2.0  # of the longer side to the shorter


def bucket_sizes(resolution: int, step: int, widest: float = WIDEST) -> list[Size]:
    """Return the sizes of about resolution ** 2 pixels with sides that are multiples of `step`, the square first.

    Raises ValueError where the resolution is no multiple of the step.
    """
    if resolution < step or resolution % step:
        raise ValueError(f"resolution is {resolution}; with buckets of step {step} it is a multiple of {step}")
    sizes = {(resolution, resolution)}
    for short in range(step, resolution + 1, step):
        long = round(resolution * resolution / short / step) * step
        if long / short <= widest:
            sizes |= {(short, long), (long, short)}
    return sorted(sizes, key=lambda size: (abs(math.log(size[1] / size[0])), size))


def choose_bucket(picture: Size, sizes: Sequence[Size], step: int, enlarge: bool = False) -> Size:
    """Return the size at which a picture (height, width) is trained: the nearest in shape, of those no larger than it.

    A picture smaller than every bucket is trained at its own size, rounded down to the step; `enlarge` lifts that rule.
    """
    shape = math.log(picture[1] / picture[0])
    nearest = min(sizes, key=lambda size: (abs(math.log(size[1] / size[0]) - shape), size))
    if enlarge or (picture[0] >= nearest[0] and picture[1] >= nearest[1]):
        return nearest
    scale = min(picture[0] / nearest[0], picture[1] / nearest[1])
    return (max(step, int(nearest[0] * scale) // step * step), max(step, int(nearest[1] * scale) // step * step))


def batches_in_epoch(buckets: Sequence[Size], batch: int) -> int:
    """Return how many batches visit every picture at least once."""
    return sum(math.ceil(len(members) / batch) for members in by_bucket(buckets).values())


def batches_in(epochs: int, buckets: Sequence[Size], batch: int) -> int:
    """Return how many batches visit every picture so often; in a single bucket epochs run on within a batch."""
    if len(by_bucket(buckets)) == 1:
        return math.ceil(epochs * len(buckets) / batch)
    return epochs * batches_in_epoch(buckets, batch)


def by_bucket(buckets: Sequence[Size]) -> dict[Size, list[int]]:
    """Return the pictures of each bucket."""
    members: dict[Size, list[int]] = {}
    for index, size in enumerate(buckets):
        members.setdefault(size, []).append(index)
    return dict(sorted(members.items()))


def bucket_batch(buckets: Sequence[Size], batch: int, seed: int, step: int) -> Tensor:
    """Return the pictures of a step (batch), all of one bucket; a bucket's last batch of an epoch starts it over.

    With a single bucket these are `batch_indices`, where epochs run on within a batch.
    """
    members = by_bucket(buckets)
    if len(members) == 1:
        return batch_indices(len(buckets), batch, seed, step)
    count = batches_in_epoch(buckets, batch)
    epoch, place = divmod(step, count)
    generator = step_generator(seed + 7_919, epoch)
    batches = []
    for indices in members.values():
        order = [indices[int(i)] for i in torch.randperm(len(indices), generator=generator)]
        for start in range(0, len(order), batch):
            batches.append([order[(start + i) % len(order)] for i in range(batch)])
    return torch.tensor(batches[int(torch.randperm(count, generator=generator)[place])])
