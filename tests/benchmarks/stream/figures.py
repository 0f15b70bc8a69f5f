"""The report's figures: plots by matplotlib from the cells alone, and a contact sheet from kept pictures by Pillow."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox
from PIL import Image, ImageDraw, ImageFont

from stream.cells import curve_of
from stream.scores import Matrix, Study, final, lessons, present

INK, PAPER = (30, 30, 40), (255, 255, 255)
MAIN = {
    "own_lora": "#222222",
    "share": "#d62728",
    "share_seed": "#ff7f0e",
    "paper": "#9467bd",
    "sequential_lora": "#7f7f7f",
    "joint_lora": "#17becf",
}
OTHERS = ("#1f77b4", "#2ca02c", "#8c564b", "#e377c2", "#bcbd22", "#aec7e8", "#98df8a", "#c49c94", "#f7b6d2", "#dbdb8d")
KINDS = {  # of methods: what they are called, marker and colour
    "share": ("Share", "*", "#d62728"),
    "own_lora": ("a LoRA for each", "s", "#222222"),
    "compressed": ("the same, made small", "D", "#7a7a85"),
    "paper": ("the paper's recipe", "P", "#9467bd"),
    "joint": ("one LoRA for all at once", "^", "#17a2b8"),
    "sequential": ("one LoRA that goes on", "o", "#1f77b4"),
    "merged": ("LoRAs merged into one", "v", "#2ca02c"),
}
STYLES = ("-", "--", ":")
LOWEST = -0.3  # of a score in a figure; what lies below stands at the edge, in figures
PLACES = ((6, 0, "left"), (-6, 0, "right"), (6, 9, "left"), (6, -9, "left"), (-6, 9, "right"), (-6, -9, "right"))
FURTHER = tuple((x, y * 2, side) for x, y, side in PLACES if y) + tuple((x, y * 3, side) for x, y, side in PLACES if y)


def colours(names: Sequence[str]) -> dict[str, str]:
    """Return a colour for every method, the same in every figure for the main ones."""
    rest = [name for name in names if name not in MAIN]
    return {**MAIN, **{name: OTHERS[index % len(OTHERS)] for index, name in enumerate(rest)}}


def looks(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return colour and style of every method's line: where colours come round again, lines are dashed, then dotted."""
    rest = [name for name in names if name not in MAIN]
    styles = {name: STYLES[index // len(OTHERS) % len(STYLES)] for index, name in enumerate(rest)}
    return {name: {"color": colour, "linestyle": styles.get(name, "-")} for name, colour in colours(names).items()}


def plot(width: float, height: float, x: str, y: str) -> tuple[Figure, Axes]:
    """Return a figure of so many inches with one plain pair of axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="#e4e4ea")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def write(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG of few colours, small enough for the repository."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, format="png")
    with Image.open(drawn) as image:
        keep(image, path)


def keep(image: Image.Image, path: Path) -> None:
    """Write a picture in 256 colours."""
    image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def legend(axes: Axes) -> None:
    """Put the legend beside the axes, where it hides nothing."""
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)


def heat_maps(study: Study, methods: Sequence[str], path: Path) -> None:
    """Draw R of normalised losses for a few methods side by side: row after concept i, column concept j."""
    shown = [(name, next(iter(study.complete(name).values()))) for name in methods if study.complete(name)]
    last = study.horizon
    if not shown or last < 2:
        return
    side = 0.52 * last + 0.9
    figure = Figure(figsize=(side * len(shown) + 0.8, side + 0.6), layout="constrained")
    every = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (name, matrix) in zip(every, shown, strict=True):
        names = matrix.names[:last]
        values = [[matrix.value(row + 1, names[column], study.rho) for column in range(row + 1)] for row in range(last)]
        grid = [
            [float("nan") if value is None else value for value in row] + [float("nan")] * (last - len(row)) for row in values
        ]
        drawn = axes.imshow(grid, cmap=colormaps["RdYlBu"], vmin=-0.5, vmax=1.25)
        for row, cells in enumerate(values):
            for column, value in enumerate(cells):
                if value is not None:
                    dark = value > 0.9 or value < -0.3
                    axes.text(
                        column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if dark else "black"
                    )
        axes.set_title(name, fontsize=11)
        axes.set_xticks(range(last), names, rotation=60, ha="right", fontsize=8)
        axes.set_yticks(range(last), names, fontsize=8)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    figure.colorbar(drawn, ax=list(every), extend="min", shrink=0.8, pad=0.01).set_label("score")
    figure.supxlabel(
        "rows: after this concept was learned; columns: how well that one is known; 0 is the base, 1 its own LoRA (loss); "
        "order 0, seed 0",
        fontsize=10,
    )
    write(figure, path)


def quality_against_bytes(study: Study, summary: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw every method's final score over the bytes of all its files, and the front that no other method is beyond."""
    points = {
        name: (values["bytes_total"], values["normalised"])
        for name, values in summary.items()
        if values["bytes_total"] and values["normalised"] is not None
    }
    if not points:
        return
    figure, axes = plot(9.5, 5.6, "bytes of all files", "score after the last concept: 0 the base, 1 its own LoRA")
    axes.set_xscale("log")
    axes.set_xlim(0.6 * min(size for size, _ in points.values()), 1.7 * max(size for size, _ in points.values()))
    axes.set_ylim(LOWEST - 0.13, 1.15)
    front = [point for point in sorted(points.values()) if point[1] == max(s for b, s in points.values() if b <= point[0])]
    axes.step(
        *zip(*front, strict=True), where="post", color="#d62728", linewidth=0.8, linestyle=":", zorder=1, label="nothing beyond"
    )
    seen: set[str] = set()
    for name, (size, score) in points.items():
        kind = study.plan.methods[name]["kind"]
        label, marker, colour = KINDS[kind]
        axes.scatter(
            size,
            max(score, LOWEST),
            color=colour,
            marker=marker,
            s=150 if kind == "share" else 45,
            label=None if kind in seen else label,
            zorder=3,
        )
        seen.add(kind)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:g} MB"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    legend(axes)
    label_points(
        axes,
        {
            name if score >= LOWEST else f"{name}, {score:.2f} ↓": (size, max(score, LOWEST))
            for name, (size, score) in sorted(points.items(), key=lambda item: -item[1][1])
        },
    )
    write(figure, path)


def label_points(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Write each point's name beside it, at the first of a few places where it lies on no other name or point."""
    canvas = FigureCanvasAgg(axes.figure)
    canvas.draw()
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in axes.transData.transform(list(points.values()))]
    for name, point in points.items():
        for x, y, side in (*PLACES, *FURTHER):
            text = axes.annotate(
                name, point, (x, y), textcoords="offset points", ha=side, va="center", fontsize=7.5, color="#333333"
            )
            box = text.get_window_extent(canvas.get_renderer())
            if not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        else:
            axes.annotate(name, point, (6, 0), textcoords="offset points", va="center", fontsize=7.5, color="#333333")
            continue
        taken.append(box)


def learning_curves(study: Study, methods: Sequence[str], path: Path) -> None:
    """Draw the mean normalised score over training steps of the concepts after the first.

    An adapter that goes on training starts from what it was, not from the base, so that its curve begins at the first
    watched step.
    """
    figure, axes = plot(8.5, 4.4, "training steps of one concept", "score: 0 the base, 1 its own LoRA")
    look = looks(methods)
    for name in methods:
        lines = [line for row in lessons(study, name) if row["curve"] and (line := normalised_curve(study, row))]
        if lines:
            goes_on = study.plan.methods[name]["kind"] == "sequential"
            shared = sorted(set.intersection(*(set(line) for line in lines)) - ({0} if goes_on else set()))
            heights = [mean(line[step] for line in lines) for step in shared]
            axes.plot(shared, heights, label=name, **look[name])
    if axes.lines:
        axes.axhline(0.95, color="#999999", linewidth=0.8, linestyle="--", label="0.95")
        axes.set_ylim(LOWEST, 1.1)
        axes.set_xlim(0, study.plan.training.steps)
        legend(axes)
        write(figure, path)


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
    figure, axes = plot(8.5, 4.4, "concepts learned", "mean score of all so far")
    look = looks(methods)
    for name in methods:
        points = [(after, scores_at(study, list(study.complete(name).values()), after)) for after in range(1, last + 1)]
        known = [(after, score) for after, score in points if score is not None]
        if len(known) > 1:
            axes.plot(*zip(*known, strict=True), label=name, marker=".", markersize=5, **look[name])
    axes.set_yscale("symlog", linthresh=1.0, linscale=2.0)
    axes.set_ylim(top=1.2)
    axes.set_yticks([-10, -3, -1, -0.5, 0, 0.5, 1], ["-10", "-3", "-1", "-0.5", "0", "0.5", "1"])
    axes.set_xticks(range(1, last + 1))
    legend(axes)
    write(figure, path)


def adherence_and_identity(study: Study, methods: Sequence[str], path: Path) -> None:
    """Draw how often pictures show the concept over how often they keep to the prompt, at several scales of its weight."""
    curves = {name: points for name in methods if len(points := over_scales(study, name)) > 1}
    if not curves:
        return
    figure, axes = plot(7.5, 4.4, "share of attributes that are as the prompt asks", "share of pictures that show the concept")
    chosen = colours(methods)
    for name, points in curves.items():
        ordered = [points[scale] for scale in sorted(points)]
        axes.plot(*zip(*ordered, strict=True), color=chosen[name], marker="o", markersize=4, label=name)
        for scale, point in points.items():
            axes.annotate(f"{scale:g}", point, xytext=(5, -11), textcoords="offset points", fontsize=8, color=chosen[name])
    legend(axes)
    write(figure, path)


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


def energy_held(shares: Mapping[tuple[str, int], Sequence[float]], path: Path) -> None:
    """Draw the mean share of the concepts' energy that bases of k columns hold, fit by fit."""
    figure, axes = plot(7.5, 4.2, "columns k a side", "share of energy held, mean of the concepts")
    for index, fit in enumerate(dict.fromkeys(name for name, _ in shares)):
        points = sorted((k, mean(values)) for (name, k), values in shares.items() if name == fit)
        style = "--" if fit in ("random", "stated") else "-"
        axes.plot(*zip(*points, strict=True), color=OTHERS[index % len(OTHERS)], linestyle=style, marker=".", label=fit)
    axes.set_ylim(0, 1.02)
    axes.set_xticks(sorted({k for _, k in shares}))
    legend(axes)
    write(figure, path)


def scores_at(study: Study, matrices: Sequence[Matrix], after: int) -> float | None:
    """Return the mean score after so many concepts."""
    values = present(final(matrix, after, study.rho) for matrix in matrices)
    return mean(values) if values else None


def contact_sheet(study: Study, methods: Sequence[str], pictures: Path, path: Path) -> None:
    """Draw the same seed for every concept: when it was learned and after the last one, method by method."""
    names, last = study.plan.order(0)[: study.horizon], study.horizon
    lines: list[tuple[str, list[Path]]] = []
    for method in [name for name in methods if name in study.plan.methods]:
        when = [pictures / method / f"{place + 1:02d}-{name}.png" for place, name in enumerate(names)]
        end = [pictures / method / f"{last:02d}-{name}.png" for name in names]
        both = [(f"{method}: when learned", when), (f"{method}: after {last}", end)]
        if study.plan.methods[method]["kind"] == "base":
            both = [(f"{method}: untouched", end)]
        lines += [(text, files) for text, files in both if any(file.exists() for file in files)]
    if not lines:
        return
    width, height, left, size = 128, 64, 190, 20
    page = Image.new("RGB", (left + len(names) * (width + 8), len(lines) * (height + 8) + 40), PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=size)
    for column, name in enumerate(names):
        draw.text((left + column * (width + 8), 8), name, fill=INK, font=font)
    for row, (text, files) in enumerate(lines):
        top = 40 + row * (height + 8)
        for index, part in enumerate(text.split(": ")):
            draw.text((8, top + 8 + index * (size + 4)), part, fill=INK, font=font)
        for column, file in enumerate(files):
            if file.exists():
                with Image.open(file) as picture:
                    page.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left + column * (width + 8), top))
    keep(page, path)
