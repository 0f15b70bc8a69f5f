"""Pictures of what a subspace holds, before and after a concept is learned, on one contact sheet.

Every concept is drawn from its own prompts at the same seeds, so that two rows differ by what was learned alone.
"""

from __future__ import annotations

from typing import Any

from PIL import Image
from tqdm import tqdm

from share_diffusion.attached import attach
from share_diffusion.drawing import generate
from share_diffusion.recipe import Recipe
from share_diffusion.sheet import Row, contact_sheet
from share_diffusion.subspace import Subspace

COLUMNS = 4
MOST = 12  # concepts on one sheet; of more, the oldest and the newest are drawn
Pictures = dict[str, list[Image.Image]]


def drawn_concepts(subspace: Subspace) -> list[str]:
    """Return the concepts that go on a sheet."""
    names = list(subspace.concepts)
    return names if len(names) <= MOST else [*names[: MOST // 2], *names[-MOST // 2 :]]


def draw_base(pipeline: Any, recipe: Recipe) -> list[Image.Image]:
    """Return what the untouched base makes of the new concept's prompts."""
    prompts = list(recipe.prompts)[:COLUMNS]
    return generate(pipeline, prompts, list(range(len(prompts))))


def draw_concepts(pipeline: Any, subspace: Subspace, title: str) -> Pictures:
    """Return each held concept alone at weight 1, at its own prompts."""
    if not subspace.concepts:
        return {}
    pictures: Pictures = {}
    with attach(pipeline, subspace) as handle:
        for name in tqdm(drawn_concepts(subspace), desc=title, unit="concept", leave=False):
            concept = subspace[name]
            prompts = list(concept.details.get("prompts") or [concept.trigger])[:COLUMNS]
            handle.set_blend({name: 1.0})
            pictures[name] = generate(pipeline, prompts, list(range(len(prompts))))
    return pictures


def make_sheet(recipe: Recipe, base: str, untouched: list[Image.Image], before: Pictures, after: Pictures) -> Image.Image:
    """Return the contact sheet: the base, the new concept, and every earlier one before and after."""
    rows = [
        Row("base", "step 0: the concept starts as exactly the base", untouched, recipe.prompts[:COLUMNS]),
        Row(recipe.name, "at the end", after.get(recipe.name, ())),
    ]
    for name in (name for name in before if name in after):
        rows += [Row(name, f"before {recipe.name}", before[name]), Row(name, f"after {recipe.name} was merged", after[name])]
    return contact_sheet(f"{recipe.name} on {base}, same seeds in every row", rows)
