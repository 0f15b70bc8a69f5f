"""Drawing from the form: live previews, a Stop that ends it within a step, pictures into the history."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from app import mix
from app.past import history_of
from app.preview import montage
from app.speak import said, spoken
from app.studio import GPU, QUIET, Canvas, Studio
from app.wish import Wish, checked
from app.words import WORDS

Paint = Callable[[str], tuple[str, dict[str, str]]]


def wish_of(engine: Any, values: tuple[Any, ...], paint: Paint | None = None) -> Wish:
    """Return the wish that the form makes; every problem is in one message.

    `paint` returns a blend with the regions that were just painted for it, and their masks.
    """
    engine.look()
    return Wish.of({**engine.start.values, **asked_of(values, paint)}, engine.limits, list(engine.cards))


def form_of(engine: Any, values: tuple[Any, ...]) -> Wish:
    """Return what the form shows, its problems left in: for comparing with, not for drawing."""
    engine.look()
    try:
        asked = asked_of(values)
    except ValueError:  # a tag in the prompt, or the blend beside it, is half written
        asked = asked_of(("", *values[1:])) | {"prompt": values[0]}
    given = {name: value for name, value in asked.items() if value is not None}
    return engine.start.changed(**{**given, **checked(given, engine.limits)[0]})


def asked_of(values: tuple[Any, ...], paint: Paint | None = None) -> dict[str, Any]:
    """Return the form's values by field, with what the prompt's tags say in the blend."""
    prompt, written, mixer, negative, seed, count, steps, guidance, sampler, width, height, masks = values
    prompt, blend = mix.taken_from(prompt or "", mix.newest(written or "", mixer))
    blend, painted = paint(blend) if paint else (blend, {})
    return {
        "prompt": prompt,
        "blend": blend,
        "negative_prompt": negative,
        "seed": seed,
        "count": count,
        "steps": steps,
        "guidance_scale": guidance,
        "sampler": sampler,
        "width": width,
        "height": height,
        "masks": mix.used_masks(blend, {**(masks or {}), **painted}),
    }


class Sessions:
    """Which drawing each open page is making, so that its own Stop ends it."""

    def __init__(self) -> None:
        self.running: dict[str, Any] = {}

    def begin(self, request: gr.Request | None) -> Any:
        """Return the event that stops this page's drawing; an earlier one is stopped."""
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


def wire_draw(engine: Any, studio: Studio, stage: Canvas, sessions: Sessions) -> Any:
    """Draw with live previews, stop within a step, keep the pictures."""
    outputs = [
        *(stage.picture, stage.batch, stage.meter, studio.seed, studio.draw, studio.stop),
        *(stage.history, stage.history_page, stage.history_line, stage.chosen, stage.take, stage.remove),
    ]

    @spoken
    def draw(request: gr.Request, fresh: bool, *form: Any) -> Iterator[Any]:
        try:
            wish = wish_of(engine, form)
        except ValueError as error:
            yield idle(said(error))
            raise
        if fresh:
            wish = wish.changed(seed=random.randrange(2**32))
        stop, started = sessions.begin(request), time.perf_counter()
        yield {
            stage.meter: {"text": WORDS.waiting},
            studio.seed: wish.seed,
            studio.draw: gr.Button(interactive=False),
            studio.stop: gr.Button(interactive=True),
        }
        try:
            for frame in engine.draw([wish], stop):
                if frame.ids:
                    yield finished(frame, wish, time.perf_counter() - started)
                else:
                    yield moment(frame)
        except Exception as error:
            if not stop.is_set():
                yield idle(said(error))
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
            stage.history: shown,
            stage.history_page: number,
            stage.history_line: text,
            stage.chosen: first if one else "",  # of several one is chosen first, in the gallery or the history
            stage.take: gr.Button(interactive=one),
            stage.remove: gr.Button(interactive=one),
        }

    def idle(text: str) -> dict[Any, Any]:
        return {
            stage.meter: {"text": text},
            studio.draw: gr.Button(interactive=True),
            studio.stop: gr.Button(interactive=False),
        }

    def halt(request: gr.Request) -> tuple[Any, ...]:
        sessions.end(request)
        return {"text": WORDS.stopped}, gr.Button(interactive=True), gr.Button(interactive=False)

    running = gr.on(
        [studio.draw.click, studio.prompt.submit],
        draw,
        [studio.fresh_seed, *studio.form],
        outputs,
        show_progress="minimal",
        show_progress_on=[stage.picture],
        trigger_mode="once",
        api_visibility="private",
        **GPU,
    )
    studio.stop.click(halt, None, [stage.meter, studio.draw, studio.stop], cancels=[running], **QUIET)
    return running
