"""The tab where a concept is taught: pictures in, a live loss and samples out, and a new card at the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd
from PIL import Image

from app.components import line, meter
from app.job import MOST_PICTURES, MOST_STEPS, Progress
from app.preview import montage
from app.speak import plain, said, spoken
from app.studio import QUIET
from app.words import WORDS

LEARNING = {"concurrency_limit": 1, "concurrency_id": "learning"}
SIDES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def learning(engine: Any) -> gr.HTML:
    """Lay out the tab and wire it; returns the line whose change tells that a concept is new."""
    with gr.Row(elem_classes="desk"):
        with gr.Column(scale=3, min_width=300):
            pictures = gr.File(
                label=WORDS.learn_pictures,
                file_count="multiple",
                file_types=list(SIDES),
                type="filepath",
                elem_id="learn-pictures",
                height=150,
            )
            name = gr.Textbox(label=WORDS.learn_name, placeholder="my-cat", max_length=100, elem_id="learn-name")
            with gr.Row(elem_classes="pair"):
                kind = gr.Radio(
                    [("Subject", "subject"), ("Style", "style")],
                    value="subject",
                    label=WORDS.kind,
                    elem_id="learn-kind",
                    min_width=150,
                )
                trigger = gr.Textbox(
                    label=WORDS.learn_trigger,
                    placeholder=WORDS.learn_trigger_hint,
                    max_length=100,
                    elem_id="learn-trigger",
                    lines=1,
                    max_lines=1,
                    min_width=120,
                )
            steps = gr.Slider(10, min(1000, MOST_STEPS), 400, step=10, label=WORDS.learn_steps, elem_id="learn-steps")
            with gr.Row(elem_id="learn-go"):
                start = gr.Button(WORDS.learn_start, variant="primary", elem_id="learn-start", scale=3, min_width=80)
                cancel = gr.Button(
                    WORDS.cancel, variant="stop", elem_id="learn-cancel", scale=1, min_width=70, interactive=False
                )
        with gr.Column(scale=6, min_width=320):
            plot = gr.LinePlot(
                x="step",
                y="loss",
                height=260,
                show_label=False,
                visible=False,
                elem_id="learn-plot",
                x_title="step",
                y_title="loss",
            )
            status = meter("learn-status", WORDS.learn_idle)
            sample = gr.Image(
                label=WORDS.learn_sample,
                format="jpeg",
                interactive=False,
                visible=False,
                elem_id="learn-sample",
                height=260,
                buttons=[],
            )
            news = line("learn-news")

    @spoken
    def learn(paths: list[str] | None, name: str, kind: str, trigger: str, steps: float) -> Iterator[Any]:
        yield {start: gr.Button(interactive=False), status: {"text": WORDS.learn_starting}}
        try:
            job = engine.learn(paths or [], name, kind, trigger, steps)
            yield {cancel: gr.Button(interactive=True)}
            for progress in job.watch():
                yield look(progress)
            if progress.state == "done":
                engine.refresh()
                yield {news: WORDS.learned(job.lesson.name, progress.retention)}
        except Exception as error:
            yield {status: {"text": said(error)}, **ready()}
            if not isinstance(error, ValueError):
                raise
        yield ready()

    def ready() -> dict[Any, Any]:
        return {start: gr.Button(interactive=True), cancel: gr.Button(interactive=engine.learning)}

    def look(progress: Progress) -> dict[Any, Any]:
        now = {"text": WORDS.lesson(progress.state, progress.step, progress.steps, plain(progress.problem))}
        if progress.state in ("starting", "learning", "merging"):
            now |= {"done": progress.step, "of": progress.steps}
        shown: dict[Any, Any] = {status: now}
        if progress.losses:
            shown[plot] = gr.LinePlot(smoothed(progress.losses), visible=True)
        if progress.sample is not None:
            shown[sample] = gr.Image(sampled(progress.sample), visible=True)
        return shown

    outputs = [start, cancel, status, plot, sample, news]
    start.click(
        learn,
        [pictures, name, kind, trigger, steps],
        outputs,
        show_progress="hidden",
        trigger_mode="once",
        api_visibility="private",
        **LEARNING,
    )

    def halt() -> dict[str, str]:
        engine.cancel_learning()
        return {"text": WORDS.learn_cancelling}

    cancel.click(halt, None, status, **QUIET)
    return news


def smoothed(losses: list[tuple[int, float]], most: int = 240) -> pd.DataFrame:
    """Return the losses as a running mean, at most `most` points."""
    window, rows = max(1, len(losses) // 20), []
    for index in range(0, len(losses), max(1, -(-len(losses) // most))):
        some = [loss for _, loss in losses[max(0, index - window) : index + 1]]
        rows.append((losses[index][0], sum(some) / len(some)))
    return pd.DataFrame(rows, columns=["step", "loss"])


def sampled(path: Path) -> Image.Image:
    """Return a sample at a size that a person can look at."""
    with Image.open(path) as image:
        return montage([image.convert("RGB")], 256)


__all__ = ["MOST_PICTURES", "learning"]
