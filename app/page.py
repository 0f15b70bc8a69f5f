"""The whole page, put together from its parts; it talks to an engine and knows no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from app.api import wire_api
from app.comparing import comparing
from app.components import line, script
from app.drawing import Sessions, wire_draw
from app.inside import inside
from app.learning import learning
from app.past import history_of, wire_history
from app.regions import regions
from app.remember import browser_form, form_from, wire_remember
from app.restoring import restoring, wire_restoring
from app.shelf import shelf_state, wire_blend, wire_library
from app.speak import plain, said, spoken
from app.studio import QUIET, Canvas, Studio, canvas, controls, library
from app.taking import taking
from app.words import WORDS

STYLE = Path(__file__).parent / "style.css"
HOUR, DAY = 3600, 86_400


def create_page(engine: Any) -> gr.Blocks:
    """Return the page of an engine."""
    sessions = Sessions()
    with gr.Blocks(title=WORDS.title, analytics_enabled=False, fill_width=True, delete_cache=(HOUR, DAY)) as page:
        saved = browser_form(engine.folder)
        with gr.Row(elem_id="top"):
            gr.Markdown(f"# {WORDS.title}", elem_id="title")
            facts = line("facts")
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab(WORDS.tab_draw, id="draw"), gr.Row(elem_id="desk", elem_classes="desk"):
                studio, stage, shelf = controls(engine), canvas(), library()
                with studio.extras:
                    panel = restoring()
                    taking(engine, studio)
            with gr.Tab(WORDS.tab_compare, id="compare"):
                comparing(engine, studio, sessions)
            with gr.Tab(WORDS.tab_regions, id="regions") as regions_tab:
                regions(engine, studio, sessions, regions_tab)
            with gr.Tab(WORDS.tab_learn, id="learn"):
                news = learning(engine)
            with gr.Tab(WORDS.tab_inside, id="inside") as inside_tab:
                inside(engine, inside_tab)
        wire_blend(engine, studio, shelf)
        shelf_outputs = wire_library(engine, studio, shelf)
        wire_draw(engine, studio, stage, sessions)
        wire_history(engine, stage)
        wire_restoring(engine, studio, stage, shelf, panel)
        wire_remember(studio, saved)
        wire_api(engine)

        @spoken
        def learned(query: str, kind: str, blend: str) -> tuple[Any, ...]:
            engine.refresh()
            return *shelf_state(engine, query, kind, 0, blend), headline(engine)

        news.change(learned, [shelf.search, shelf.kind, studio.written], [*shelf_outputs, facts], **QUIET)
        wire_load(page, engine, saved, studio, stage, [*shelf_outputs, facts])
    return page


def headline(engine: Any) -> str:
    """Return what is open, in one line."""
    return WORDS.facts(engine.base, engine.file.name if engine.file else "", len(engine.cards))


def wire_load(page: gr.Blocks, engine: Any, saved: gr.BrowserState, studio: Studio, stage: Canvas, heads: list[Any]) -> None:
    """Fill a page that opens or reloads: cards, history, the newest picture, and the form as the browser kept it."""

    @spoken
    def load(form: Any) -> dict[Any, Any]:
        problem = looked(engine)
        values, mixer = form_from(form, engine)
        cards = shelf_state(engine, "", "all", 0, values.get("blend", ""))
        shown, number, text = history_of(engine, 0)
        filled: dict[Any, Any] = {component: values[name] for name, component in studio.fields.items() if name in values}
        filled |= dict(zip(heads, (*cards, headline(engine)), strict=True))
        if "blend" in values:
            filled[studio.mixer] = mixer
        if problem:
            filled[stage.meter] = {"text": problem}
        filled |= {stage.history: shown, stage.history_page: number, stage.history_line: text}
        if whole := [tile["id"] for tile in shown["tiles"] if tile["picture"]]:
            filled[stage.picture] = str(engine.history.path(whole[0]))
        return filled

    outputs = [*studio.fields.values(), *heads, studio.mixer]
    outputs += [stage.history, stage.history_page, stage.history_line, stage.picture, stage.meter]
    page.load(load, [saved], outputs, **QUIET)


def looked(engine: Any) -> str:
    """Look at the subspace file again and return what is wrong with it; the page goes on with what it has."""
    try:
        engine.refresh()
    except (OSError, ValueError) as error:
        return said(error)
    return plain(engine.trouble)


def appearance() -> dict[str, Any]:
    """Return the theme, style and script that `launch` takes; this theme alone has WCAG AA's contrast and asks no server."""
    theme = gr.themes.Monochrome(
        font=["ui-sans-serif", "system-ui", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "DejaVu Sans Mono", "monospace"],
        text_size="sm",
        spacing_size="sm",
        radius_size="md",
    )
    return {"theme": theme, "css_paths": [STYLE], "js": script("names")}
