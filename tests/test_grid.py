"""Facts about sweeps and strips: every cell is what its own settings draw, and they travel with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from test_attach import random_lora, refusal, small_pipeline

from share_diffusion.attached import attach
from share_diffusion.blend import Blend
from share_diffusion.drawing import Sampling, generate, read_settings
from share_diffusion.grid import Axis, Grid, fitted, strip, sweep
from share_diffusion.models.identity import identify
from share_diffusion.subspace import Subspace

SMALL = Sampling(steps=2, guidance_scale=2.0, width=16, height=32)


@pytest.fixture(scope="module")
def handle() -> Any:
    pipeline = small_pipeline()
    loras = {"ink": random_lora(pipeline, 1), "neon": random_lora(pipeline, 2)}
    with attach(pipeline, Subspace.fit(loras, base=identify(pipeline))) as attached:
        yield attached


def redrawn(handle: Any, settings: dict[str, Any]) -> Image.Image:
    """The picture that settings draw, alone."""
    handle.set_blend(settings["blend"])
    sampling = Sampling(*(settings[key] for key in ("steps", "guidance_scale", "negative_prompt", "width", "height")))
    return generate(handle.pipeline, [settings["prompt"]], [settings["seed"]], sampling)[0]


def near(one: Image.Image, other: Image.Image) -> bool:
    """Whether two pictures agree to rounding."""
    assert one.size == other.size
    return np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max() <= 2


def test_every_cell_of_a_sweep_is_what_its_settings_draw(handle: Any, tmp_path: Path) -> None:
    handle.set_blend("neon:0.3")
    heard: list[int] = []
    x, y = Axis("ink", (0.0, 4.0, 8.0)), Axis.parse("seed=3,4")
    grid = sweep(handle.pipeline, handle, "a cat", "neon:0.2[steps=0..1]", x, y, sampling=SMALL, progress=heard.append)
    assert (list(grid.columns), list(grid.rows), heard) == (["ink 0", "ink 4", "ink 8"], ["seed 3", "seed 4"], [6])
    assert str(grid.cells[4].blend) == "neon:0.2[steps=0..1] + ink:4"
    assert (grid.cells[4].seed, str(handle.blend)) == (4, "neon:0.3")  # and the handle is as it was
    for path, cell in zip(grid.save_frames(tmp_path / "cells"), grid.cells, strict=True):
        settings = read_settings(path)
        assert settings == grid.settings(cell)
        with Image.open(path) as stored:
            assert near(stored, redrawn(handle, settings))
    assert not near(grid.cells[0].picture, grid.cells[2].picture)
    grid.save(tmp_path / "grid.png")
    stored = read_settings(tmp_path / "grid.png")
    assert [cell["seed"] for cell in stored["cells"]] == [3, 3, 3, 4, 4, 4]
    assert stored["columns"] == ["ink 0", "ink 4", "ink 8"]
    with Image.open(tmp_path / "grid.png") as sheet:
        assert sheet.width > 3 * 160
        assert sheet.height > 2 * 320


def test_a_strip_goes_through_its_blends(handle: Any, tmp_path: Path) -> None:
    blends = ["ink", "neon:0.5", ""]
    grid = strip(handle.pipeline, handle, "a cat", blends, 5, seed=2, sampling=SMALL)
    written = [str(cell.blend) for cell in grid.cells]
    assert written == ["ink:1 + neon:0", "ink:0.5 + neon:0.25", "neon:0.5", "neon:0.25", "neon:0"]
    assert list(grid.columns) == ["0 %", "25 %", "50 %", "75 %", "100 %"]
    ends = [
        redrawn(handle, grid.settings(cell) | {"blend": text}) for cell, text in ((grid.cells[0], "ink"), (grid.cells[-1], ""))
    ]
    assert near(grid.cells[0].picture, ends[0])
    assert near(grid.cells[-1].picture, ends[1])
    grid.save_gif(tmp_path / "strip.gif", side=32)
    with Image.open(tmp_path / "strip.gif") as film:
        assert (film.size, film.n_frames) == ((32, 64), 8)  # there and back


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        ("robot=0,0.5,1", Axis("robot", (0.0, 0.5, 1.0))),
        ("robot=-1..1/5", Axis("robot", (-1.0, -0.5, 0.0, 0.5, 1.0))),
        ("my cat = .5..1.5/3", Axis("my cat", (0.5, 1.0, 1.5))),
        ("seed=0..3/4", Axis("seed", (0.0, 1.0, 2.0, 3.0))),
        ("robot=1", Axis("robot", (1.0,))),
    ],
)
def test_axes_read_as_people_write_them(text: str, axis: Axis) -> None:
    assert Axis.parse(text) == axis


@pytest.mark.parametrize(
    "text",
    ["robot", "robot=", "=1", "robot=a,b", "robot=0..1", "robot=0..1/0", "seed=0.5", "seed=-1"]
    + ["seed=inf", "seed=1e30", "robot=nan", "robot=0..1/1000000000"],
)
def test_what_is_no_axis_is_refused(text: str) -> None:
    assert any(
        words in refusal(lambda: Axis.parse(text)) for words in ("robot=0,0.5,1", "whole numbers", "1 to 1024", "no numbers")
    )


def test_grids_that_make_no_sense_are_refused(handle: Any) -> None:
    x = Axis("ink", (0.0,))
    assert "different things" in refusal(lambda: sweep(handle.pipeline, handle, "x", "", x, x))
    assert "two blends or more" in refusal(lambda: strip(handle.pipeline, handle, "x", [Blend()]))
    many = Axis("ink", tuple(range(40))), Axis("seed", tuple(range(40)))
    assert "at most 1024" in refusal(lambda: sweep(handle.pipeline, handle, "x", "", *many))
    assert "unknown concept 'nothing'" in refusal(lambda: sweep(handle.pipeline, handle, "x", "nothing", x, sampling=SMALL))
    assert handle.blends


def test_a_grid_without_rows_has_one() -> None:
    cells = [type("Cell", (), {"picture": Image.new("RGB", (16, 16)), "blend": Blend(), "seed": 0})()] * 2
    sheet = Grid(cells, ["a", "b"], [""], "x", SMALL).sheet(side=40)
    assert sheet.size == (8 + 2 * 48, 52 + 48)


def test_a_film_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    cells = [type("Cell", (), {"picture": Image.new("RGB", (16, 16)), "blend": Blend(), "seed": 0})()] * 2
    grid = Grid(cells, ["a", "b"], [""], "x", SMALL)
    grid.save_gif(tmp_path / "new folder" / "a.gif")
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["a.gif"]
    (tmp_path / "file").write_text("mine")
    for write in (grid.save_gif, grid.save, grid.save_frames):
        assert "choose another place" in refusal(lambda write=write: write(tmp_path / "file" / "a.gif"))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_picture_of_no_numbers_is_an_error_and_not_a_black_picture(handle: Any) -> None:
    handle.set_blend("ink:1e30")
    assert "smaller weights" in refusal(lambda: generate(handle.pipeline, ["x"], [0], SMALL))
    handle.set_blend(None)


def test_a_label_fits_and_keeps_its_end() -> None:
    draw, font = ImageDraw.Draw(Image.new("RGB", (9, 9))), ImageFont.load_default(12)
    for text in ("robot 0.5", "a very long name of a concept\nin two lines: 1.25"):
        shown = fitted(text, 90, draw, font)
        assert draw.textlength(shown, font=font) <= 90
        assert (shown == text) == (len(text) < 12)
        assert shown.endswith(text[-2:])
    assert fitted("robot", 1, draw, font) == ""
