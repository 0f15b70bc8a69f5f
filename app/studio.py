"""The screen where pictures are drawn: settings on the left, the picture in the middle, concepts on the right.

Layout only; what the parts do is in `shelf.py`, `drawing.py`, `past.py`, `restoring.py` and `taking.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from app.components import line, meter, mixer, tiles
from app.words import WORDS

GPU = {"concurrency_limit": 1, "concurrency_id": "gpu"}
QUIET = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}


@dataclass
class Studio:
    """The components that other parts of the page read and set."""

    prompt: gr.Textbox
    mixer: gr.HTML
    written: gr.Textbox
    negative_prompt: gr.Textbox
    seed: gr.Number
    fresh_seed: gr.Checkbox
    count: gr.Number
    steps: gr.Slider
    guidance_scale: gr.Slider
    sampler: gr.Dropdown
    width: gr.Slider
    height: gr.Slider
    draw: gr.Button
    stop: gr.Button
    masks: gr.State
    advice: gr.HTML
    even: gr.Button
    extras: gr.Column

    @property
    def form(self) -> list[Any]:
        """What a wish is made of, in the order of `wish_of`."""
        return [
            *(self.prompt, self.written, self.mixer, self.negative_prompt, self.seed, self.count),
            *(self.steps, self.guidance_scale, self.sampler, self.width, self.height, self.masks),
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
        advice = line("advice", live=True)
        even = gr.Button(WORDS.even, size="sm", visible=False, elem_id="even", min_width=80)
        written = gr.Textbox(label=WORDS.written, placeholder=WORDS.written_hint, lines=1, max_lines=4, elem_id="written")
        with gr.Row(elem_id="go"):
            draw = gr.Button(WORDS.draw, variant="primary", elem_id="draw", scale=3, min_width=80)
            stop = gr.Button(WORDS.stop, variant="stop", elem_id="stop", scale=1, min_width=70, interactive=False)
        with gr.Row(elem_classes="pair"):
            count = gr.Number(1, label=WORDS.count, precision=0, minimum=1, maximum=limits.count, elem_id="count", min_width=90)
            seed = gr.Number(0, label=WORDS.seed, precision=0, minimum=0, elem_id="seed", min_width=110)
        fresh = gr.Checkbox(True, label=WORDS.fresh_seed, elem_id="fresh-seed", container=False)
        with gr.Accordion(WORDS.more, open=False, elem_id="more"):
            negative = gr.Textbox(label=WORDS.negative, lines=1, max_lines=3, elem_id="negative")
            steps = gr.Slider(1, limits.steps, start.steps, step=1, label=WORDS.steps, elem_id="steps")
            guidance = gr.Slider(
                0, limits.guidance_scale, start.guidance_scale, step=0.1, label=WORDS.guidance, elem_id="guidance"
            )
            sampler = gr.Dropdown(list(limits.samplers), value=start.sampler, label=WORDS.sampler, elem_id="sampler")
            sides = {"minimum": 16, "maximum": limits.most_side, "step": 16, "min_width": 120}
            with gr.Row(elem_classes="pair"):
                width = gr.Slider(value=start.width, label=WORDS.width, elem_id="width", **sides)
                height = gr.Slider(value=start.height, label=WORDS.height, elem_id="height", **sides)
        extras = gr.Column(elem_id="extras", min_width=0)
    return Studio(
        prompt,
        mix_rows,
        written,
        negative,
        seed,
        fresh,
        count,
        steps,
        guidance,
        sampler,
        width,
        height,
        draw,
        stop,
        gr.State({}),
        advice,
        even,
        extras,
    )


def canvas() -> Canvas:
    """Lay out the picture and the history."""
    with gr.Column(scale=5, min_width=320, elem_id="stage"):
        picture = gr.Image(
            label=WORDS.canvas,
            show_label=False,
            type="filepath",
            format="jpeg",
            interactive=False,
            elem_id="canvas",
            buttons=["download", "fullscreen"],
            container=False,
        )
        batch = gr.Gallery(
            label=WORDS.batch,
            show_label=False,
            visible=False,
            elem_id="batch",
            columns=2,
            object_fit="contain",
            buttons=["download", "fullscreen"],
            interactive=False,
        )
        progress = meter("status", WORDS.idle)
        with gr.Row(elem_classes="bar"):
            gr.Markdown(f"### {WORDS.history}")
            history_line = line("history-line")
            take = gr.Button(WORDS.take_settings, size="sm", interactive=False, elem_id="take", min_width=60)
            remove = gr.Button(WORDS.remove_picture, size="sm", interactive=False, elem_id="remove", min_width=60)
            newer = gr.Button(WORDS.newer, size="sm", elem_id="newer", min_width=40, interactive=False)
            older = gr.Button(WORDS.older, size="sm", elem_id="older", min_width=40, interactive=False)
        history = tiles("history", WORDS.history, WORDS.history_empty)
    return Canvas(picture, batch, progress, history, gr.State(0), history_line, newer, older, gr.State(""), take, remove)


def library() -> Library:
    """Lay out the concept cards."""
    with gr.Column(scale=3, min_width=300, elem_id="library"):
        with gr.Row(elem_classes="bar"):
            gr.Markdown(f"### {WORDS.concepts}")
            page_line = line("cards-line", live=True)
            previous = gr.Button(WORDS.previous, size="sm", elem_id="cards-previous", min_width=40)
            following = gr.Button(WORDS.next, size="sm", elem_id="cards-next", min_width=40)
        with gr.Column(elem_id="find"):
            search = gr.Textbox(
                label=WORDS.search,
                placeholder=WORDS.search_hint,
                lines=1,
                max_lines=1,
                elem_id="search",
                min_width=120,
                scale=2,
            )
            kind = gr.Radio(list(WORDS.kinds), value="all", label=WORDS.kind, elem_id="kind", min_width=150, scale=3)
        cards = tiles("cards", WORDS.concepts, WORDS.concepts_empty)
    return Library(search, kind, cards, gr.State(0), page_line, previous, following, gr.Timer(2.0))
