"""The one place where the benchmark touches the library's training and drawing parts.

A workbench holds the frozen base, every concept's training and held-out pictures, and what was measured before. Losses
and pictures are functions of (concept, update), so an update of the same bits is measured once: that is how methods
that leave earlier concepts alone get their columns of R for nothing, and they get them exactly.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from share_diffusion.adapt import Learner, gradient_directions
from share_diffusion.attached import Attached, attach
from share_diffusion.base import load_base
from share_diffusion.basis import Basis
from share_diffusion.data import Dataset, read_dataset
from share_diffusion.drawing import Sampling, generate
from share_diffusion.evaluate.gates import BLANK
from share_diffusion.evaluate.judge import Judge
from share_diffusion.layer import Update
from share_diffusion.learning import Denoiser, Frozen, Materials, denoising_loss, fixed_noise_loss, freeze, prepare, rate_factor
from share_diffusion.lora import LoRA
from share_diffusion.models.identity import identify, weight_of
from share_diffusion.models.layers import select, shape_of
from share_diffusion.objective import Draw, draw
from share_diffusion.optimizers import make_optimizer
from share_diffusion.pictures import to_tensor
from share_diffusion.recipe import read_recipe_file
from share_diffusion.subspace import Subspace
from share_diffusion.world.render import PLACES, Rendering, render, render_folder, sample_character
from share_diffusion.world.scene import BACKGROUNDS, sample_scene
from stream.plan import CONCEPTS, Plan

ROOT = Path(__file__).resolve().parents[3]
HELD_OUT, ASKED = 9_001, 9_002  # seeds of the pictures for losses and of the prompts for the judge
FIRST_SEED = 500  # of the drawn pictures: the same noise for every method
CURVE_DRAWS = 2  # of the fixed draws, for the points of a learning curve

Batch = tuple[Materials, Draw]


@dataclass(frozen=True)
class Lesson:
    """What learning one concept took: numbers that trained, seconds, and the held-out loss by step."""

    trainable: int
    seconds: float
    curve: Mapping[int, float]


@dataclass(frozen=True)
class Seen:
    """What the judge saw: share of pictures that show the concept, share of the attributes asked for, broken pictures."""

    judge: float
    adherence: float
    broken: int


class Workbench:
    """The frozen base with its layers wrapped, pictures of every concept, and a memory of what was measured."""

    def __init__(self, plan: Plan, folder: Path, device: str | None = None) -> None:
        self.plan, self.folder = plan, folder
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.pipeline = load_base(plan.base, device=self.device)
        freeze(self.pipeline)
        self.judge = Judge.load()
        self.identity = identify(self.pipeline, plan.base)
        self.modules = select(self.pipeline, plan.targets)
        self.shapes = {path: shape_of(module) for path, module in self.modules.items()}
        self.weights = {path: weight_of(module).cpu() for path, module in self.modules.items()}
        self.attach()
        self.memory = Memory(folder / "measured.jsonl")
        self.materials, self.held_out = cache(self._materials), cache(self._held_out)

    def attach(self) -> None:
        """Wrap the layers that are adapted."""
        self.attached = Attached(self.pipeline, sorted(self.modules))

    def _materials(self, *parts: tuple[str, int | None]) -> Materials:
        """Return the training pictures of one concept or several, all of each or the first few."""
        datasets = [(self.dataset(concept), count) for concept, count in parts]
        examples = tuple(example for dataset, count in datasets for example in dataset.examples[:count])
        return prepare(self.pipeline, replace(datasets[0][0], examples=examples), 64)

    def dataset(self, concept: str) -> Dataset:
        """Return a concept's training pictures and captions, the ones that its concept file describes."""
        recipe = read_recipe_file(CONCEPTS / f"{concept}.toml")
        data, place = recipe["data"], self.folder / "data" / concept
        if not place.exists():
            render_folder(data["world"], place, data["pictures"], data["seed"], data["caption"])
        return read_dataset(place, trigger=recipe["trigger"])

    def _held_out(self, concept: str) -> Materials:
        """Return pictures of a concept in combinations and places that neither base nor concept was trained on."""
        with TemporaryDirectory() as temporary:
            some = unseen(concept, self.plan.measures.held_out, HELD_OUT)
            for index, (rendering, caption) in enumerate(some):
                rendering.picture.save(Path(temporary) / f"{index:04d}.png")
                (Path(temporary) / f"{index:04d}.txt").write_text(caption, encoding="utf-8")
            return prepare(self.pipeline, read_dataset(Path(temporary)), 64)

    def draw(self, data: Materials, batch: int, seed: int, step: int) -> Draw:
        """Return a step's pictures, times and noise."""
        return draw(self.pipeline, len(data), batch, tuple(data.latents.shape[1:]), seed, step)

    def lessons(self, concept: str, seed: int) -> Callable[[int], Batch]:
        """Return the batches of a concept, by step."""
        data = self.materials((concept, None))
        return lambda step: (data, self.draw(data, self.plan.training.batch, seed, step))

    def directions(self, concept: str, bases: Mapping[str, Basis], rank: int, seed: int) -> dict[str, Basis]:
        """Return the strongest directions of a concept's gradient that the bases do not span."""
        batches, frozen = self.lessons(concept, seed), Frozen(self.pipeline)

        def loss(index: int) -> Tensor:
            data, drawn = batches(1_000_000_000 + index)
            return denoising_loss(frozen, self.pipeline, data, drawn, self.device).mean()

        return gradient_directions(self.attached, bases, rank, loss, self.plan.training.gradient_batches, seed)

    def teach(
        self,
        learner: Learner,
        concept: str | None,
        batches: Callable[[int], Batch],
        rates: tuple[float, float],
        steps: int | None = None,
        penalty: Callable[[Learner], Tensor] | None = None,
        decay: float = 0.0,
    ) -> Lesson:
        """Train a learner at (coefficients', factors') rates and return what it took; `penalty` is added to the loss."""
        training = self.plan.training
        steps, started, watched = steps or training.steps, time.perf_counter(), 0.0
        learner.to(self.device)
        groups = learner.parameter_groups(*rates)
        optimizer = make_optimizer("adamw", groups, (f"weight_decay={decay}",))
        highest = [group["lr"] for group in optimizer.param_groups]
        model, curve = Denoiser(learner, self.pipeline, self.attached), {}
        for step in range(steps):
            if concept and step in self.plan.measures.curve:
                paused = time.perf_counter()
                curve[step] = self.watch(learner.updates(), concept)
                watched += time.perf_counter() - paused
            for group, rate in zip(optimizer.param_groups, highest, strict=True):
                group["lr"] = rate * rate_factor("cosine", step, steps, training.warmup)
            data, drawn = batches(step)
            loss = denoising_loss(model, self.pipeline, data, drawn, self.device).mean()
            if penalty is not None:
                loss = loss + penalty(learner)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
            optimizer.step()
        seconds = time.perf_counter() - started - watched
        if concept:
            curve |= {steps: self.watch(learner.updates(), concept), 0: self.watch({}, concept)}
        self.attached.set({})
        return Lesson(learner.trainables, seconds, dict(sorted(curve.items())))

    def watch(self, updates: Mapping[str, Sequence[Update]], concept: str) -> float:
        """Return the held-out loss on a few fixed draws with these updates active."""
        return self.fixed_loss(updates, concept, CURVE_DRAWS)

    def fixed_loss(self, updates: Mapping[str, Sequence[Update]], concept: str, count: int | None = None) -> float:
        """Return the held-out loss at fixed noise with these updates active."""
        data, batch = self.held_out(concept), self.plan.measures.batch
        count = count or self.plan.measures.held_out // batch
        draws = [self.draw(data, batch, 123, step) for step in range(count)]
        self.attached.set(updates)
        loss = fixed_noise_loss(Frozen(self.pipeline), self.pipeline, data, draws, self.device)
        self.attached.set({})
        return loss

    def loss(self, lora: LoRA | None, concept: str) -> float:
        """Return a concept's held-out loss under an update; None is the untouched base."""
        measure = self.memory.once("loss", concept, lora, lambda: {"loss": self.fixed_loss(self.updates(lora), concept)})
        return measure["loss"]

    def training_loss(self, lora: LoRA | None, concept: str) -> float:
        """Return the loss on a concept's own training pictures, for tuning a method without the held-out ones."""
        data = self.materials((concept, None))
        self.attached.set(self.updates(lora))
        draws = [self.draw(data, 12, 321, step) for step in range(2)]
        loss = fixed_noise_loss(Frozen(self.pipeline), self.pipeline, data, draws, self.device)
        self.attached.set({})
        return loss

    def inactive_loss(self, subspace: Subspace, concept: str) -> float:
        """Return the loss with a subspace attached and the concept's weight 0, which must be the base's to the last bit."""
        self.attached.detach()
        with attach(self.pipeline, subspace) as handle:
            handle.set_blend({concept: 0.0})
            data, batch = self.held_out(concept), self.plan.measures.batch
            draws = [self.draw(data, batch, 123, step) for step in range(self.plan.measures.held_out // batch)]
            loss = fixed_noise_loss(Frozen(self.pipeline), self.pipeline, data, draws, self.device)
        self.attach()
        return loss

    def seen(self, lora: LoRA | None, concept: str, picture: Path | None = None) -> Seen:
        """Return what the judge sees in pictures of a concept under an update; the first one is kept at `picture`."""
        measure = self.memory.once("judge", concept, lora, lambda: self.draw_and_judge(lora, concept))
        kept = self.memory.picture("judge", concept, lora)
        if picture is not None and kept.exists():  # also where a picture of other settings lies
            picture.parent.mkdir(parents=True, exist_ok=True)
            picture.write_bytes(kept.read_bytes())
        return Seen(**measure)

    def draw_and_judge(self, lora: LoRA | None, concept: str) -> dict[str, Any]:
        """Draw a concept at unseen prompts and return what the judge says."""
        measures = self.plan.measures
        asked = unseen(concept, measures.pictures, ASKED)
        self.attached.set(self.updates(lora))
        sampling = Sampling(steps=measures.sampling_steps, guidance_scale=measures.guidance_scale)
        seeds = [FIRST_SEED + index for index in range(len(asked))]
        drawn = generate(self.pipeline, [caption for _, caption in asked], seeds, sampling)
        self.attached.set({})
        self.memory.keep("judge", concept, lora, drawn[:2])
        return judged(self.judge, drawn, [rendering for rendering, _ in asked], concept)

    def updates(self, lora: LoRA | None) -> dict[str, list[Update]]:
        """Return a LoRA as active updates of the wrapped layers."""
        entries = lora.layers.items() if lora else ()
        return {
            path: [Update(factors.down.mT.contiguous().to(self.device), (), factors.up.to(self.device))]
            for path, factors in entries
        }


class Memory:
    """Measurements by concept and update, kept in a file, so that a second sitting need not repeat them."""

    def __init__(self, path: Path) -> None:
        self.path, self.known = path, {}
        if path.exists():
            lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
            self.known = {tuple(entry["key"]): entry["value"] for entry in lines}

    def once(self, what: str, concept: str, lora: LoRA | None, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a measurement, made now where it was never made."""
        key = (what, concept, fingerprint(lora))
        if key not in self.known:
            self.known[key] = measure()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"key": key, "value": self.known[key]}) + "\n")
        return self.known[key]

    def picture(self, what: str, concept: str, lora: LoRA | None) -> Path:
        """Return where the first pictures of a measurement are."""
        return self.path.parent / "pictures" / f"{what}-{concept}-{fingerprint(lora)}.png"

    def keep(self, what: str, concept: str, lora: LoRA | None, pictures: Sequence[Image.Image]) -> None:
        """Keep pictures of a measurement side by side."""
        place = self.picture(what, concept, lora)
        place.parent.mkdir(parents=True, exist_ok=True)
        strip = Image.new("RGB", (sum(picture.width for picture in pictures), pictures[0].height))
        for index, picture in enumerate(pictures):
            strip.paste(picture, (index * pictures[0].width, 0))
        strip.save(place)


def fingerprint(lora: LoRA | None) -> str:
    """Return a digest of an update's bits; None is the base's."""
    if lora is None:
        return "base"
    digest = hashlib.sha256()
    for path, factors in lora.layers.items():
        digest.update(path.encode())
        for side in (factors.up, factors.down):
            digest.update(side.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@cache
def unseen(concept: str, count: int, seed: int) -> list[tuple[Rendering, str]]:
    """Return pictures with captions of a concept where it was not shown: held-out combinations, or the other places."""
    recipe = read_recipe_file(CONCEPTS / f"{concept}.toml")
    world, places = recipe["data"]["world"], PLACES.get(recipe["data"]["world"])
    made = []
    for index in range(count):
        generator = np.random.default_rng((seed, index, *world.encode()))
        if places is None:
            rendering = render(sample_scene(generator, unseen=True), world)
        else:
            others = [place for place in BACKGROUNDS if place not in places]
            rendering = render(sample_character(world, generator, others[index % len(others)]))
        made.append((rendering, rendering.caption(recipe["data"]["caption"]).replace("[trigger]", recipe["trigger"])))
    return made


def judged(judge: Judge, pictures: Sequence[Image.Image], asked: Sequence[Rendering], concept: str) -> dict[str, Any]:
    """Return the share of pictures that show the concept, the share of attributes that are as asked, and broken ones.

    The attributes of a style's picture are its subject, colour and background, those of a subject's its background.
    """
    tensors = torch.stack([to_tensor(picture) for picture in pictures])
    labels = judge(tensors.nan_to_num())
    style = asked[0].style != "plain"
    head, wanted = ("style" if style else "subject"), read_recipe_file(CONCEPTS / f"{concept}.toml")
    heads = ("subject", "colour", "background") if style else ("background",)
    hits = [labels[name][index] == getattr(rendering.scene, name) for name in heads for index, rendering in enumerate(asked)]
    broken = ~torch.isfinite(tensors).all(dim=(1, 2, 3)) | (tensors.std(dim=(1, 2, 3)) < BLANK)
    return {
        "judge": sum(label == wanted["data"]["world"] for label in labels[head]) / len(asked),
        "adherence": sum(hits) / len(hits),
        "broken": int(broken.sum()),
    }
