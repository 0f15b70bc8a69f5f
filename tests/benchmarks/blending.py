"""Blends in the picture world, judged: a style and a subject in one picture, and two styles side by side.

    python tests/benchmarks/blending.py --subspace outputs/tiny/subspace.safetensors

alone    each concept at weight 1: the share of pictures in which the judge sees it
joint    style x subject: the share of pictures in which the judge sees both, and the harmonic mean of the two shares.
         Summed at weight 1 each, and with the method `loss-equalised`; the same pictures of the base tell what the words
         alone do, and true blends, rendered and sent through the base's autoencoder, what the judge could see at best
regions  one style on the left half, another on the right of a picture twice as wide: each half is judged as a picture of
         its own. Diagonal dominance is the share of halves in which their own style is likelier than the other one;
         leakage the share in which the judge sees the other one. Words take the concepts' share of the picture (the
         rule) or, for comparison, their whole weight.

Prompts are combinations that neither the base nor a concept was trained on. Every batch draws many blends at once.
Writes results/blending.json and a sheet beside it.
"""

from __future__ import annotations

import argparse
import json
from itertools import permutations, product
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from share_diffusion.attached import TEXT, AttachedSubspace, attach
from share_diffusion.base import load_base
from share_diffusion.drawing import BATCH, Sampling, generate
from share_diffusion.evaluate.gates import unseen_scenes
from share_diffusion.evaluate.judge import HEADS, Judge
from share_diffusion.pictures import to_tensor
from share_diffusion.recipe import read_recipe_file
from share_diffusion.sheet import Row, contact_sheet
from share_diffusion.subspace import Subspace
from share_diffusion.world.render import render_blend
from share_diffusion.world.scene import BACKGROUNDS, SIDE

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
SOFT = 0.1
Wish = tuple[str, str, int]  # prompt, blend, seed
WAYS = {  # the last one's pictures are shown
    "summed": "{style} + {subject}",
    "loss-equalised strength 1": "{style} + {subject} | loss-equalised strength=1",
    "loss-equalised": "{style} + {subject} | loss-equalised",
}


def caption(name: str, **words: str) -> str:
    """Return a concept's own caption of a scene or place."""
    recipe = read_recipe_file(ROOT / "configs/concepts" / f"{name}.toml")
    return recipe["data"]["caption"].replace("[trigger]", recipe["trigger"]).format(**words)


def prompts(style: str | None, subject: str | None, count: int) -> list[str]:
    """Return unseen scenes in the words of a style, with a subject in the place of the scene's own, or of one of both."""
    places = [(scene.describe(), BACKGROUNDS[scene.background][0]) for scene in unseen_scenes(count, seed=2)]
    scenes = [caption(subject, place=place) if subject else scene for scene, place in places]
    return [caption(style, scene=scene) for scene in scenes] if style else scenes


def draw(handle: AttachedSubspace, wishes: list[Wish], sampling: Sampling, whole_words: bool = False) -> list[Image.Image]:
    """Draw each prompt with its own blend, a batch at a time; `whole_words` takes no share of the picture for words."""
    pictures: list[Image.Image] = []
    for start in range(0, len(wishes), BATCH):
        some = wishes[start : start + BATCH]
        handle.set_blends([blend for _, blend, _ in some])
        if whole_words:
            handle.active.areas |= {region: 1.0 for region in handle.active.areas if region != ""}
            handle.shown.clear()
            handle.show(TEXT, handle.active.moment(None), None)
        pictures += generate(handle.pipeline, [prompt for prompt, _, _ in some], [seed for *_, seed in some], sampling)
        print(f"{len(pictures)} of {len(wishes)}", flush=True)
    return pictures


def labels(judge: Judge, pictures: list[Image.Image]) -> dict[str, list[str]]:
    """Return what the judge sees."""
    return judge(torch.stack([to_tensor(picture) for picture in pictures]))


def share(hits: list[bool]) -> float:
    """Return the share of hits."""
    return round(sum(hits) / len(hits), 4)


def alone(handle: AttachedSubspace, judge: Judge, kinds: dict[str, str], count: int, sampling: Sampling) -> dict[str, float]:
    """Return each concept's acceptance at weight 1."""
    found = {}
    wishes: list[Wish] = []
    for name, kind in kinds.items():
        texts = prompts(name if kind == "style" else None, name if kind == "subject" else None, count)
        wishes += [(text, f"{name}:1", 300 + seed) for seed, text in enumerate(texts)]
    pictures = draw(handle, wishes, sampling)
    for index, (name, kind) in enumerate(kinds.items()):
        seen = labels(judge, pictures[index * count : (index + 1) * count])[kind]
        found[name] = share([label == name for label in seen])
    return found


def joint(
    handle: AttachedSubspace, judge: Judge, pairs: list[tuple[str, str]], count: int, sampling: Sampling, how: str
) -> tuple[dict[str, dict[str, float]], dict[str, list[Image.Image]]]:
    """Return, for each style and subject, how often the judge sees both, each of them, and some of the pictures.

    `how` is the blend with {style} and {subject} in it.
    """
    wishes = [
        (text, how.format(style=style, subject=subject), 400 + seed)
        for style, subject in pairs
        for seed, text in enumerate(prompts(style, subject, count))
    ]
    pictures, found, shown = draw(handle, wishes, sampling), {}, {}
    for index, (style, subject) in enumerate(pairs):
        some = pictures[index * count : (index + 1) * count]
        seen = labels(judge, some)
        styles, subjects = (
            [label == wanted for label in seen[head]] for head, wanted in (("style", style), ("subject", subject))
        )
        one, other = share(styles), share(subjects)
        found[f"{style} x {subject}"] = {
            "joint": share([a and b for a, b in zip(styles, subjects, strict=True)]),
            "style": one,
            "subject": other,
            "harmonic_mean": round(2 * one * other / (one + other), 4) if one + other else 0.0,
        }
        shown[f"{style} x {subject}"] = some[:4]
    return found, shown


def rendered(pipeline: Any, judge: Judge, pairs: list[tuple[str, str]], count: int) -> dict[str, float]:
    """Return how often the judge sees both in true blends, which the world renders, through the base's autoencoder."""
    found, places = {}, list(BACKGROUNDS)
    for style, subject in pairs:
        some = [render_blend(style, subject, places[index % len(places)], 600, index).picture for index in range(count)]
        seen = judge(through_autoencoder(pipeline, torch.stack([to_tensor(picture) for picture in some])))
        both = zip(seen["style"], seen["subject"], strict=True)
        found[f"{style} x {subject}"] = share([(style, subject) == labels for labels in both])
    return found


@torch.no_grad()
def through_autoencoder(pipeline: Any, pictures: torch.Tensor) -> torch.Tensor:
    """Return pictures (n, 3, side, side) from -1 to 1 as the base's autoencoder gives them back."""
    return pipeline.vae.decode(pipeline.vae.encode(pictures).latent_dist.mean).sample.clamp(-1, 1)


def regions(
    handle: AttachedSubspace, judge: Judge, styles: list[str], count: int, sampling: Sampling, whole_words: bool
) -> tuple[dict[str, Any], list[Image.Image]]:
    """Return dominance and leakage of two styles side by side, over all ordered pairs, and the first pictures."""
    pairs = list(permutations(styles, 2))
    wishes = [
        (text, f"{left}[region=left soft={SOFT}] + {right}[region=right soft={SOFT}]", 500 + seed)
        for left, right in pairs
        for seed, text in enumerate(prompts(None, None, count))
    ]
    pictures = draw(handle, wishes, Sampling(sampling.steps, sampling.guidance_scale, "", 2 * SIDE, SIDE), whole_words)
    halves = [picture.crop((side, 0, side + SIDE, SIDE)) for picture in pictures for side in (0, SIDE)]
    likely = judge.probabilities(torch.stack([to_tensor(half) for half in halves]))["style"]
    seen = labels(judge, halves)["style"]
    wanted = [pair for pair in pairs for _ in range(count)]
    own = [name for pair in wanted for name in pair]
    other = [name for pair in wanted for name in reversed(pair)]
    column = {name: HEADS["style"].index(name) for name in styles}
    rows = zip(likely, own, other, strict=True)
    return {
        "diagonal_dominance": share([bool(row[column[a]] > row[column[b]]) for row, a, b in rows]),
        "accepted": share([label == name for label, name in zip(seen, own, strict=True)]),
        "leakage": share([label == name for label, name in zip(seen, other, strict=True)]),
        "halves": len(halves),
    }, pictures[::count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--subspace", type=Path, required=True)
    parser.add_argument("--concepts", nargs="+", help="default: all that the judge knows")
    parser.add_argument("--pictures", type=int, default=16, help="of each concept, pair and order")
    parser.add_argument("--steps", type=int, default=25)
    arguments = parser.parse_args()
    judge, pipeline = Judge.load(), load_base("tiny")
    subspace = Subspace.load(arguments.subspace)
    names = arguments.concepts or [name for name in subspace.concepts if any(name in known for known in HEADS.values())]
    kinds = {name: subspace[name].kind for name in names}
    styles, subjects = ([name for name in names if kinds[name] == kind] for kind in ("style", "subject"))
    sampling, count = Sampling(arguments.steps).resolved(pipeline), arguments.pictures
    facts: dict[str, Any] = {"pictures": count, "steps": sampling.steps, "guidance_scale": sampling.guidance_scale}
    with attach(pipeline, subspace) as handle:
        side_by_side, wide = regions(handle, judge, styles, count, sampling, False)
        facts["regions"] = {"words take their share": side_by_side}
        facts["alone"] = alone(handle, judge, kinds, count, sampling)
        pairs = list(product(styles, subjects))
        facts["true blends"] = rendered(pipeline, judge, pairs, 4 * count)
        shown: dict[str, list[Image.Image]] = {}
        for name, how in WAYS.items():
            facts[name], shown = joint(handle, judge, pairs, count, sampling, how)
            facts[f"{name}, summary"] = summary(facts[name], facts["alone"], facts["true blends"])
        write(facts, shown, wide)
        facts["regions"]["words take all"], _ = regions(handle, judge, styles, count, sampling, True)
        facts["words alone"] = joint(handle, judge, pairs, count, sampling, "")[0]
    write(facts, shown, wide)
    print(json.dumps(facts, indent=1))


def summary(found: dict[str, dict[str, float]], alone: dict[str, float], best: dict[str, float]) -> dict[str, Any]:
    """Return the mean joint success over all pairs, over those whose concepts the judge sees alone, and over those it can see.

    Both limits are .9: of each concept's pictures alone, and of true blends.
    """
    chosen = {
        "all pairs": list(found),
        "each alone at .9": [pair for pair in found if min(alone[name] for name in pair.split(" x ")) >= 0.9],
        "true blends at .9": [pair for pair in found if best[pair] >= 0.9],
    }
    return {
        name: {"pairs": len(pairs), "mean": round(sum(found[pair]["joint"] for pair in pairs) / max(1, len(pairs)), 4)}
        for name, pairs in chosen.items()
    }


def write(facts: dict[str, Any], shown: dict[str, list[Image.Image]], wide: list[Image.Image]) -> None:
    """Write the figures and a sheet."""
    found = facts[list(WAYS)[-1]]
    rows = [Row(name, f"both seen in {100 * found[name]['joint']:.0f} %", some) for name, some in shown.items()]
    sheet = contact_sheet("style x subject, loss-equalised", rows)
    tall = Image.new("RGB", (sheet.width, sheet.height + 34 + 168 * -(-len(wide) // 2)), (250, 250, 248))
    tall.paste(sheet)
    for number, picture in enumerate(wide):
        place = 190 + 336 * (number % 2), sheet.height + 8 + 168 * (number // 2)
        tall.paste(picture.resize((320, 160), Image.Resampling.NEAREST), place)
    tall.quantize(128).save(RESULTS / "blending.png", optimize=True)
    (RESULTS / "blending.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
