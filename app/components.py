"""The page's own components: tiles, mixer, table and line.

Each is a `gr.HTML` whose template is a constant. Data reaches the browser as JSON and becomes text nodes there; it is
never part of a template, because Gradio evaluates a filled template as a JavaScript template string, in which a name such
as `${...}` would run even after HTML escaping.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

SCRIPTS = Path(__file__).parent / "js"


def script(name: str) -> str:
    """Return a component's behaviour."""
    return (SCRIPTS / f"{name}.js").read_text(encoding="utf-8")


def tiles(elem_id: str, label: str, empty: str, **options: Any) -> gr.HTML:
    """Return a grid of picture buttons; value {"tiles": [{id, title, note, picture, on, ...}], "empty": text}, event click."""
    template = f'<ul class="tiles" aria-label="{label}"></ul><p class="empty" hidden>{empty}</p>'
    return gr.HTML(
        {"tiles": []},
        html_template=template,
        js_on_load=script("tiles"),
        elem_id=elem_id,
        apply_default_css=False,
        **options,
    )


def mixer(elem_id: str, label: str, empty: str, **options: Any) -> gr.HTML:
    """Return the sliders of a blend; value as `mix.mixer_of` makes it, events input (a weight), delete (a concept)."""
    template = f'<ul class="mixer" aria-label="{label}"></ul><p class="empty" hidden>{empty}</p>'
    return gr.HTML(
        {"of": "", "rows": []},
        html_template=template,
        js_on_load=script("mixer"),
        elem_id=elem_id,
        apply_default_css=False,
        **options,
    )


def table(elem_id: str, label: str, **options: Any) -> gr.HTML:
    """Return a table; value {"head": [text, ...], "rows": [[text, ...], ...]}."""
    template = f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table></table></div>'
    return gr.HTML(
        {"head": [], "rows": []},
        html_template=template,
        js_on_load=script("table"),
        elem_id=elem_id,
        apply_default_css=False,
        **options,
    )


def line(elem_id: str, text: str = "", *, live: bool = False, **options: Any) -> gr.HTML:
    """Return a line of text; a live one is read out when it changes."""
    role = ' role="status" aria-live="polite"' if live else ""
    return gr.HTML(
        text,
        html_template=f'<p class="line"{role}></p>',
        js_on_load=script("line"),
        elem_id=elem_id,
        apply_default_css=False,
        **options,
    )


def meter(elem_id: str, text: str = "", **options: Any) -> gr.HTML:
    """Return a line that is read out, with a bar while something is under way; value {"text", "done", "of"}."""
    template = '<progress hidden aria-label="Progress"></progress><p class="line" role="status" aria-live="polite"></p>'
    return gr.HTML(
        {"text": text},
        html_template=template,
        js_on_load=script("meter"),
        elem_id=elem_id,
        apply_default_css=False,
        **options,
    )


def heat(elem_id: str, label: str, **options: Any) -> gr.HTML:
    """Return a shaded matrix; value {"columns", "rows", "values": [[number or None, ...]], "low", "high", "digits"}."""
    template = f'<div class="scroll heat" tabindex="0" role="region" aria-label="{label}"><table></table></div>'
    return gr.HTML(
        {"columns": [], "rows": [], "values": []},
        html_template=template,
        js_on_load=script("heat"),
        elem_id=elem_id,
        apply_default_css=False,
        **options,
    )
