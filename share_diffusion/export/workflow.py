"""A ready ComfyUI workflow, described once and written twice: as the page's JSON and as the JSON of its HTTP interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Link:
    """An output of another node: its number in the workflow, the output's slot, and its type."""

    node: int
    slot: int
    kind: str


@dataclass(frozen=True)
class Node:
    """One node: its class, title, linked inputs, widget values in the page's order, and the types of its outputs.

    A widget whose name starts with "_" is shown on the page only and unknown to the interface.
    """

    kind: str
    title: str
    inputs: dict[str, Link]
    widgets: dict[str, Any]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Drawing:
    """What a workflow draws with: prompt, picture side, and the sampler's settings in ComfyUI's words."""

    prompt: str
    side: int
    steps: int
    guidance: float
    sampler: str
    scheduler: str
    prefix: str


def nodes(base: Node, lora: str, drawing: Drawing) -> list[Node]:
    """Return the nodes from the base to the picture; `base` gives model, text encoder and VAE, and perhaps its latent."""
    own_latent = "LATENT" in base.outputs
    made = [
        base,
        Node(
            "LoraLoader",
            "the blend",
            {"model": Link(1, 0, "MODEL"), "clip": Link(1, 1, "CLIP")},
            {"lora_name": lora, "strength_model": 1.0, "strength_clip": 1.0},
            ("MODEL", "CLIP"),
        ),
        Node("CLIPTextEncode", "prompt", {"clip": Link(2, 1, "CLIP")}, {"text": drawing.prompt}, ("CONDITIONING",)),
        Node("CLIPTextEncode", "negative prompt", {"clip": Link(2, 1, "CLIP")}, {"text": ""}, ("CONDITIONING",)),
    ]
    if not own_latent:
        size = {"width": drawing.side, "height": drawing.side, "batch_size": 1}
        made.append(Node("EmptyLatentImage", "size", {}, size, ("LATENT",)))
    latent = Link(1, base.outputs.index("LATENT"), "LATENT") if own_latent else Link(len(made), 0, "LATENT")
    made.append(sampler(drawing, latent))
    drawn, vae = Link(len(made), 0, "LATENT"), Link(1, 2, "VAE")
    made.append(Node("VAEDecode", "decode", {"samples": drawn, "vae": vae}, {}, ("IMAGE",)))
    picture = Link(len(made), 0, "IMAGE")
    made.append(Node("SaveImage", "picture", {"images": picture}, {"filename_prefix": drawing.prefix}, ()))
    return made


def sampler(drawing: Drawing, latent: Link) -> Node:
    """Return the node that denoises."""
    inputs = {
        "model": Link(2, 0, "MODEL"),
        "positive": Link(3, 0, "CONDITIONING"),
        "negative": Link(4, 0, "CONDITIONING"),
        "latent_image": latent,
    }
    widgets = {
        "seed": 0,
        "_control_after_generate": "fixed",
        "steps": drawing.steps,
        "cfg": drawing.guidance,
        "sampler_name": drawing.sampler,
        "scheduler": drawing.scheduler,
        "denoise": 1.0,
    }
    return Node("KSampler", "sampler", inputs, widgets, ("LATENT",))


def api_json(made: Sequence[Node]) -> dict[str, Any]:
    """Return the workflow as ComfyUI's `/prompt` takes it."""
    return {
        str(number): {
            "class_type": node.kind,
            "inputs": {
                **{name: value for name, value in node.widgets.items() if not name.startswith("_")},
                **{name: [str(link.node), link.slot] for name, link in node.inputs.items()},
            },
            "_meta": {"title": node.title},
        }
        for number, node in enumerate(made, 1)
    }


def page_json(made: Sequence[Node]) -> dict[str, Any]:
    """Return the workflow as ComfyUI's page opens it."""
    links: list[list[Any]] = []
    for number, node in enumerate(made, 1):
        for slot, link in enumerate(node.inputs.values()):
            links.append([len(links) + 1, link.node, link.slot, number, slot, link.kind])
    return {
        "last_node_id": len(made),
        "last_link_id": len(links),
        "nodes": [page_node(number, node, links) for number, node in enumerate(made, 1)],
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def page_node(number: int, node: Node, links: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Return one node with its place on the page and its ends of the links."""
    coming = {link[4]: link[0] for link in links if link[3] == number}
    inputs = [{"name": name, "type": link.kind, "link": coming[slot]} for slot, (name, link) in enumerate(node.inputs.items())]
    going = [[link[0] for link in links if link[1] == number and link[2] == slot] for slot in range(len(node.outputs))]
    outputs = [
        {"name": kind, "type": kind, "links": going[slot] or None, "slot_index": slot} for slot, kind in enumerate(node.outputs)
    ]
    return {
        "id": number,
        "type": node.kind,
        "title": node.title,
        "pos": [60 + 330 * ((number - 1) % 4), 80 + 320 * ((number - 1) // 4)],
        "size": [300, 260 if node.kind == "KSampler" else 120],
        "flags": {},
        "order": number - 1,
        "mode": 0,
        "inputs": inputs,
        "outputs": outputs,
        "properties": {"Node name for S&R": node.kind},
        "widgets_values": list(node.widgets.values()),
    }
