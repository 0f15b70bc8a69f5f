"""The concept cards and the blend: a click, a slider, a chip or a typed blend brings all the others into step."""

from __future__ import annotations

from typing import Any

import gradio as gr

from app import mix
from app.cards import found, page_of, tile
from app.prompt import with_trigger, without_trigger
from app.speak import spoken
from app.studio import QUIET, Library, Studio
from app.words import WORDS
from share_diffusion.blend import Blend


def wire_blend(engine: Any, studio: Studio, shelf: Library) -> None:
    """Cards, sliders, chips, text and prompt: what changes one brings the others into step."""
    together = [studio.mixer, studio.written, studio.prompt, shelf.cards, studio.advice]
    seen = [studio.written, studio.mixer, studio.prompt, shelf.search, shelf.kind, shelf.page]

    def agree(blend: str, mixer: mix.Mixer, prompt: str, query: str, kind: str, number: int) -> tuple[Any, ...]:
        tiles_now = shelf_of(engine, query, kind, number, blend)[0]
        return mix.mixer_of(blend, mixer), blend, prompt, tiles_now, engine.advice(Blend.parse(blend))

    @spoken
    def toggle(event: gr.EventData, written: str, mixer: mix.Mixer, prompt: str, query: str, kind: str, number: int):
        blend = mix.newest(written, mixer)
        card = engine.cards.get(str(event._data.get("id")))
        if card is None:
            raise ValueError("this concept is not in the subspace any more; reload the page")
        if card.name in mix.names_of(blend):
            blend, prompt = mix.without_concept(blend, card.name), without_trigger(prompt, card.trigger)
        else:
            blend, prompt = mix.with_concept(blend, card.name, card.weight), with_trigger(prompt, card)
        return agree(blend, mixer, prompt, query, kind, number)

    @spoken
    def take_out(event: gr.EventData, written: str, mixer: mix.Mixer, prompt: str, query: str, kind: str, number: int):
        name = str(event._data.get("name"))
        blend = mix.without_concept(mix.newest(written, mixer), name)
        card = engine.cards.get(name)
        return agree(blend, mixer, without_trigger(prompt, card.trigger if card else name), query, kind, number)

    def slide(written: str, mixer: mix.Mixer) -> tuple[Any, ...]:
        text = mix.newest(written, mixer)
        try:
            return text, mix.mixer_of(text, mixer)
        except ValueError:  # the text is being written
            return gr.skip(), gr.skip()

    def typed(written: str, mixer: mix.Mixer, query: str, kind: str, number: int) -> tuple[Any, ...]:
        if mix.agree(written, mixer):
            return (gr.skip(),) * 3
        try:
            now = mix.mixer_of(written, mixer)
        except ValueError:
            return (gr.skip(),) * 3
        blend = mix.newest(written, mixer)
        return now, shelf_of(engine, query, kind, number, blend)[0], engine.advice(Blend.parse(blend))

    @spoken
    def turn(written: str, mixer: mix.Mixer, prompt: str, query: str, kind: str, number: int) -> tuple[Any, ...]:
        return agree(mix.with_evening_turned(mix.newest(written, mixer)), mixer, prompt, query, kind, number)

    shelf.cards.click(toggle, seen, together, **QUIET)
    studio.mixer.delete(take_out, seen, together, **QUIET)
    studio.even.click(turn, seen, together, **QUIET)
    studio.written.change(lambda written: even_button(engine, written), studio.written, studio.even, **QUIET)
    studio.mixer.input(
        slide,
        [studio.written, studio.mixer],
        [studio.written, studio.mixer],
        trigger_mode="always_last",
        **QUIET,
    )
    gr.on(
        [studio.written.input, studio.written.submit, studio.written.blur],
        typed,
        [studio.written, studio.mixer, shelf.search, shelf.kind, shelf.page],
        [studio.mixer, shelf.cards, studio.advice],
        trigger_mode="always_last",
        **QUIET,
    )


def even_button(engine: Any, written: str) -> Any:
    """Return the button that evens a blend's concepts out, shown where one is loud, and where it was pressed."""
    try:
        blend = Blend.parse(written)
    except ValueError:
        return gr.skip()
    even = mix.is_even(blend)
    return gr.Button(WORDS.even_no_more if even else WORDS.even, visible=even or engine.uneven(blend) is not None)


def shelf_of(engine: Any, query: str, kind: str, number: int, blend: str) -> tuple[dict[str, Any], int, str, bool, int]:
    """Return the cards of a page, its number, what the line says, whether pictures are still to be drawn, and the pages."""
    cards, number, pages = page_of(chosen := found(list(engine.cards.values()), (query or "")[:200], kind), number)
    names = set(mix.names_of(blend))
    shown = [tile(card, engine.pictures.read(card), card.name in names) for card in cards]
    empty = WORDS.concepts_empty if engine.cards else WORDS.no_subspace
    missing = engine.want_cards(cards) > 0
    return {"tiles": shown, "empty": empty}, number, WORDS.page(number, pages, len(chosen)), missing, pages


def shelf_state(engine: Any, query: str, kind: str, number: int, blend: str) -> tuple[Any, ...]:
    """Return what the shelf's components show, in the order that `wire_library` returns them."""
    shown, number, text, missing, pages = shelf_of(engine, query, kind, number, blend)
    turns = gr.Button(visible=pages > 1, interactive=number > 0), gr.Button(visible=pages > 1, interactive=number + 1 < pages)
    return shown, number, text, gr.Timer(active=missing), *turns


def wire_library(engine: Any, studio: Studio, shelf: Library) -> list[Any]:
    """Search, paging, and pictures that appear as they are drawn; returns what a loading page must set."""
    outputs = [shelf.cards, shelf.page, shelf.line, shelf.timer, shelf.previous, shelf.next]
    inputs = [shelf.search, shelf.kind, shelf.page, studio.written]

    def show(query: str, kind: str, number: int, blend: str) -> tuple[Any, ...]:
        return shelf_state(engine, query, kind, number, blend)

    def turn(by: int):
        return lambda query, kind, number, blend: show(query, kind, number + by, blend)

    def first(query: str, kind: str, number: int, blend: str) -> tuple[Any, ...]:
        return show(query, kind, 0, blend)

    gr.on([shelf.search.change, shelf.kind.change], first, inputs, outputs, trigger_mode="always_last", **QUIET)
    shelf.previous.click(turn(-1), inputs, outputs, **QUIET)
    shelf.next.click(turn(1), inputs, outputs, **QUIET)
    shelf.timer.tick(show, inputs, outputs, **QUIET)
    return outputs
