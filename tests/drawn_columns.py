"""Columns as if they had been measured on a base: whole numbers drawn at random, for tests of what is done with them."""

import math

import torch

from share_diffusion.principal import LEVELS, POINT, Principal, Side


def draw_side(channels, stored, columns, kernel=POINT, seed=0):
    """One side of a layer."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(-LEVELS, LEVELS + 1, (channels, stored), generator=generator, dtype=torch.int8)
    numbers[0] = LEVELS  # no column is zero
    pairs = torch.randperm(stored * math.prod(kernel), generator=generator)[:columns].to(torch.int16)
    return Side(numbers, torch.arange(columns, dtype=torch.int16) if kernel == POINT else pairs, kernel)


def draw_principal(shapes, kernels):
    """All layers of shapes (out, in), each with other numbers of columns."""
    sides = {}
    for number, (layer, (out, width)) in enumerate(sorted(shapes.items())):
        kernel = kernels.get(layer) or POINT
        channels = width // math.prod(kernel)
        stored = min(3 + number, channels)
        columns = stored if kernel == POINT else 2 * stored + 1
        beta = min(4, out)
        sides[layer] = draw_side(channels, stored, columns, kernel, 2 * number), draw_side(out, beta, beta, seed=2 * number + 1)
    return Principal(sides)
