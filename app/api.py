"""The page as a service: two endpoints with stable names, `/blend` and `/concepts`, for `gradio_client` and plain HTTP.

client.predict("watercolor painting of a robot", "watercolor:0.8 + robot:0.5", 7, api_name="/blend")
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from app.mix import taken_from
from app.speak import spoken
from app.studio import GPU
from app.wish import Wish


def wire_api(engine: Any) -> None:
    """Add the endpoints; the components that describe their inputs are never shown."""
    start = engine.start
    with gr.Column(visible=False):
        prompt, blend = gr.Textbox(label="prompt"), gr.Textbox(label="blend")
        seed = gr.Number(0, label="seed")
        negative = gr.Textbox("", label="negative_prompt")
        steps = gr.Number(start.steps, label="steps")
        guidance = gr.Number(start.guidance_scale, label="guidance_scale")
        width, height = (
            gr.Number(start.width, label="width"),
            gr.Number(start.height, label="height"),
        )
        picture = gr.Image(format="png", type="filepath", label="picture")
        concepts = gr.JSON(label="concepts")
        draw, listing = gr.Button("blend"), gr.Button("concepts")

    @spoken
    def blend_api(prompt, blend, seed, negative_prompt, steps, guidance_scale, width, height) -> str:
        """Draw one picture of a written blend, such as "watercolor:0.8 + robot:0.5", and return it as a PNG.

        Tags in the prompt, such as "<share:watercolor:0.8>", join the blend.
        """
        prompt, blend = taken_from(prompt or "", blend or "")
        asked = {
            "prompt": prompt,
            "blend": blend,
            "seed": seed,
            "negative_prompt": negative_prompt,
            "steps": steps,
            "guidance_scale": guidance_scale,
            "width": width,
            "height": height,
        }
        engine.refresh()
        wish = Wish.of({**engine.start.values, **asked}, engine.limits, list(engine.cards))
        ids = [frame.ids for frame in engine.draw([wish]) if frame.ids][-1]
        return str(engine.history.path(ids[0]))

    @spoken
    def concepts_api() -> list[dict[str, Any]]:
        """List the concepts: name, kind, trigger, retention and the weight each is usually added with."""
        engine.refresh()
        return [
            {
                "name": card.name,
                "kind": card.kind,
                "trigger": card.trigger,
                "retention": card.retention,
                "weight": card.weight,
            }
            for card in engine.cards.values()
        ]

    inputs = [prompt, blend, seed, negative, steps, guidance, width, height]
    draw.click(blend_api, inputs, picture, api_name="blend", **GPU)
    listing.click(concepts_api, None, concepts, api_name="concepts")
