"""The screen where pictures are drawn: settings on the left, the picture in the middle, concepts on the right."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app import mix
from app.cards import PAGE, found, page_of, tile
from app.components import line, meter, mixer, tiles
from app.preview import montage
from app.prompt import with_trigger, without_trigger
from app.speak import plain, spoken
from app.wish import Wish
from app.words import WORDS

GPU = {"concurrency_limit": 1, "concurrency_id": "gpu"}
QUIET = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
HISTORY_PAGE = 18


@dataclass
class Studio:
    """The components that other parts of the page read and set."""

    prompt: gr.Textbox
    mixer: gr.HTML
    written: gr.Textbox
    agreed: gr.State
    negative_prompt: gr.Textbox
    seed: gr.Number
    fresh_seed: gr.Checkbox
    count: gr.Slider
    steps: gr.Slider
    guidance_scale: gr.Slider
    sampler: gr.Dropdown
    width: gr.Slider
    height: gr.Slider
    draw: gr.Button
    stop: gr.Button
    extras: Any

    @property
    def form(self) -> list[Any]:
        """What a wish is made of, in the order of `wish_of`."""
        return [
            *(self.prompt, self.written, self.agreed, self.mixer, self.negative_prompt, self.seed, self.count),
            *(self.steps, self.guidance_scale, self.sampler, self.width, self.height),
        ]

    @property
    def fields(self) -> dict[str, Any]:
        """The components that hold a wish's fields, by field; `blend` is the written one."""
        return {
            "prompt": self.prompt,
            "blend": self.written,
            "negative_prompt": self.negative_prompt,
            "seed": self.seed,
            "count": self.count,
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "sampler": self.sampler,
            "width": self.width,
            "height": self.height,
        }


@dataclass
class Canvas:
    """Where pictures appear, and the history under it."""

    picture: gr.Image
    batch: gr.Gallery
    meter: gr.HTML
    history: gr.HTML
    history_page: gr.State
    history_line: gr.HTML
    newer: gr.Button
    older: gr.Button
    chosen: gr.State
    take: gr.Button
    remove: gr.Button


@dataclass
class Library:
    """The concept cards."""

    search: gr.Textbox
    kind: gr.Radio
    cards: gr.HTML
    page: gr.State
    line: gr.HTML
    previous: gr.Button
    next: gr.Button
    timer: gr.Timer


def controls(engine: Any) -> Studio:
    """Lay out the settings: six are visible, the rest is folded."""
    start, limits = engine.start, engine.limits
    with gr.Column(scale=3, min_width=300, elem_id="controls"):
        prompt = gr.Textbox(label=WORDS.prompt, placeholder=WORDS.prompt_hint, lines=3, max_lines=6, elem_id="prompt")
        mix_rows = mixer("mixer", WORDS.blend, WORDS.blend_empty)
        written = gr.Textbox(label=WORDS.written, placeholder=WORDS.written_hint, lines=1, max_lines=4, elem_id="written")
        with gr.Row(elem_id="go"):
            draw = gr.Button(WORDS.draw, variant="primary", elem_id="draw", scale=3, min_width=80)
            stop = gr.Button(WORDS.stop, variant="stop", elem_id="stop", scale=1, min_width=70, interactive=False)
        with gr.Row(elem_classes="pair"):
            count = gr.Slider(1, limits.count, 1, step=1, label=WORDS.count, elem_id="count", min_width=130)
            seed = gr.Number(0, label=WORDS.seed, precision=0, minimum=0, elem_id="seed", min_width=110)
        fresh = gr.Checkbox(True, label=WORDS.fresh_seed, elem_id="fresh-seed", container=False)
        with gr.Accordion(WORDS.more, open=False, elem_id="more"):
            negative = gr.Textbox(label=WORDS.negative, lines=1, max_lines=3, elem_id="negative")
            steps = gr.Slider(1, limits.steps, start.steps, step=1, label=WORDS.steps, elem_id="steps")
            guidance = gr.Slider(
                0, limits.guidance_scale, start.guidance_scale, step=0.1, label=WORDS.guidance, elem_id="guidance"
            )
            sampler = gr.Dropdown(list(limits.samplers), value=start.sampler, label=WORDS.sampler, elem_id="sampler")
            sides = {"minimum": min(32, limits.side), "maximum": limits.most_side, "step": 16, "min_width": 120}
            with gr.Row(elem_classes="pair"):
                width = gr.Slider(value=start.width, label=WORDS.width, elem_id="width", **sides)
                height = gr.Slider(value=start.height, label=WORDS.height, elem_id="height", **sides)
        extras = gr.Column(elem_id="extras", min_width=0)
    return Studio(
        prompt, mix_rows, written, gr.State(""), negative, seed, fresh, count, steps, guidance, sampler, width, height,
        draw, stop, extras,
    )  # fmt: skip


def canvas() -> Canvas:
    """Lay out the picture and the history."""
    with gr.Column(scale=5, min_width=320, elem_id="stage"):
        picture = gr.Image(
            label=WORDS.canvas, show_label=False, type="filepath", format="jpeg", interactive=False, elem_id="canvas",
            buttons=["download", "fullscreen"], container=False,
        )  # fmt: skip
        batch = gr.Gallery(
            label=WORDS.batch, show_label=False, visible=False, elem_id="batch", columns=2, object_fit="contain",
            buttons=["download", "fullscreen"], interactive=False,
        )  # fmt: skip
        progress = meter("status", WORDS.idle)
        with gr.Row(elem_classes="bar"):
            gr.Markdown(f"### {WORDS.history}")
            history_line = line("history-line")
            take = gr.Button(WORDS.take_settings, size="sm", interactive=False, elem_id="take", min_width=60)
            remove = gr.Button(WORDS.remove_picture, size="sm", interactive=False, elem_id="remove", min_width=60)
            newer = gr.Button(WORDS.newer, size="sm", elem_id="newer", min_width=40)
            older = gr.Button(WORDS.older, size="sm", elem_id="older", min_width=40)
        history = tiles("history", WORDS.history, WORDS.history_empty)
    return Canvas(
        picture, batch, progress, history, gr.State(0), history_line, newer, older, gr.State(""), take, remove
    )  # fmt: skip


def library() -> Library:
    """Lay out the concept cards."""
    with gr.Column(scale=3, min_width=300, elem_id="library"):
        with gr.Row(elem_classes="bar"):
            gr.Markdown(f"### {WORDS.concepts}")
            page_line = line("cards-line", live=True)
            previous = gr.Button(WORDS.previous, size="sm", elem_id="cards-previous", min_width=40)
            following = gr.Button(WORDS.next, size="sm", elem_id="cards-next", min_width=40)
        with gr.Row(elem_classes="pair"):
            search = gr.Textbox(label=WORDS.search, placeholder=WORDS.search_hint, elem_id="search", min_width=120, scale=2)
            kind = gr.Radio(list(WORDS.kinds), value="all", label=WORDS.kind, elem_id="kind", min_width=150, scale=3)
        cards = tiles("cards", WORDS.concepts, WORDS.concepts_empty)
    return Library(search, kind, cards, gr.State(0), page_line, previous, following, gr.Timer(2.0))


def wish_of(engine: Any, values: tuple[Any, ...]) -> Wish:
    """Return the wish that the form makes; every problem is in one message."""
    prompt, written, agreed, rows, negative, seed, count, steps, guidance, sampler, width, height = values
    blend = mix.newest(written or "", agreed or "", rows)
    asked = {
        "prompt": prompt, "blend": blend, "negative_prompt": negative, "seed": seed, "count": count, "steps": steps,
        "guidance_scale": guidance, "sampler": sampler, "width": width, "height": height,
    }  # fmt: skip
    engine.refresh()
    return Wish.of({**engine.start.values, **asked}, engine.limits, list(engine.cards))


class Sessions:
    """Which drawing each open page is making, so that its own Stop ends it."""

    def __init__(self) -> None:
        self.running: dict[str, Any] = {}

    def begin(self, request: gr.Request | None) -> Any:
        """Return the event that stops this page's drawing; an earlier one is stopped."""
        import threading

        self.end(request)
        stop = threading.Event()
        self.running[key_of(request)] = stop
        return stop

    def end(self, request: gr.Request | None) -> None:
        """Stop this page's drawing, if there is one."""
        stop = self.running.pop(key_of(request), None)
        if stop is not None:
            stop.set()


def key_of(request: gr.Request | None) -> str:
    """Return which page a request comes from."""
    return str(getattr(request, "session_hash", None) or "")


def wire_blend(engine: Any, studio: Studio, shelf: Library) -> None:
    """Cards, sliders, chips, text and prompt: what changes one brings the others into step."""
    together = [studio.mixer, studio.written, studio.agreed, studio.prompt, shelf.cards]
    seen = [studio.written, studio.agreed, studio.mixer, studio.prompt, shelf.search, shelf.kind, shelf.page]

    def agree(blend: str, prompt: str, query: str, kind: str, number: int) -> tuple[Any, ...]:
        tiles_now, _, _, _ = shelf_of(engine, query, kind, number, blend)
        return mix.rows_of(blend), blend, blend, prompt, tiles_now

    @spoken
    def toggle(event: gr.EventData, written: str, agreed: str, rows: list, prompt: str, query: str, kind: str, number: int):
        blend = mix.newest(written, agreed, rows)
        card = engine.cards.get(str(event._data.get("id")))
        if card is None:
            raise ValueError("this concept is not in the subspace any more; reload the page")
        if any(row["name"] == card.name for row in mix.rows_of(blend)):
            blend, prompt = mix.without_concept(blend, card.name), without_trigger(prompt, card.trigger)
        else:
            blend, prompt = mix.with_concept(blend, card.name, card.weight), with_trigger(prompt, card)
        return agree(blend, prompt, query, kind, number)

    @spoken
    def take_out(event: gr.EventData, written: str, agreed: str, rows: list, prompt: str, query: str, kind: str, number: int):
        name = str(event._data.get("name"))
        blend = mix.without_concept(mix.newest(written, agreed, rows), name)
        card = engine.cards.get(name)
        return agree(blend, without_trigger(prompt, card.trigger if card else name), query, kind, number)

    def slide(written: str, agreed: str, rows: list) -> tuple[str, str]:
        text = mix.newest(written, agreed, rows)
        return text, text

    def typed(written: str, agreed: str, query: str, kind: str, number: int) -> tuple[Any, ...]:
        try:
            rows = mix.rows_of(written)
        except ValueError:
            return gr.skip(), gr.skip(), gr.skip()
        return rows, written, shelf_of(engine, query, kind, number, written)[0]

    shelf.cards.click(toggle, seen, together, **QUIET)
    studio.mixer.delete(take_out, seen, together, **QUIET)
    studio.mixer.input(
        slide, [studio.written, studio.agreed, studio.mixer], [studio.written, studio.agreed],
        trigger_mode="always_last", **QUIET,
    )  # fmt: skip
    studio.written.input(
        typed, [studio.written, studio.agreed, shelf.search, shelf.kind, shelf.page],
        [studio.mixer, studio.agreed, shelf.cards], trigger_mode="always_last", **QUIET,
    )  # fmt: skip


def shelf_of(engine: Any, query: str, kind: str, number: int, blend: str) -> tuple[dict[str, Any], int, str, bool]:
    """Return the cards of a page, its number, what the line says, and whether pictures are still being drawn."""
    cards, number, pages = page_of(chosen := found(list(engine.cards.values()), (query or "")[:200], kind), number)
    try:
        names = {row["name"] for row in mix.rows_of(blend)}
    except ValueError:
        names = set()
    shown = [tile(card, engine.pictures.read(card), card.name in names) for card in cards]
    empty = WORDS.concepts_empty if engine.cards else WORDS.no_subspace
    missing = engine.want_cards(cards) > 0
    return {"tiles": shown, "empty": empty}, number, WORDS.page(number, pages, len(chosen)), missing


def wire_library(engine: Any, studio: Studio, shelf: Library) -> list[Any]:
    """Search, paging, and pictures that appear as they are drawn; returns what a loading page must set."""
    outputs = [shelf.cards, shelf.page, shelf.line, shelf.timer]
    inputs = [shelf.search, shelf.kind, shelf.page, studio.written]

    def show(query: str, kind: str, number: int, blend: str) -> tuple[Any, ...]:
        shown, number, text, missing = shelf_of(engine, query, kind, number, blend)
        return shown, number, text, gr.Timer(active=missing)

    def turn(by: int):
        return lambda query, kind, number, blend: show(query, kind, number + by, blend)

    def first(query: str, kind: str, number: int, blend: str) -> tuple[Any, ...]:
        return show(query, kind, 0, blend)

    gr.on([shelf.search.input, shelf.kind.change], first, inputs, outputs, trigger_mode="always_last", **QUIET)
    shelf.previous.click(turn(-1), inputs, outputs, **QUIET)
    shelf.next.click(turn(1), inputs, outputs, **QUIET)
    shelf.timer.tick(show, inputs, outputs, **QUIET)
    return outputs


def history_of(engine: Any, number: int, chosen: str = "") -> tuple[dict[str, Any], int, str]:
    """Return the tiles of a page of the history, its number and what the line says."""
    shown, pages = engine.history.page(number, HISTORY_PAGE)
    number = min(max(0, number), pages - 1)
    for item in shown:
        item["on"] = item["id"] == chosen
    return {"tiles": shown}, number, WORDS.page(number, pages, len(engine.history.ids()))


def wire_draw(engine: Any, studio: Studio, stage: Canvas, sessions: Sessions) -> Any:
    """Draw with live previews, stop within a step, keep the pictures."""
    outputs = [
        *(stage.picture, stage.batch, stage.meter, studio.seed, studio.draw, studio.stop),
        *(stage.history, stage.history_page, stage.history_line, stage.chosen, stage.take, stage.remove),
    ]

    @spoken
    def draw(request: gr.Request, fresh: bool, *form: Any) -> Iterator[Any]:
        wish = wish_of(engine, form)
        if fresh:
            wish = wish.changed(seed=random.randrange(2**32))
        stop, started = sessions.begin(request), time.perf_counter()
        yield {
            stage.meter: {"text": WORDS.waiting}, studio.seed: wish.seed,
            studio.draw: gr.Button(interactive=False), studio.stop: gr.Button(interactive=True),
        }  # fmt: skip
        try:
            for frame in engine.draw(wish, stop):
                if frame.ids:
                    yield finished(frame, wish, time.perf_counter() - started)
                else:
                    yield moment(frame)
        except Exception as error:
            if not stop.is_set():
                yield idle(plain(str(error)) if isinstance(error, ValueError) else WORDS.unexpected)
                raise
            yield idle(WORDS.stopped)

    def moment(frame: Any) -> dict[Any, Any]:
        now = {"text": WORDS.step(frame.step, frame.steps), "done": frame.step, "of": frame.steps}
        if not frame.previews:
            return {stage.meter: now}
        picture = gr.Image(montage(frame.previews), visible=True)
        return {stage.meter: now, stage.picture: picture, stage.batch: gr.Gallery(visible=False)}

    def finished(frame: Any, wish: Wish, seconds: float) -> dict[Any, Any]:
        paths = [str(engine.history.path(name)) for name in frame.ids]
        one = len(paths) == 1
        first = frame.ids[0]
        shown, number, text = history_of(engine, 0, first if one else "")
        return {
            **idle(WORDS.drawn(len(paths), seconds, wish.seed)),
            stage.picture: gr.Image(paths[0], visible=one),
            stage.batch: gr.Gallery(paths, visible=not one, columns=2 if len(paths) <= 4 else 3 if len(paths) <= 9 else 4),
            stage.history: shown, stage.history_page: number, stage.history_line: text,
            stage.chosen: first, stage.take: gr.Button(interactive=True), stage.remove: gr.Button(interactive=True),
        }  # fmt: skip

    def idle(text: str) -> dict[Any, Any]:
        return {
            stage.meter: {"text": text}, studio.draw: gr.Button(interactive=True), studio.stop: gr.Button(interactive=False)
        }  # fmt: skip

    def halt(request: gr.Request) -> tuple[Any, ...]:
        sessions.end(request)
        return {"text": WORDS.stopped}, gr.Button(interactive=True), gr.Button(interactive=False)

    running = gr.on(
        [studio.draw.click, studio.prompt.submit], draw, [studio.fresh_seed, *studio.form], outputs,
        show_progress="minimal", show_progress_on=[stage.picture], trigger_mode="once", api_visibility="private", **GPU,
    )  # fmt: skip
    studio.stop.click(halt, None, [stage.meter, studio.draw, studio.stop], cancels=[running], **QUIET)
    return running


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
        return *history_of(engine, number), gr.Image(None), {"text": WORDS.removed}, "", off, off

    chosen = [stage.picture, stage.batch, stage.meter, stage.history, stage.chosen, stage.take, stage.remove]
    stage.history.click(choose, [stage.history_page], chosen, **QUIET)
    stage.remove.click(
        remove, [stage.chosen, stage.history_page],
        [*strip, stage.picture, stage.meter, stage.chosen, stage.take, stage.remove], **QUIET,
    )  # fmt: skip
    stage.newer.click(lambda number: history_of(engine, number - 1), [stage.history_page], strip, **QUIET)
    stage.older.click(lambda number: history_of(engine, number + 1), [stage.history_page], strip, **QUIET)


__all__ = ["PAGE", "Canvas", "Library", "Studio", "canvas", "controls", "library"]
