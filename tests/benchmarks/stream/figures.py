"""The report's figures, drawn with Pillow from the cells alone (and, for the contact sheet, from kept pictures)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from PIL import Image, ImageDraw, ImageFont

from stream.cells import curve_of
from stream.scores import Matrix, Study, final, lessons, present

INK, FAINT, PAPER = (30, 30, 40), (205, 205, 212), (255, 255, 255)
COLOURS = (
    (31, 119, 180), (214, 39, 40), (44, 160, 44), (255, 127, 14), (148, 103, 189),
    (23, 190, 207), (140, 86, 75), (227, 119, 194), (127, 127, 127), (188, 189, 34),
)  # fmt: skip
CELL = 46


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return Pillow's own font."""
    return ImageFont.load_default(size=size)


def keep(image: Image.Image, path: Path) -> None:
    """Write a figure in 256 colours, small enough for the repository."""
    image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def shade(value: float) -> tuple[int, int, int]:
    """Return a colour from white (0) over blue (1); below 0 it turns red."""
    low, high = ((214, 96, 77) if value < 0 else (255, 255, 255)), (33, 102, 172)
    part = min(max(value, 0.0), 1.0)
    return tuple(round(a + (b - a) * part) for a, b in zip(low, high, strict=True))  # type: ignore[return-value]


def heat_maps(study: Study, methods: Sequence[str], path: Path) -> None:
    """Draw R of normalised losses for a few methods side by side: row after concept i, column concept j."""
    shown = [(name, next(iter(study.complete(name).values()))) for name in methods if study.complete(name)]
    last = study.horizon
    if not shown or last < 2:
        return
    width, height = last * CELL + 90, last * CELL + 110
    page = Image.new("RGB", (width * len(shown) + 20, height), PAPER)
    draw = ImageDraw.Draw(page)
    for place, (name, matrix) in enumerate(shown):
        left = place * width + 76
        draw.text((left, 6), name, fill=INK, font=font(14))
        for row in range(last):
            draw.text((left - 70, 34 + row * CELL + 14), matrix.names[row][:10], fill=INK, font=font(11))
            for column in range(row + 1):
                value = matrix.value(row + 1, matrix.names[column], study.rho)
                if value is None:
                    continue
                box = (left + column * CELL, 30 + row * CELL, left + (column + 1) * CELL - 2, 30 + (row + 1) * CELL - 2)
                draw.rectangle(box, fill=shade(value))
                dark = value > 0.55
                draw.text((box[0] + 8, box[1] + 14), f"{value:.2f}", fill=PAPER if dark else INK, font=font(12))
            draw.text((left + row * CELL + 4, 34 + last * CELL), matrix.names[row][:6], fill=INK, font=font(10))
    about = "row: after learning it; column: concept; 0 base, 1 own LoRA (held-out loss)"
    draw.text((10, height - 24), about, fill=INK, font=font(12))
    keep(page, path)


class Axes:
    """A plain frame with ticks, one or both axes logarithmic."""

    def __init__(self, size: tuple[int, int], x: tuple[float, float], y: tuple[float, float], log_x: bool = False) -> None:
        self.image = Image.new("RGB", size, PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.box = (64, 16, size[0] - 16, size[1] - 46)
        self.x, self.y, self.log_x = x, y, log_x
        self.draw.rectangle(self.box, outline=FAINT)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the pixel of a point."""
        low, high = (math.log10(self.x[0]), math.log10(self.x[1])) if self.log_x else self.x
        across = ((math.log10(x) if self.log_x else x) - low) / (high - low)
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return self.box[0] + across * (self.box[2] - self.box[0]), self.box[3] - up * (self.box[3] - self.box[1])

    def ticks(self, xs: Mapping[float, str], ys: Sequence[float], x_name: str, y_name: str) -> None:
        """Draw ticks, faint lines and the names of the axes."""
        for value, text in xs.items():
            if self.x[0] <= value <= self.x[1]:
                place = self.at(value, self.y[0])[0]
                self.draw.line((place, self.box[1], place, self.box[3]), fill=FAINT)
                self.draw.text((place - 12, self.box[3] + 4), text, fill=INK, font=font(11))
        for value in ys:
            place = self.at(self.x[0], value)[1]
            self.draw.line((self.box[0], place, self.box[2], place), fill=FAINT)
            self.draw.text((22, place - 7), f"{value:.2f}", fill=INK, font=font(11))
        self.draw.text((self.box[0], self.box[3] + 22), f"{x_name}   (upwards: {y_name})", fill=INK, font=font(12))

    def mark(self, x: float, y: float, colour: tuple[int, int, int], text: str = "") -> None:
        """Draw a dot with a name beside it; a value below the frame stands at its edge, in figures."""
        text, y = (text, y) if y >= self.y[0] else (f"{text} ({y:.2f})", self.y[0])
        across, up = self.at(x, y)
        self.draw.ellipse((across - 5, up - 5, across + 5, up + 5), fill=colour)
        self.draw.text((across + 8, up - 8), text, fill=INK, font=font(11))

    def line(self, points: Sequence[tuple[float, float]], colour: tuple[int, int, int]) -> None:
        """Draw a line through points, those outside the frame at its edge."""
        inside = [(x, min(max(y, self.y[0]), self.y[1])) for x, y in points]
        self.draw.line([self.at(*point) for point in inside], fill=colour, width=2)


def quality_against_bytes(study: Study, summary: Mapping[str, Mapping[str, float | None]], path: Path) -> None:
    """Draw every method's final score over the bytes of all its files."""
    points = [
        (name, values["bytes_total"], values["normalised"])
        for name, values in summary.items()
        if values["bytes_total"] and values["normalised"] is not None
    ]
    if not points:
        return
    low, high = min(point[1] for point in points), max(point[1] for point in points)  # type: ignore[type-var]
    axes = Axes((760, 460), (low / 1.6, high * 2.6), (-0.35, 1.2), log_x=True)  # type: ignore[operator]
    sizes = {10**power * step: f"{step * 10**power / 1000:g} kB" for power in (3, 4, 5, 6) for step in (1, 3)}
    axes.ticks(sizes, [0.0, 0.25, 0.5, 0.75, 1.0], "bytes of all files, log scale", "normalised score after the last concept")
    for index, (name, size, score) in enumerate(points):
        axes.mark(size, score, COLOURS[index % len(COLOURS)], name)  # type: ignore[arg-type]
    keep(axes.image, path)


def learning_curves(study: Study, methods: Sequence[str], path: Path) -> None:
    """Draw the mean normalised score over training steps of the concepts after the first."""
    axes = Axes((700, 430), (0, study.plan.training.steps), (-0.2, 1.2))
    axes.ticks({step: str(step) for step in (0, *study.plan.measures.curve, study.plan.training.steps)},
               [0.0, 0.25, 0.5, 0.75, 0.95], "training steps of one concept", "normalised score")  # fmt: skip
    drawn = 0
    for index, name in enumerate(methods):
        lines = [normalised_curve(study, row) for row in lessons(study, name) if row["curve"]]
        lines = [line for line in lines if line]
        if lines:
            shared = sorted(set.intersection(*(set(line) for line in lines)))
            axes.line([(step, mean(line[step] for line in lines)) for step in shared], COLOURS[index % len(COLOURS)])
            axes.draw.text((460, 250 + 16 * drawn), name, fill=COLOURS[index % len(COLOURS)], font=font(12))
            drawn += 1
    if drawn:
        keep(axes.image, path)


def normalised_curve(study: Study, row: dict) -> dict[int, float]:
    """Return a lesson's curve in shares of the own LoRA's gain on the same draws."""
    own = study.own.get((row["seed"], row["concept"]))
    if own is None or not own["curve"]:
        return {}
    curve, target = curve_of(row), curve_of(own)
    gain = target[0] - target[max(target)]
    return {step: (curve[0] - loss) / gain for step, loss in curve.items()} if gain > 0 else {}


def over_the_stream(study: Study, methods: Sequence[str], path: Path) -> None:
    """Draw the mean score of all concepts so far over the stream."""
    last = study.horizon
    if last < 2:
        return
    axes = Axes((700, 400), (1, last), (-0.3, 1.2))
    axes.ticks({place: str(place) for place in range(1, last + 1)}, [0.0, 0.25, 0.5, 0.75, 1.0],
               "concepts learned", "mean normalised score of all so far")  # fmt: skip
    drawn = 0
    for index, name in enumerate(methods):
        points = [(after, scores_at(study, list(study.complete(name).values()), after)) for after in range(1, last + 1)]
        known = [(after, score) for after, score in points if score is not None]
        if len(known) > 1:
            axes.line(known, COLOURS[index % len(COLOURS)])
            axes.draw.text((80, 230 + 15 * drawn), name, fill=COLOURS[index % len(COLOURS)], font=font(12))
            drawn += 1
    keep(axes.image, path)


def adherence_and_identity(study: Study, methods: Sequence[str], path: Path) -> None:
    """Draw how often pictures show the concept over how often they keep to the prompt, at several scales of its weight."""
    curves = {name: points for name in methods if len(points := over_scales(study, name)) > 1}
    if not curves:
        return
    every = [adherence for points in curves.values() for adherence, _ in points.values()]
    low, high = min(every) - 0.05, max(every) + 0.05
    axes = Axes((700, 430), (low, high), (0.0, 1.05))
    ticks = {step / 20: f"{step / 20:.2f}" for step in range(21) if low <= step / 20 <= high}
    axes.ticks(ticks, [0.0, 0.25, 0.5, 0.75, 1.0], "attributes as the prompt asks", "pictures that show the concept")
    for index, (name, points) in enumerate(curves.items()):
        axes.line([points[scale] for scale in sorted(points)], COLOURS[index % len(COLOURS)])
        for scale, point in points.items():
            axes.mark(*point, COLOURS[index % len(COLOURS)], f"{scale:g}")
        axes.draw.text((80, 330 + 16 * index), name, fill=COLOURS[index % len(COLOURS)], font=font(12))
    keep(axes.image, path)


def over_scales(study: Study, method: str) -> dict[float, tuple[float, float]]:
    """Return (adherence, judge's share) by scale after the last concept of order 0 and seed 0, means over the concepts."""
    last = len(study.plan.order(0))
    cells = [
        row
        for row in study.rows
        if (row["method"], row["order"], row["seed"], row["after"]) == (method, 0, 0, last) and row["judge"] != ""
    ]
    scales = {row["weight"]: [other for other in cells if other["weight"] == row["weight"]] for row in cells}
    return {
        scale: (mean(row["adherence"] for row in rows), mean(row["judge"] for row in rows))
        for scale, rows in sorted(scales.items())
        if len(rows) == last
    }


def scores_at(study: Study, matrices: Sequence[Matrix], after: int) -> float | None:
    """Return the mean score after so many concepts."""
    values = present(final(matrix, after, study.rho) for matrix in matrices)
    return mean(values) if values else None


def contact_sheet(study: Study, methods: Sequence[str], pictures: Path, path: Path) -> None:
    """Draw the same seed for every concept: when it was learned and after the last one, method by method."""
    names, last = study.plan.order(0)[: study.horizon], study.horizon
    lines: list[tuple[str, list[Path]]] = []
    for method in methods:
        when = [pictures / method / f"{place + 1:02d}-{name}.png" for place, name in enumerate(names)]
        end = [pictures / method / f"{last:02d}-{name}.png" for name in names]
        both = [(f"{method}: when learned", when), (f"{method}: after {last}", end)]
        lines += [(text, files) for text, files in both if any(file.exists() for file in files)]
    if not lines:
        return
    width, step = 128 * 2, 128 + 24
    page = Image.new("RGB", (len(names) * (width + 8) + 8, len(lines) * step + 30), PAPER)
    draw = ImageDraw.Draw(page)
    for row, (text, files) in enumerate(lines):
        draw.text((8, row * step + 4), text, fill=INK, font=font(13))
        for column, file in enumerate(files):
            if file.exists():
                with Image.open(file) as picture:
                    large = picture.resize((width, 128), Image.Resampling.NEAREST)
                page.paste(large, (8 + column * (width + 8), row * step + 22))
    for column, name in enumerate(names):
        draw.text((8 + column * (width + 8), len(lines) * step + 8), name, fill=INK, font=font(13))
    keep(page, path)
