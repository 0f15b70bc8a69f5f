"""The tab that shows what the subspace knows: how full it is, who overlaps whom, what was kept, what it costs."""

from __future__ import annotations

from typing import Any

import gradio as gr

from app.components import heat, line, table
from app.speak import said, spoken
from app.studio import QUIET
from app.words import WORDS


def inside(engine: Any, tab: gr.Tab) -> None:
    """Lay out the tab; its plots are made when it is opened."""
    with gr.Row(elem_classes="desk"):
        with gr.Column(scale=1, min_width=320):
            gr.Markdown(f"### {WORDS.inside_overlap}")
            line("inside-overlap-note", WORDS.inside_overlap_note)
            overlap = heat("inside-overlap", WORDS.inside_overlap)
            gr.Markdown(f"### {WORDS.inside_retention}")
            line("inside-retention-note", WORDS.inside_retention_note)
            retention = heat("inside-retention", WORDS.inside_retention)
        with gr.Column(scale=1, min_width=320):
            gr.Markdown(f"### {WORDS.inside_bytes}")
            cost = line("inside-bytes-note", WORDS.inside_measuring, live=True)
            sizes = gr.BarPlot(
                x="what",
                y="kB",
                color="of it",
                height=230,
                x_title="",
                show_label=False,
                elem_id="inside-bytes",
                visible=False,
                label=WORDS.inside_bytes,
            )
            gr.Markdown(f"### {WORDS.inside_spectrum}")
            line("inside-spectrum-note", WORDS.inside_spectrum_note)
            spectrum = gr.LinePlot(
                x="directions",
                y="energy left",
                color="layers",
                height=260,
                show_label=False,
                elem_id="inside-spectrum",
                visible=False,
                label=WORDS.inside_spectrum,
            )
    gr.Markdown(f"### {WORDS.concepts}")
    concepts = table("inside-concepts", WORDS.concepts)

    @spoken
    def look() -> tuple[Any, ...]:
        try:
            engine.refresh()
            known = engine.knowledge()
        except ValueError as error:
            return nothing(said(error))
        if known is None:
            return nothing(WORDS.no_subspace)
        rows = {"head": list(WORDS.inside_head), "rows": known.concepts}
        plots = gr.BarPlot(known.sizes, visible=True), gr.LinePlot(known.spectra, visible=True)
        return known.overlap, known.retention, plots[0], WORDS.cost(known.bytes), plots[1], rows

    def nothing(why: str) -> tuple[Any, ...]:
        return (gr.skip(),) * 3 + (why, gr.skip(), gr.skip())

    tab.select(look, None, [overlap, retention, sizes, cost, spectrum, concepts], **QUIET)
