"""The form survives a reload: the browser keeps it, and what comes back is checked like any other input."""

from __future__ import annotations

import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from app import mix
from app.studio import QUIET, Studio
from app.wish import checked
from share_diffusion.blend import Blend

KEY = "share-form"


def browser_form(folder: Path) -> gr.BrowserState:
    """Return the browser's copy of the form; its secret is this folder's own, so that a restart can still read it."""
    place = folder / "secret"
    if not place.is_file():
        place.write_text(secrets.token_hex(16), encoding="ascii")
        place.chmod(0o600)
    return gr.BrowserState({}, storage_key=KEY, secret=place.read_text(encoding="ascii").strip())


def wire_remember(studio: Studio, saved: gr.BrowserState) -> None:
    """Keep the form in the browser whenever it changes, without asking the server."""
    names = list(studio.fields)
    script = f"(...values) => Object.fromEntries({names}.map((name, index) => [name, values[index]]))"
    changes = [component.change for component in studio.fields.values()]
    gr.on(changes, None, list(studio.fields.values()), saved, js=script, **QUIET)


def form_from(saved: Any, engine: Any) -> tuple[dict[str, Any], mix.Mixer]:
    """Return the sound part of a saved form that a new page does not show already, and the mixer's value for its blend.

    What equals the new page's own value is left out: setting it again would undo what a quick hand has typed meanwhile.
    """
    values, _ = checked(saved if isinstance(saved, dict) else {}, engine.limits)
    values = {name: value for name, value in values.items() if value != getattr(engine.start, name)}
    try:
        if "blend" in values:
            values["blend"] = without_painted(values["blend"])
        return values, mix.mixer_of(values.get("blend", ""))
    except ValueError:
        return {**values, "blend": ""}, mix.mixer_of("")


def without_painted(text: str) -> str:
    """Return a blend whose painted regions are gone, since a browser keeps none of them: their concepts act everywhere."""
    blend = Blend.parse(text)
    terms = [replace(term, region=None) if term.region and term.region.mask else term for term in blend.terms]
    return str(Blend(terms, blend.method))
