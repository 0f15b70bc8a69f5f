"""The whole page, put together from its parts; it talks to an engine and knows no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from app.components import line
from app.studio import (
    QUIET,
    Sessions,
    canvas,
    controls,
    history_of,
    library,
    shelf_of,
    wire_blend,
    wire_draw,
    wire_history,
    wire_library,
)
from app.words import WORDS

STYLE = Path(__file__).parent / "style.css"
HOUR, DAY = 3600, 86_400


def create_page(engine: Any) -> gr.Blocks:
    """Return the page of an engine."""
    sessions = Sessions()
    with gr.Blocks(title=WORDS.title, analytics_enabled=False, fill_width=True, delete_cache=(HOUR, DAY)) as page:
        with gr.Row(elem_id="top"):
            gr.Markdown(f"# {WORDS.title}", elem_id="title")
            facts = line("facts")
        with gr.Tabs(elem_id="tabs"), gr.Tab(WORDS.tab_draw, id="draw"), gr.Row(elem_id="desk"):
            studio = controls(engine)
            stage = canvas()
            shelf = library()
        wire_blend(engine, studio, shelf)
        shelf_outputs = wire_library(engine, studio, shelf)
        wire_draw(engine, studio, stage, sessions)
        wire_history(engine, stage)

        def load(query: str, kind: str, blend: str) -> tuple[Any, ...]:
            engine.refresh()
            shown, number, text, missing = shelf_of(engine, query, kind, 0, blend)
            file = engine.file.name if engine.file else ""
            head = WORDS.facts(engine.base, file, len(engine.cards))
            return shown, number, text, gr.Timer(active=missing), *history_of(engine, 0), head

        page.load(
            load,
            [shelf.search, shelf.kind, studio.written],
            [*shelf_outputs, stage.history, stage.history_page, stage.history_line, facts],
            **QUIET,
        )
        page.unload(lambda: None)
    return page


def appearance() -> dict[str, Any]:
    """Return the theme and style that `launch` takes; this theme alone passes WCAG AA in light and dark, and asks no server."""
    theme = gr.themes.Monochrome(
        font=["ui-sans-serif", "system-ui", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "DejaVu Sans Mono", "monospace"],
        text_size="sm",
        spacing_size="sm",
        radius_size="md",
    )
    return {"theme": theme, "css_paths": [STYLE]}
