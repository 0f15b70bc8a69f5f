"""Settings out of a picture: what would change is shown first, and nothing changes before Apply."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from app import mix
from app.components import line, table
from app.drawing import form_of
from app.shelf import shelf_of
from app.speak import spoken
from app.studio import QUIET, Canvas, Library, Studio
from app.wish import Wish, restored
from app.words import WORDS
from share_diffusion.base import base_name
from share_diffusion.drawing import read_settings
from share_diffusion.pictures import MAX_PIXELS

COMPARED = (
    ("prompt", WORDS.prompt),
    ("blend", WORDS.blend),
    ("negative_prompt", WORDS.negative),
    ("seed", WORDS.seed),
    ("steps", WORDS.steps),
    ("guidance_scale", WORDS.guidance),
    ("sampler", WORDS.sampler),
    ("width", WORDS.width),
    ("height", WORDS.height),
    ("count", WORDS.count),
)


@dataclass
class Restoring:
    """The folded part of the form that takes a picture in."""

    panel: gr.Accordion
    file: gr.File
    table: gr.HTML
    note: gr.HTML
    apply: gr.Button
    cancel: gr.Button
    wish: gr.State


def restoring() -> Restoring:
    """Lay out the drop zone and the table of changes."""
    with gr.Accordion(WORDS.restore, open=False, elem_id="restore") as panel:
        file = gr.File(label=WORDS.restore_file, file_types=[".png"], type="filepath", elem_id="restore-file", height=96)
        note = line("restore-note", live=True)
        changes = table("restore-table", WORDS.restore_table)
        with gr.Row():
            apply = gr.Button(WORDS.apply, variant="primary", size="sm", visible=False, elem_id="apply", min_width=60)
            cancel = gr.Button(WORDS.cancel, size="sm", visible=False, elem_id="cancel", min_width=60)
    return Restoring(panel, file, changes, note, apply, cancel, gr.State(None))


def changes_of(now: Wish, then: Wish) -> list[list[str]]:
    """Return the fields that differ, as [label, now, then]."""
    ours, theirs = now.values, then.values
    rows = [[label, str(ours[name]), str(theirs[name])] for name, label in COMPARED if ours[name] != theirs[name]]
    return [*rows, [WORDS.masks, str(len(now.masks)), str(len(then.masks))]] if now.masks != then.masks else rows


def wire_restoring(engine: Any, studio: Studio, stage: Canvas, shelf: Library, panel: Restoring) -> None:
    """Show what a dropped or chosen picture would change, then take it over or leave all as it is."""
    shown = [panel.panel, panel.table, panel.note, panel.apply, panel.cancel, panel.wish]

    def propose(settings: dict[str, Any], form: tuple[Any, ...]) -> tuple[Any, ...]:
        if not settings:
            return gr.Accordion(open=True), none(), WORDS.restore_none, hidden(), hidden(), None
        if "cells" in settings and "blend" not in settings:
            return gr.Accordion(open=True), none(), WORDS.restore_sheet, hidden(), hidden(), None
        now = form_of(engine, form)
        then, notes = restored(settings, now, engine.limits, list(engine.cards), base_name(engine.base))
        rows = changes_of(now, then)
        if not rows:
            return gr.Accordion(open=True), none(), WORDS.restore_same, hidden(), hidden(), None
        changes = {"head": ["", WORDS.now, WORDS.then], "rows": rows}
        buttons = gr.Button(visible=True), gr.Button(visible=True)
        return gr.Accordion(open=True), changes, ". ".join(notes), *buttons, then.values

    @spoken
    def dropped(path: str | None, *form: Any) -> tuple[Any, ...]:
        if path is None:
            return gr.skip(), none(), "", hidden(), hidden(), None
        return propose(settings_of(path), form)

    @spoken
    def chosen(name: str, *form: Any) -> tuple[Any, ...]:
        return propose(engine.history.settings(name), form)

    @spoken
    def take(values: dict[str, Any] | None, query: str, kind: str, number: int) -> dict[Any, Any]:
        if values is None:
            raise ValueError("there is nothing to take over; drop a picture first")
        wish = Wish.of(values, engine.limits, list(engine.cards))
        return {
            **{component: wish.values[name] for name, component in studio.fields.items()},
            **dict(zip(shown, closed(), strict=True)),
            studio.mixer: mix.mixer_of(wish.blend),
            studio.masks: dict(wish.masks),
            studio.fresh_seed: False,
            shelf.cards: shelf_of(engine, query, kind, number, wish.blend)[0],
            stage.meter: {"text": WORDS.applied},
            panel.file: None,
        }

    panel.file.change(dropped, [panel.file, *studio.form], shown, **QUIET)
    stage.take.click(chosen, [stage.chosen, *studio.form], shown, **QUIET)
    panel.apply.click(
        take,
        [panel.wish, shelf.search, shelf.kind, shelf.page],
        [
            *studio.fields.values(),
            *shown,
            studio.mixer,
            studio.masks,
            studio.fresh_seed,
            shelf.cards,
            stage.meter,
            panel.file,
        ],
        **QUIET,
    )
    panel.cancel.click(lambda: (*closed(), None), None, [*shown, panel.file], **QUIET)


def settings_of(path: str) -> dict[str, Any]:
    """Return the settings inside an uploaded PNG; whatever is not one has none, and one that is too large is a ValueError."""
    try:
        with Path(path).open("rb") as file:
            if file.read(8) != b"\x89PNG\r\n\x1a\n":
                return {}
        return read_settings(path)
    except Image.DecompressionBombError:
        raise ValueError(f"that picture has more than {MAX_PIXELS:,} pixels; drop one that was drawn here") from None
    except (OSError, SyntaxError, ValueError):
        return {}


def closed() -> tuple[Any, ...]:
    """Return the panel with nothing in it, folded."""
    return gr.Accordion(open=False), none(), "", hidden(), hidden(), None


def none() -> dict[str, Any]:
    """Return an empty table."""
    return {"head": [], "rows": []}


def hidden() -> gr.Button:
    """Return a button out of sight."""
    return gr.Button(visible=False)
