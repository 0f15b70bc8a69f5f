"""The tab where pictures are compared: with and without a concept, any two of the history, sweeps and strips.

Prompt, blend and settings are those of the Draw tab.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app.components import line, meter, tiles
from app.drawing import Sessions, wish_of
from app.mix import names_of
from app.past import history_of, turns
from app.plans import Plan, axis_of, strip_plan, sweep_plan, with_and_without
from app.preview import montage
from app.speak import said, spoken
from app.studio import GPU, QUIET, Studio
from app.wish import Wish
from app.words import WORDS

SEED = "seed"
CHOICES = 200  # concepts offered in a list; others are typed


@dataclass
class Bench:
    """What a drawing on this tab reports to."""

    meter: gr.HTML
    stop: gr.Button


def comparing(engine: Any, studio: Studio, sessions: Sessions) -> None:
    """Lay out the tab and wire it."""
    with gr.Tabs(elem_id="compare-tabs"):
        with gr.Tab(WORDS.tab_pair, id="pair") as pair:
            pairs(engine, studio, sessions, pair)
        with gr.Tab(WORDS.tab_sweep, id="sweep") as sweep:
            sweeps(engine, studio, sessions, sweep)
        with gr.Tab(WORDS.tab_strip, id="strip") as strip:
            strips(engine, studio, sessions, strip)


def bench(name: str, label: str) -> tuple[gr.Button, Bench]:
    """Lay out a Draw button, its Stop and its line of progress."""
    with gr.Row():
        draw = gr.Button(label, variant="primary", elem_id=f"{name}-draw", scale=3, min_width=80)
        stop = gr.Button(WORDS.stop, variant="stop", elem_id=f"{name}-stop", scale=1, min_width=70, interactive=False)
    return draw, Bench(meter(f"{name}-status"), stop)


def pairs(engine: Any, studio: Studio, sessions: Sessions, tab: gr.Tab) -> None:
    """Two pictures under one slider."""
    with gr.Row(elem_classes="desk"):
        with gr.Column(scale=3, min_width=300):
            concept = gr.Dropdown([], label=WORDS.pair_concept, elem_id="pair-concept", allow_custom_value=True)
            draw, place = bench("pair", WORDS.pair_draw)
            gr.Markdown(f"### {WORDS.pair_history}")
            note = line("pair-note", WORDS.pair_hint)
            history = tiles("pair-history", WORDS.history, WORDS.history_empty)
            with gr.Row(elem_classes="bar"):
                gr.Markdown("")
                pages = line("pair-line")
                newer = gr.Button(WORDS.newer, size="sm", min_width=40, interactive=False)
                older = gr.Button(WORDS.older, size="sm", min_width=40, interactive=False)
        with gr.Column(scale=6, min_width=320):
            slider = gr.ImageSlider(
                label=WORDS.pair_slider,
                show_label=False,
                type="filepath",
                elem_id="pair-slider",
                interactive=False,
                buttons=["fullscreen"],
                max_height=640,
            )
            caption = line("pair-caption", live=True)
    number, chosen = gr.State(0), gr.State([])

    def plan(form: tuple[Any, ...], concept: str) -> Plan:
        return with_and_without(wish_of(engine, form), concept)

    def done(plan: Plan, ids: list[str], pictures: list[Any]) -> dict[Any, Any]:
        paths = tuple(str(engine.history.path(name)) for name in ids)
        shown, page, text = marked(engine, 0, ids)
        return {
            slider: paths,
            caption: WORDS.pair_caption(*plan.columns),
            chosen: list(ids),
            history: shown,
            number: page,
            pages: text,
        }

    run(engine, studio, sessions, draw, place, plan, [concept], done, [slider, caption, chosen, history, number, pages])

    @spoken
    def choose(event: gr.EventData, page: int, chosen: list[str]) -> tuple[Any, ...]:
        name = str(event._data.get("id"))
        engine.history.path(name)
        chosen = [one for one in chosen if engine.history.holds(one)]  # one may have been deleted under Draw
        chosen = [*chosen, name][-2:] if name not in chosen else [name]
        shown, page, text = marked(engine, page, chosen)
        if len(chosen) < 2:
            return gr.skip(), WORDS.pair_second, chosen, shown, page, text
        paths = tuple(str(engine.history.path(one)) for one in chosen)
        return paths, WORDS.pair_caption(*(described(engine, one) for one in chosen)), chosen, shown, page, text

    outputs = [slider, caption, chosen, history, number, pages]
    history.click(choose, [number, chosen], outputs, **QUIET)
    strip = [history, number, pages]
    pages.change(lambda page: turns(engine, page), number, [newer, older], **QUIET)
    newer.click(lambda page, chosen: marked(engine, page - 1, chosen), [number, chosen], strip, **QUIET)
    older.click(lambda page, chosen: marked(engine, page + 1, chosen), [number, chosen], strip, **QUIET)
    tab.select(
        lambda page, chosen, blend, now: (*marked(engine, page, chosen), of_blend(blend, now)),
        [number, chosen, studio.written, concept],
        [*strip, concept],
        **QUIET,
    )
    assert note is not None


def marked(engine: Any, page: int, chosen: list[str]) -> tuple[dict[str, Any], int, str]:
    """Return a page of the history with the two chosen pictures marked A and B."""
    shown, page, text = history_of(engine, page)
    for item in shown["tiles"]:
        item["on"] = item["id"] in chosen
        if item["on"]:
            item["badge"] = "AB"[chosen.index(item["id"])]
    return shown, page, text


def described(engine: Any, name: str) -> str:
    """Return a picture's blend and seed in a few words."""
    settings = engine.history.settings(name)
    return f"{str(settings.get('blend') or WORDS.no_concept)[:80]}, seed {settings.get('seed', '?')}"


def of_blend(written: str, now: str | None = None) -> gr.Dropdown:
    """Return the list of the blend's own concepts; the chosen one stays while it is there, else it is the first."""
    names = names_of(written)
    return gr.Dropdown(choices=names, value=now if now in names else names[0] if names else None)


def offered(engine: Any, written: str) -> list[str]:
    """Return concepts for a list, those of the blend first."""
    return list(dict.fromkeys([*names_of(written), *list(engine.cards)[:CHOICES]]))


def sweeps(engine: Any, studio: Studio, sessions: Sessions, tab: gr.Tab) -> None:
    """A grid of pictures: x is the weight of one concept, y that of another one or the seed."""
    with gr.Row(elem_classes="desk"):
        with gr.Column(scale=3, min_width=300):
            x, x_low, x_high, x_count = axis("x", WORDS.sweep_x, 0.0, 1.5, 4)
            y, y_low, y_high, y_count = axis("y", WORDS.sweep_y, 0.0, 1.0, 2)
            draw, place = bench("sweep", WORDS.sweep_draw)
            line("sweep-note", WORDS.sweep_note)
        with gr.Column(scale=6, min_width=320):
            sheet = gr.Image(
                label=WORDS.tab_sweep,
                show_label=False,
                type="filepath",
                format="png",
                interactive=False,
                elem_id="sweep-sheet",
                buttons=["download", "fullscreen"],
            )

    def plan(form: tuple[Any, ...], *sides: Any) -> Plan:
        wish = wish_of(engine, form)
        known = {*engine.cards, SEED}
        if not (sides[0] and sides[4]):
            raise ValueError(WORDS.sweep_choose)
        if strange := [what for what in (sides[0], sides[4]) if what not in known]:
            raise ValueError(f"{strange[0]!r} is neither a concept of this subspace nor seed")
        return sweep_plan(wish, axis_of(wish, *sides[:4]), axis_of(wish, *sides[4:]))

    def done(plan: Plan, ids: list[str], pictures: list[Any]) -> dict[Any, Any]:
        return {sheet: str(engine.sheet(plan, pictures)[0])}

    inputs = [x, x_low, x_high, x_count, y, y_low, y_high, y_count]
    run(engine, studio, sessions, draw, place, plan, inputs, done, [sheet], preview=sheet)

    def offer(blend: str, across: str | None, down: str | None) -> tuple[gr.Dropdown, gr.Dropdown]:
        names = offered(engine, blend)
        first = across if across in [*engine.cards, SEED] else names[0] if names else None
        other = down if down in [*engine.cards, SEED] else SEED
        return gr.Dropdown(choices=names, value=first), gr.Dropdown(choices=[SEED, *names], value=other)

    tab.select(offer, [studio.written, x, y], [x, y], **QUIET)


def axis(name: str, label: str, low: float, high: float, count: int) -> tuple[Any, ...]:
    """Lay out one axis: what changes, from where to where, in how many cells."""
    what = gr.Dropdown([], label=label, elem_id=f"sweep-{name}", allow_custom_value=True)
    with gr.Row(elem_classes="pair"):
        first = gr.Number(low, label=WORDS.sweep_from, elem_id=f"sweep-{name}-from", min_width=70, step=0.05)
        last = gr.Number(high, label=WORDS.sweep_to, elem_id=f"sweep-{name}-to", min_width=70, step=0.05)
        cells = gr.Number(count, label=WORDS.sweep_count, precision=0, elem_id=f"sweep-{name}-count", min_width=70)
    return what, first, last, cells


def strips(engine: Any, studio: Studio, sessions: Sessions, tab: gr.Tab) -> None:
    """A row of pictures from one blend to another."""
    with gr.Row(elem_classes="desk"):
        with gr.Column(scale=3, min_width=300):
            start = gr.Textbox(label=WORDS.strip_from, placeholder="watercolor", elem_id="strip-from")
            end = gr.Textbox(label=WORDS.strip_to, placeholder="blueprint", elem_id="strip-to")
            count = gr.Slider(3, 16, 6, step=1, label=WORDS.count, elem_id="strip-count")
            draw, place = bench("strip", WORDS.strip_draw)
            film = gr.DownloadButton(WORDS.strip_film, size="sm", interactive=False, elem_id="strip-film")
        with gr.Column(scale=6, min_width=320):
            sheet = gr.Image(
                label=WORDS.tab_strip,
                show_label=False,
                type="filepath",
                format="png",
                interactive=False,
                elem_id="strip-sheet",
                buttons=["download", "fullscreen"],
            )

    def plan(form: tuple[Any, ...], start: str, end: str, count: float) -> Plan:
        wish, known = wish_of(engine, form), list(engine.cards)
        first, last = (Wish.of({**wish.values, "blend": blend or ""}, engine.limits, known).blend for blend in (start, end))
        return strip_plan(wish, first, last, count)

    def done(plan: Plan, ids: list[str], pictures: list[Any]) -> dict[Any, Any]:
        paths = engine.sheet(plan, pictures, film=True)
        return {sheet: str(paths[0]), film: gr.DownloadButton(value=str(paths[1]), interactive=True)}

    run(engine, studio, sessions, draw, place, plan, [start, end, count], done, [sheet, film], preview=sheet)

    def offer(blend: str, start: str, end: str) -> tuple[str, str]:
        names = offered(engine, blend)
        return start or (f"{names[0]}:1" if names else ""), end or (f"{names[1]}:1" if len(names) > 1 else "")

    tab.select(offer, [studio.written, start, end], [start, end], **QUIET)


def run(
    engine: Any,
    studio: Studio,
    sessions: Sessions,
    draw: gr.Button,
    place: Bench,
    plan: Callable[..., Plan],
    inputs: list[Any],
    done: Callable[[Plan, list[str], list[Any]], dict[Any, Any]],
    outputs: list[Any],
    preview: gr.Image | None = None,
) -> None:
    """Wire a Draw button to a plan: previews on the way, what `done` returns at the end, Stop within a step."""
    size = len(inputs)

    @spoken
    def work(request: gr.Request, *values: Any) -> Iterator[Any]:
        planned = plan(values[size:], *values[:size])
        stop = sessions.begin(request)
        yield {place.meter: {"text": WORDS.waiting}, draw: off(), place.stop: on()}
        try:
            for frame in engine.draw(planned.wishes, stop):
                now = {"text": WORDS.step(frame.step, frame.steps), "done": frame.step, "of": frame.steps}
                if frame.ids:
                    made = done(planned, list(frame.ids), list(frame.previews))
                    yield {**made, place.meter: {"text": WORDS.cells(len(frame.ids))}, draw: on(), place.stop: off()}
                elif frame.previews and preview is not None:
                    yield {place.meter: now, preview: montage(frame.previews)}
                else:
                    yield {place.meter: now}
        except Exception as error:
            stopped = stop.is_set() and not isinstance(error, ValueError)
            text = WORDS.stopped if stopped else said(error)
            yield {place.meter: {"text": text}, draw: on(), place.stop: off()}
            if not stopped:
                raise

    def halt(request: gr.Request) -> tuple[Any, ...]:
        sessions.end(request)
        return {"text": WORDS.stopped}, on(), off()

    running = draw.click(
        work,
        [*inputs, *studio.form],
        [*outputs, place.meter, draw, place.stop],
        show_progress="hidden",
        trigger_mode="once",
        api_visibility="private",
        **GPU,
    )
    place.stop.click(halt, None, [place.meter, draw, place.stop], cancels=[running], **QUIET)


def on() -> gr.Button:
    """Return a button that can be pressed."""
    return gr.Button(interactive=True)


def off() -> gr.Button:
    """Return a button that cannot be pressed now."""
    return gr.Button(interactive=False)
