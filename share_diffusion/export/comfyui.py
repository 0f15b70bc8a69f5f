"""ComfyUI's folder layout, to be copied over a ComfyUI folder or written straight into it.

    models/loras/NAME.safetensors           the blend, with NAME.json and NAME.png
    models/checkpoints/BASE.safetensors     the untouched base, where it was given and has a single-file layout
    models/share/BASE.base.safetensors      the embedded base, which opens through the nodes of app/comfyui
    user/default/workflows/NAME.json        the workflow, in the page's list
    user/default/api/NAME.json              the same for the HTTP interface

NAME is the folder's unless another is given. A base that is there already, byte for byte, is not written again.
"""

from __future__ import annotations

import filecmp
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from share_diffusion.export.base_file import ENDING, write_base_file
from share_diffusion.export.checkpoint import write_checkpoint
from share_diffusion.export.family import Family
from share_diffusion.export.filename import safe_name
from share_diffusion.export.metadata import About, modelspec
from share_diffusion.export.readers.keys import is_stock
from share_diffusion.export.workflow import Drawing, Node, api_json, nodes, page_json

if TYPE_CHECKING:
    from share_diffusion.export.formats import Task

SINGLE_FILE = ".safetensors"


def write_comfyui(task: Task, stage: Path) -> None:
    """Write the blend, the base and the workflow in ComfyUI's folders below `stage`."""
    from share_diffusion.export.formats import write_lora

    about, name = task.about, safe_name(task.about.title)
    for folder in ("models/loras", "user/default/workflows", "user/default/api"):
        (stage / folder).mkdir(parents=True)
    write_lora(task, stage / "models/loras" / f"{name}.safetensors", "kohya")
    base = base_node(about, task.pipeline is not None)
    if task.pipeline is not None:
        write_base(task, stage)
    made = nodes(base, f"{name}.safetensors", drawing_of(task, name))
    for place, content in (("workflows", page_json(made)), ("api", api_json(made))):
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        (stage / "user/default" / place / f"{name}.json").write_text(text, encoding="utf-8")


def base_file(about: About) -> str:
    """Return the base's name as a file name."""
    return safe_name(about.base.removesuffix(SINGLE_FILE) or "base")


def base_node(about: About, given: bool) -> Node:
    """Return the node that loads the base."""
    if is_stock(about.family) or not given:
        name = {"ckpt_name": f"{base_file(about)}{SINGLE_FILE}"}
        return Node("CheckpointLoaderSimple", "the base", {}, name, ("MODEL", "CLIP", "VAE"))
    outputs = ("MODEL", "CLIP", "VAE", "LATENT")
    return Node("ShareBase", "the embedded base", {}, {"base": f"{base_file(about)}{ENDING}"}, outputs)


def write_base(task: Task, stage: Path) -> None:
    """Write the untouched base where the workflow's first node finds it."""
    about, name = task.about, base_file(task.about)
    if is_stock(about.family):
        (stage / "models/checkpoints").mkdir()
        path = stage / "models/checkpoints" / f"{name}{SINGLE_FILE}"
        untouched = About(about.base, type(about.blend)({}), about.family, prediction=about.prediction)
        said = modelspec(untouched, about.family.modelspec)
        write_checkpoint(task.pipeline, about.family, path, task.dtype, said)
    else:
        (stage / "models/share").mkdir()
        write_base_file(task.pipeline, stage / "models/share" / f"{name}{ENDING}", task.dtype)


def own_files(home: Path, name: str) -> list[Path]:
    """Return the files that belong to one blend alone, whether or not they are there."""
    loras, workflows = home / "models/loras", home / "user/default"
    lora = [loras / f"{name}{ending}" for ending in (SINGLE_FILE, ".json", ".png")]
    return [*lora, *(workflows / place / f"{name}.json" for place in ("workflows", "api"))]


def bases(stage: Path) -> Iterator[Path]:
    """Yield the base's file in a stage, where one was written."""
    yield from [*stage.glob("models/checkpoints/*"), *stage.glob("models/share/*")]


def keep_base(stage: Path, home: Path, replace: bool) -> None:
    """Take a base out of the stage that is in its place already; ValueError where another file is and may not be replaced."""
    for made in bases(stage):
        place = home / made.relative_to(stage)
        if place.is_file() and filecmp.cmp(made, place, shallow=False):
            made.unlink()
        elif os.path.lexists(place) and not replace:
            raise ValueError(
                f"{place} is already there and is not this base in this precision; export with the --precision that it has, "
                "move it away, or pass --replace"
            )


def drawing_of(task: Task, name: str) -> Drawing:
    """Return what the workflow draws: the preview's prompt at the family's own size."""
    prompt = task.picture.info["prompt"] if task.picture is not None else task.about.trigger
    family: Family = task.about.family
    if is_stock(family) or task.pipeline is None:
        return Drawing(prompt, family.resolution or 512, 25, 7.0, "dpmpp_2m", "karras", name)
    from share_diffusion.drawing import Sampling

    own = Sampling().resolved(task.pipeline)
    return Drawing(prompt, own.width or 64, own.steps or 25, own.guidance_scale or 3.0, "ddim", "sgm_uniform", name)
