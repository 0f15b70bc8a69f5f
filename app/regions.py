"""The tab where regions are painted: one layer for each concept, then a drawing in which each acts only there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from app import mix
from app.comparing import bench, off, on
from app.components import line
from app.drawing import Sessions, wish_of
from app.masks import write_mask
from app.preview import montage
from app.speak import said, spoken
from app.studio import GPU, QUIET, Studio
from app.words import WORDS
from share_diffusion.blend import Blend, Region, Term

LAYERS = 3
COLOURS = ("#d9480f", "#1971c2", "#2f9e44")
SIDE = 512
SOFT = 0.05
PAINTED = "painted"
OURS = re.compile(rf"{PAINTED}\d+")


def regions(engine: Any, studio: Studio, sessions: Sessions, tab: gr.Tab) -> None:
    """Lay out the tab and wire it."""
    names = [WORDS.region_layer(index) for index in range(LAYERS)]
    with gr.Row(elem_classes="desk"):
        with gr.Column(scale=4, min_width=320):
            canvas = gr.ImageEditor(
                label=WORDS.region_canvas,
                show_label=False,
                type="numpy",
                image_mode="RGBA",
                sources=[],
                transforms=(),
                canvas_size=(SIDE, SIDE),
                fixed_canvas=True,
                height=SIDE + 90,
                elem_id="region-canvas",
                buttons=[],
                layers=gr.LayerOptions(allow_additional_layers=False, layers=names),
                brush=gr.Brush(default_size=60, colors=list(COLOURS), color_mode="fixed"),
            )
        with gr.Column(scale=2, min_width=260):
            line("region-note", WORDS.region_note)
            chosen = [
                gr.Dropdown([], label=name, elem_id=f"region-{index}", allow_custom_value=True)
                for index, name in enumerate(names)
            ]
            draw, place = bench("region", WORDS.region_draw)
        with gr.Column(scale=4, min_width=320):
            picture = gr.Image(
                label=WORDS.canvas,
                show_label=False,
                type="filepath",
                format="jpeg",
                interactive=False,
                elem_id="region-picture",
                buttons=["download", "fullscreen"],
            )

    @spoken
    def work(request: gr.Request, painting: Any, *values: Any) -> Iterator[Any]:
        wish = wish_of(engine, values[LAYERS:], lambda blend: painted(painting, values[:LAYERS], blend)).changed(count=1)
        stop = sessions.begin(request)
        yield {place.meter: {"text": WORDS.waiting}, draw: off(), place.stop: on()}
        try:
            for frame in engine.draw([wish], stop):
                now = {"text": WORDS.step(frame.step, frame.steps), "done": frame.step, "of": frame.steps}
                if frame.ids:
                    path = str(engine.history.path(frame.ids[0]))
                    done = {"text": WORDS.cells(1)}
                    yield {picture: path, place.meter: done, draw: on(), place.stop: off(), **taken(wish)}
                else:
                    yield {place.meter: now, **({picture: montage(frame.previews)} if frame.previews else {})}
        except Exception as error:
            stopped = stop.is_set() and not isinstance(error, ValueError)
            text = WORDS.stopped if stopped else said(error)
            yield {place.meter: {"text": text}, draw: on(), place.stop: off()}
            if not stopped:
                raise

    def taken(wish: Any) -> dict[Any, Any]:
        """The regions go into the form, so that Draw and Compare use them as well."""
        return {studio.masks: wish.masks, studio.written: wish.blend, studio.mixer: mix.mixer_of(wish.blend)}

    def halt(request: gr.Request) -> tuple[Any, ...]:
        sessions.end(request)
        return {"text": WORDS.stopped}, on(), off()

    def offer(written: str, *now: str | None) -> tuple[gr.Dropdown, ...]:
        held = mix.names_of(written)
        return tuple(gr.Dropdown(choices=held, value=name) for name in layers_of(held, now))

    outputs = [picture, place.meter, draw, place.stop, studio.masks, studio.written, studio.mixer]
    running = draw.click(
        work,
        [canvas, *chosen, *studio.form],
        outputs,
        show_progress="hidden",
        trigger_mode="once",
        api_visibility="private",
        **GPU,
    )
    place.stop.click(halt, None, [place.meter, draw, place.stop], cancels=[running], **QUIET)
    tab.select(offer, [studio.written, *chosen], chosen, **QUIET)


def layers_of(held: Sequence[str], now: Sequence[str | None]) -> list[str | None]:
    """Return each layer's concept: the one it has while the blend holds it, else the next that no layer has."""
    kept = [name if name in held else None for name in now]
    free = (name for name in held if name not in kept)
    return [name or next(free, None) for name in kept]


def painted(painting: Any, chosen: tuple[str | None, ...], written: str) -> tuple[str, dict[str, str]]:
    """Return the blend with each painted concept bound to its region, and the regions as masks.

    What was painted here before counts no more; layers of one concept are one region.
    """
    blend = Blend.parse(written)
    if lost := [name for name in chosen if name and name not in blend.names]:
        raise ValueError(f"{lost[0]!r} is not in the blend; add it under Draw first")
    found = areas(list((painting or {}).get("layers") or []), chosen)
    if not found:
        raise ValueError("no region is painted yet; choose a concept for a layer and paint on it")
    names = {concept: f"{PAINTED}{number}" for number, concept in enumerate(found, 1)}
    terms = [bound(term, names.get(term.name)) for term in blend.terms]
    keys = [(term.name, term.options) for term in terms]
    if twice := [name for name, options in keys if keys.count((name, options)) > 1]:
        raise ValueError(WORDS.region_twice(twice[0]))
    masks = {names[concept]: write_mask(Image.fromarray((area * 255).astype(np.uint8))) for concept, area in found.items()}
    return str(Blend(terms, blend.method)), masks


def areas(layers: list[Any], chosen: tuple[str | None, ...]) -> dict[str, Any]:
    """Return where each chosen concept is painted, (height, width) of truth values."""
    found: dict[str, Any] = {}
    for layer, name in zip(layers, chosen, strict=False):
        area = np.asarray(layer)[..., 3] > 0
        if name and area.any():
            found[name] = found[name] | area if name in found else area
    return found


def bound(term: Term, region: str | None) -> Term:
    """Return a term bound to a painted region, or free of the one that it was bound to here before."""
    if region is not None:
        return replace(term, region=Region(mask=region, soft=SOFT))
    before = term.region is not None and OURS.fullmatch(term.region.mask or "") is not None
    return replace(term, region=None) if before else term
