"""The history on the page: look through it, show a picture, delete it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from app.speak import spoken
from app.studio import QUIET, Canvas
from app.words import WORDS

PAGE = 18


def history_of(engine: Any, number: int, chosen: str = "") -> tuple[dict[str, Any], int, str]:
    """Return the tiles of a page of the history, its number and what the line says."""
    shown, pages = engine.history.page(number, PAGE)
    number = min(max(0, number), pages - 1)
    for item in shown:
        item["on"] = item["id"] == chosen
    return {"tiles": shown}, number, WORDS.page(number, pages, len(engine.history.ids()))


def turns(engine: Any, number: int) -> tuple[Any, Any]:
    """Return the buttons that turn the history's pages, each pressed only where there is a page."""
    more = len(engine.history.ids()) > (number + 1) * PAGE
    return gr.Button(interactive=number > 0), gr.Button(interactive=more)


def wire_history(engine: Any, stage: Canvas) -> None:
    """Look through the history: show a picture, delete it, turn pages."""
    strip = [stage.history, stage.history_page, stage.history_line]

    @spoken
    def choose(event: gr.EventData, number: int) -> tuple[Any, ...]:
        name = str(event._data.get("id"))
        path, settings = engine.history.path(name), engine.history.settings(name)
        shown, number, _ = history_of(engine, number, name)
        text = f"{settings.get('prompt', '')} · {settings.get('blend') or 'no concept'} · seed {settings.get('seed', '?')}"
        picture = gr.Image(str(path), visible=True)
        buttons = gr.Button(interactive=True), gr.Button(interactive=True)
        return picture, gr.Gallery(visible=False), {"text": text}, shown, name, *buttons

    @spoken
    def remove(name: str, number: int) -> tuple[Any, ...]:
        engine.history.remove(name)
        off = gr.Button(interactive=False)
        return *history_of(engine, number), gr.Image(None), gr.Gallery(visible=False), {"text": WORDS.removed}, "", off, off

    @spoken
    def pick(event: gr.SelectData) -> tuple[Any, ...]:
        picture = event.value.get("image") if isinstance(event.value, dict) else None
        name = Path(str((picture or {}).get("path", ""))).stem
        there = engine.history.holds(name)
        return name if there else "", gr.Button(interactive=there), gr.Button(interactive=there)

    chosen = [stage.picture, stage.batch, stage.meter, stage.history, stage.chosen, stage.take, stage.remove]
    stage.history.click(choose, [stage.history_page], chosen, **QUIET)
    stage.remove.click(
        remove,
        [stage.chosen, stage.history_page],
        [*strip, stage.picture, stage.batch, stage.meter, stage.chosen, stage.take, stage.remove],
        **QUIET,
    )
    stage.batch.select(pick, None, [stage.chosen, stage.take, stage.remove], **QUIET)
    stage.history_line.change(lambda number: turns(engine, number), stage.history_page, [stage.newer, stage.older], **QUIET)
    stage.newer.click(lambda number: history_of(engine, number - 1), [stage.history_page], strip, **QUIET)
    stage.older.click(lambda number: history_of(engine, number + 1), [stage.history_page], strip, **QUIET)
