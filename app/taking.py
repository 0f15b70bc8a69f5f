"""Export on the page: build the file of what is on the sliders, then download it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from app import mix
from app.components import line
from app.speak import spoken
from app.studio import QUIET, Studio
from app.words import WORDS


def taking(engine: Any, studio: Studio) -> None:
    """Lay out the export and wire it; a download button needs its file before it is pressed, hence two steps."""
    with gr.Accordion(WORDS.export, open=False, elem_id="export"):
        kind = gr.Dropdown(list(engine.formats), value=engine.formats[0], label=WORDS.export_format, elem_id="export-format")
        name = gr.Textbox(label=WORDS.export_name, placeholder="my-blend", max_length=60, elem_id="export-name")
        note = line("export-note", live=True)
        with gr.Row():
            make = gr.Button(WORDS.export_build, size="sm", elem_id="export-build", min_width=80)
            get = gr.DownloadButton(
                WORDS.export_download, size="sm", interactive=False, elem_id="export-download", min_width=80
            )

    @spoken
    def build(kind: str, name: str, written: str, mixer: mix.Mixer) -> tuple[Any, str]:
        path = Path(engine.export(mix.newest(written, mixer), name, kind))
        button = gr.DownloadButton(f"{WORDS.export_download} {path.name}", value=str(path), interactive=True)
        return button, WORDS.exported(path.name, path.stat().st_size)

    make.click(build, [kind, name, studio.written, studio.mixer], [get, note], **QUIET)
