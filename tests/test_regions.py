"""Facts about regions given as pictures: their soft edges, what those cost, and that they are drawn once."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from share_diffusion.blend import Region
from share_diffusion.regions import Field, Masks, area, rasterise


def blurred_at_once(mask: Tensor, soft: float, grid: tuple[int, int]) -> Tensor:
    """Return a mask's raster with the mean over a whole window taken in one go."""
    rows, columns = (int(side * soft / 2) for side in mask.shape)
    padded = F.pad(mask.double()[None, None], (columns, columns, rows, rows), mode="replicate")
    blurred = F.avg_pool2d(padded, (2 * rows + 1, 2 * columns + 1), stride=1)
    return F.interpolate(blurred, grid, mode="area")[0, 0].float()


@pytest.mark.parametrize(("height", "width"), [(40, 64), (33, 21), (256, 100), (1, 7)])
@pytest.mark.parametrize("soft", [0.01, 0.2, 1.0])
def test_a_soft_edge_is_the_mean_over_a_window(height: int, width: int, soft: float) -> None:
    mask = torch.rand(height, width, generator=torch.Generator().manual_seed(0))
    found = rasterise(Region(mask="m", soft=soft), {"m": mask}, 8, 6)
    torch.testing.assert_close(found, blurred_at_once(mask, soft, (8, 6)))


@pytest.mark.parametrize(("height", "width"), [(1024, 1024), (600, 1400)])
def test_a_large_mask_with_a_soft_edge_is_quick_and_nearly_the_same(height: int, width: int) -> None:
    mask = torch.zeros(height, width)
    mask[height // 4 : height // 2, width // 3 :] = 1
    small = F.interpolate(mask[None, None], scale_factor=0.25, mode="area")[0, 0]
    began = time.perf_counter()
    found = rasterise(Region(mask="m", soft=0.2), {"m": mask}, 64, 64)
    assert time.perf_counter() - began < 2
    assert (found - blurred_at_once(small, 0.2, (64, 64))).abs().max() < 0.05


def test_a_sharp_mask_keeps_every_pixel() -> None:
    mask = torch.rand(600, 900, generator=torch.Generator().manual_seed(0))
    found = rasterise(Region(mask="m"), {"m": mask}, 300, 300)
    torch.testing.assert_close(found, F.interpolate(mask[None, None], (300, 300), mode="area")[0, 0])


def test_a_raster_is_computed_once_for_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from share_diffusion import regions

    asked = []
    plain = regions.rasterise
    monkeypatch.setattr(regions, "rasterise", lambda *all: (asked.append(all), plain(*all))[1])
    region, masks = Region(mask="m", soft=0.1), Masks({"m": torch.rand(20, 20)})
    for _ in range(3):
        field = Field([[None, region]], masks, torch.ones(1, 2))
        field.map(8, 8, torch.ones(1))
        area(region, masks)
    assert len(asked) == 3  # the whole picture and the region on 8 x 8, and the region's share
