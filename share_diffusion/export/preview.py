"""The picture beside an export: what the blend draws, with its settings inside the PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from share_diffusion.blend import Blend
from share_diffusion.drawing import Sampling, generate, png_info, save_png
from share_diffusion.export.metadata import About, acting
from share_diffusion.subspace import Subspace

SEED = 0


def preview_prompt(subspace: Subspace, blend: Blend) -> str:
    """Return the first prompt of the blend's strongest concept, or the triggers of all where it has none."""
    loudest = {term.name: abs(term.weight) for term in sorted(blend.terms, key=lambda term: abs(term.weight))}
    concepts = [subspace[name] for name in sorted(acting(blend), key=lambda name: -loudest[name])]
    prompts = [str(prompt) for concept in concepts for prompt in (concept.details.get("prompts") or ())]
    return prompts[0] if prompts else ", ".join(concept.trigger for concept in concepts if concept.trigger) or "a picture"


def draw_preview(pipeline: Any, subspace: Subspace, blend: Blend) -> Image.Image:
    """Return what a pipeline draws that has the blend in its weights."""
    prompt = preview_prompt(subspace, blend)
    picture = generate(pipeline, [prompt], [SEED])[0]
    picture.info["prompt"] = prompt
    picture.info["sampling"] = Sampling().resolved(pipeline)
    return picture


def write_preview(picture: Image.Image, path: Path, about: About) -> None:
    """Write the picture with the settings that it was drawn with."""
    info = png_info(picture.info["prompt"], SEED, picture.info["sampling"], str(about.blend), {"base": about.base})
    plain = picture.copy()
    plain.info = {}
    save_png(plain, path, info)
