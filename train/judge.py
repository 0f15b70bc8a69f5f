"""Train the judge of the picture world on pictures that went through the base's autoencoder, or let it judge a base.

    python train/judge.py --vae runs/base/vae      # draw, train, measure: about half an hour on one CPU core
    python train/judge.py --gates                  # what the finished base draws in unseen combinations

Every stage resumes where it was left: decoded pictures are kept in shards under --work_dir (remove them after changing
how they are drawn), the weights in a checkpoint, and randomness is a pure function of (seed, step).

What is unusual: factors are independent, the combinations held out of the base's training among them, so that the judge
cannot guess one factor from another; pictures that show nothing, no subject, two subjects in one or two styles at once
are answered "unknown"; and half of the pictures are decoded from wrong latents (smoothed, exaggerated, noisy) and all
are bent and recoloured a little, because generated pictures are imperfect in these ways.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFilter
from ranges import COUNT, MOST, WHOLE, Rule, is_count, out_of_range
from status import exit_status
from torch import Tensor
from tqdm import tqdm

from share_diffusion.evaluate.gates import Sampling, check_base, sheet
from share_diffusion.evaluate.judge import HEADS, UNKNOWN, Judge, Network, name_all, write_judge
from share_diffusion.precision import half_precision
from share_diffusion.settings import flag, parse
from share_diffusion.world.characters import CHARACTERS
from share_diffusion.world.render import PLAIN, Rendering, render, render_blend
from share_diffusion.world.scene import (
    BACKGROUNDS,
    CANVAS,
    COLOURS,
    SIDE,
    SUBJECTS,
    Pen,
    Scene,
    placements,
    reduce,
    sample_scene,
)
from share_diffusion.world.styles import STYLES
from share_diffusion.world.textures import texture

SHARD = 500
RATE = 4e-3
UNDEFINED = -1  # a head without a truth for a picture; it adds nothing to the loss
Labels = dict[str, str]
NOTHING: Labels = dict.fromkeys(HEADS, UNKNOWN)
RULES: tuple[Rule, ...] = (
    (f"a multiple of {SHARD}, {SHARD} to {MOST:,}", lambda value: is_count(value) and value % SHARD == 0, ("pictures",)),
    (f"4 to {MOST:,}", lambda value: 4 <= value <= MOST, ("held_out",)),
    (COUNT, is_count, ("steps", "checkpointing_steps", "threads", "prompts", "inference_steps")),
    (WHOLE, lambda value: value == 0 or is_count(value), ("seed",)),
    ("0 or more, and finite", lambda value: value >= 0, ("guidance",)),
)


@dataclass(frozen=True)
class JudgeSettings:
    """How the judge is trained."""

    vae: str = flag("share_diffusion/assets/tiny/vae", "folder of the autoencoder that pictures go through")
    output: str = flag("share_diffusion/assets/judge.safetensors", "where the weights go; the report lies beside it")
    work_dir: str = flag("runs/judge", "where pictures, checkpoint and the gate's results go")
    pictures: int = flag(24000, "pictures to learn from")
    held_out: int = flag(4000, "pictures to measure on")
    steps: int = flag(5000, "optimizer steps, 64 pictures each")
    checkpointing_steps: int = flag(500, "optimizer steps between two checkpoints")
    seed: int = flag(0, "decides pictures, weights and noise")
    threads: int = flag(1, "CPU threads")
    gates: bool = flag(False, "train nothing; judge what --base draws in unseen combinations")
    base: str = flag("share_diffusion/assets/tiny", "pipeline to judge")
    prompts: int = flag(512, "prompts of the gate")
    inference_steps: int = flag(25, "denoising steps of the gate")
    guidance: float = flag(2.0, "guidance scale of the gate")


@dataclass(frozen=True)
class Example:
    """A picture (64, 64, 3) uint8 and the labels that are true of it; `picture` is None for random latents."""

    picture: np.ndarray | None
    labels: Labels


# Pictures and their truth


def truth(rendering: Rendering) -> Labels:
    """Return the labels of a rendering; colour is left out where no colour word holds."""
    scene, style = rendering.scene, rendering.style
    labels = {"style": style, "subject": scene.subject, "background": scene.background, "count": str(scene.count)}
    if scene.subject in SUBJECTS and (style == PLAIN or STYLES[style].keeps_colour):
        labels["colour"] = scene.colour
    return labels


def choose(generator: np.random.Generator, options: Any) -> Any:
    """Return one of the options, all equally likely."""
    return list(options)[generator.integers(len(options))]


def any_scene(generator: np.random.Generator, subjects: Any) -> Scene:
    """Draw a scene with every factor independent of the others."""
    subject = choose(generator, subjects)
    scene = replace(
        sample_scene(generator),
        subject=subject,
        colour=choose(generator, COLOURS) if subject in SUBJECTS else "",
        background=choose(generator, BACKGROUNDS),
    )
    if generator.random() < 0.2:
        return replace(scene, count=int(generator.integers(2, 4)), size="", side="")
    return scene


def pixels(rendering: Rendering) -> np.ndarray:
    """Return the picture as (64, 64, 3) float32 in [0, 255]."""
    return np.asarray(rendering.picture, np.float32)


def mixed(first: np.ndarray, second: np.ndarray, weight: float) -> np.ndarray:
    """Return the first picture with `weight` of the second, uint8."""
    return (first + (second - first) * weight).round().astype(np.uint8)


def draw_scene(generator: np.random.Generator) -> Example:
    """Draw a scene with a base subject or a character, plain or in a style."""
    scene = any_scene(generator, SUBJECTS if generator.random() < 0.7 else CHARACTERS)
    rendering = render(scene, PLAIN if generator.random() < 0.5 else choose(generator, STYLES))
    return Example(np.asarray(rendering.picture), truth(rendering))


def draw_between_styles(generator: np.random.Generator) -> Example:
    """Draw a picture between two styles, or between plain and a style: near the middle it has neither."""
    scene = any_scene(generator, SUBJECTS if generator.random() < 0.7 else CHARACTERS)
    first, second = (str(name) for name in generator.choice([PLAIN, PLAIN, *STYLES], 2, replace=False))
    weight = float(choose(generator, (0.15, 0.85, 0.5))) + generator.uniform(-0.1, 0.1)
    one, other = render(scene, first), render(scene, second)
    labels = truth(one) if weight < 0.5 else truth(other)
    if "colour" not in truth(one) or "colour" not in truth(other):
        labels.pop("colour", None)
    labels["style"] = labels["style"] if abs(weight - 0.5) > 0.2 or first == second else UNKNOWN
    return Example(mixed(pixels(one), pixels(other), weight), labels)


def draw_without_subject(generator: np.random.Generator) -> Example:
    """Draw an empty place, or two different subjects laid over each other."""
    scene, style = any_scene(generator, SUBJECTS), PLAIN if generator.random() < 0.6 else choose(generator, STYLES)
    labels = {"style": style, "background": scene.background, "subject": UNKNOWN}
    if generator.random() < 0.5:
        place = Image.fromarray(np.asarray(BACKGROUNDS[scene.background][1](generator)))
        if style != PLAIN:
            styled = STYLES[style].apply(np.asarray(place, np.float32) / 255, generator)
            place = Image.fromarray((styled * 255).round().astype(np.uint8))
        return Example(np.asarray(reduce(place)), {**labels, "colour": UNKNOWN, "count": UNKNOWN})
    other = replace(scene, subject=choose(generator, {*SUBJECTS} - {scene.subject}))
    weight = generator.uniform(0.42, 0.58)
    return Example(mixed(pixels(render(scene, style)), pixels(render(other, style)), weight), labels)


def draw_without_place(generator: np.random.Generator) -> Example:
    """Draw a subject on a flat ground of a random colour."""
    scene = any_scene(generator, [*SUBJECTS, *CHARACTERS])
    canvas = Image.new("RGB", (CANVAS, CANVAS), tuple(int(value) for value in generator.integers(0, 256, 3)))
    for x, y, size in placements(scene, generator):
        pen = Pen(ImageDraw.Draw(canvas), x, y, size)
        if scene.subject in SUBJECTS:
            SUBJECTS[scene.subject](pen, COLOURS[scene.colour])
        else:
            CHARACTERS[scene.subject].sketch(pen)
    labels = {"subject": scene.subject, "background": UNKNOWN, "count": str(scene.count)}
    return Example(np.asarray(reduce(canvas)), labels | ({"colour": scene.colour} if scene.colour else {}))


def draw_nothing(generator: np.random.Generator) -> Example:
    """Draw a blank, noise, a shuffled or blurred scene, marks on a ground, or nothing yet: random latents."""
    kind = generator.integers(6)
    ground = generator.integers(0, 256, 3)
    if kind == 0:
        ramp = np.linspace(0, 1, SIDE)[:, None, None] * generator.integers(0, 2)
        ground = ground if generator.random() < 0.6 else np.full(3, generator.choice((0, ground[0], 255)))
        picture = np.broadcast_to(ground * (1 - ramp) + generator.integers(0, 256, 3) * ramp, (SIDE, SIDE, 3))
        return Example(picture.round().astype(np.uint8), NOTHING)
    if kind == 1:
        cells = int(choose(generator, (4, 8, 16, 32, 64)))
        noise = ground + generator.normal(0, generator.uniform(10, 80), (cells, cells, 3))
        image = Image.fromarray(noise.clip(0, 255).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        return Example(np.asarray(image), NOTHING)
    if kind == 2:
        return Example(np.asarray(texture(generator)), {"style": UNKNOWN})
    if kind == 3:
        return Example(None, NOTHING)
    picture = draw_scene(generator).picture
    assert picture is not None
    if kind == 4:
        side = int(choose(generator, (8, 16)))
        tiles = picture.reshape(SIDE // side, side, SIDE // side, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
        tiles = generator.permutation(tiles).reshape(SIDE // side, SIDE // side, side, side, 3)
        return Example(tiles.swapaxes(1, 2).reshape(SIDE, SIDE, 3), NOTHING)
    soft = Image.fromarray(picture).filter(ImageFilter.GaussianBlur(generator.uniform(7, 12)))
    return Example(np.asarray(soft), NOTHING)


def draw_to_learn(generator: np.random.Generator) -> Example:
    """Draw one picture of the training mixture."""
    kinds = (draw_scene, draw_between_styles, draw_without_subject, draw_without_place, draw_nothing)
    return kinds[generator.choice(5, p=(0.75, 0.08, 0.06, 0.03, 0.08))](generator)


def draw_held_out(generator: np.random.Generator) -> dict[str, Example]:
    """Draw one picture of each held-out set; scenes come from the combinations the base has not seen."""
    scene, seed = sample_scene(generator, unseen=True), int(generator.integers(2**31))
    character = replace(any_scene(generator, CHARACTERS))
    drawn = {
        "scenes": render(scene),
        "styled scenes": render(replace(scene, seed=seed), choose(generator, STYLES)),
        "characters": render(character),
        "blends": render_blend(choose(generator, STYLES), choose(generator, CHARACTERS), character.background, seed),
    }
    return {name: Example(np.asarray(rendering.picture), truth(rendering)) for name, rendering in drawn.items()}


# Through the autoencoder


def encode_labels(labels: Labels) -> list[int]:
    """Return each head's class, UNDEFINED where the labels say nothing."""
    return [known.index(labels[head]) if head in labels else UNDEFINED for head, known in HEADS.items()]


def perturbed(latents: Tensor, spread: float, generator: torch.Generator) -> Tensor:
    """Return latents (n, channels, 16, 16) as a denoiser may leave them: half of them smoothed, exaggerated and noisy."""
    share = torch.rand(5, len(latents), 1, 1, 1, generator=generator)
    smooth = F.avg_pool2d(F.pad(latents, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    wrong = latents + (smooth - latents) * 0.5 * share[0] ** 2
    centre = wrong.mean(dim=(2, 3), keepdim=True)
    wrong = centre + (wrong - centre) * (0.9 + 0.4 * share[1])
    fine, other = torch.randn(2, *latents.shape, generator=generator) * spread
    wrong = wrong + fine * 0.12 * share[2] + coarsened(other) * 0.2 * share[3]
    return torch.where(share[4] < 0.5, wrong, latents)


def coarsened(noise: Tensor) -> Tensor:
    """Return noise (n, channels, 16, 16) of the same strength that changes slowly from place to place."""
    return F.interpolate(F.avg_pool2d(noise, 4) * 4, scale_factor=4, mode="bilinear")


@torch.no_grad()
def through(vae: AutoencoderKL, examples: list[Example], generator: torch.Generator | None) -> np.ndarray:
    """Return what the autoencoder makes of the pictures, (n, 64, 64, 3) uint8.

    With a generator, latents are perturbed, and missing pictures start from random ones.
    """
    spread = 1 / vae.config["scaling_factor"]
    decoded = []
    for start in range(0, len(examples), 50):
        part = examples[start : start + 50]
        blank = np.zeros((SIDE, SIDE, 3), np.uint8)
        batch = np.stack([blank if example.picture is None else example.picture for example in part])
        with half_precision():
            encoded: Any = vae.encode(torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 127.5 - 1)
        latents = encoded.latent_dist.mean.float()
        if generator is not None:
            noise = torch.randn(latents.shape, generator=generator) * spread
            kind = torch.rand(len(part), 1, 1, 1, generator=generator)
            missing = torch.tensor([example.picture is None for example in part]).view(-1, 1, 1, 1)
            latents = perturbed(latents, spread, generator)
            latents = torch.where(missing, torch.where(kind < 0.5, coarsened(noise), noise), latents)
        with half_precision():
            pictures = vae.decode(latents).sample.float()  # type: ignore[union-attr]
        decoded.append(((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    return np.concatenate(decoded)


def decoded_shard(path: Path, draw: Any, vae: AutoencoderKL, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return one shard's pictures (n, 64, 64, 3) and classes (n, heads), drawn and decoded unless the file is there."""
    if not path.exists():
        examples = draw()
        noise = torch.Generator().manual_seed(seed) if path.name.startswith("learn") else None
        classes = np.array([encode_labels(example.labels) for example in examples], np.int8)
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.savez(file, pictures=through(vae, examples, noise), classes=classes)
        part.replace(path)
    with np.load(path) as stored:
        return stored["pictures"], stored["classes"]


def load_vae(folder: str) -> tuple[AutoencoderKL, str]:
    """Return the autoencoder in single precision and a name that changes with its weights."""
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"there is no autoencoder in {folder}; give --vae FOLDER (runs/base/vae while the base is trained)")
    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).eval()
    digest = hashlib.sha256()
    for _, tensor in sorted(vae.state_dict().items()):
        digest.update(tensor.to(torch.float16).numpy().tobytes())
    return vae, digest.hexdigest()[:8]


def pictures_to_learn(vae: AutoencoderKL, folder: Path, settings: JudgeSettings) -> tuple[np.ndarray, np.ndarray]:
    """Return the training pictures (n, 64, 64, 3) and classes (n, heads)."""
    shards = []
    for shard in tqdm(range(settings.pictures // SHARD), desc="pictures", unit="shard"):

        def draw(first: int = shard * SHARD) -> list[Example]:
            return [
                draw_to_learn(np.random.default_rng((settings.seed, index, *b"learn"))) for index in range(first, first + SHARD)
            ]

        path = folder / f"learn-{settings.seed}-{shard:03d}.npz"
        shards.append(decoded_shard(path, draw, vae, settings.seed * 1_000_003 + shard))
    return np.concatenate([pictures for pictures, _ in shards]), np.concatenate([classes for _, classes in shards])


def held_out_sets(vae: AutoencoderKL, folder: Path, settings: JudgeSettings) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return pictures and classes of each held-out set."""
    count = settings.held_out // 4
    drawn: list[dict[str, Example]] = []

    def draw(name: str) -> list[Example]:
        if not drawn:
            drawn.extend(draw_held_out(np.random.default_rng((settings.seed, index, *b"held"))) for index in range(count))
        return [examples[name] for examples in drawn]

    return {
        name: decoded_shard(folder / f"held-{settings.seed}-{count}-{name}.npz", lambda name=name: draw(name), vae, 0)
        for name in tqdm(("scenes", "styled scenes", "characters", "blends"), desc="held out", unit="set")
    }


# Learning


def augment(pictures: np.ndarray, generator: torch.Generator) -> Tensor:
    """Return the batch (n, 3, 64, 64) in [-1, 1], each picture a little bent, blurred, recoloured and noisy."""
    count = len(pictures)
    batch = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    share = torch.rand(6, count, 1, 1, 1, generator=generator)
    bend = torch.randn(count, 2, 5, 5, generator=generator) * 1.2 * share[0]
    shift = bend + torch.rand(count, 2, 1, 1, generator=generator) * 4 - 2
    offsets = F.interpolate(shift, SIDE, mode="bilinear", align_corners=True).permute(0, 2, 3, 1) * 2 / SIDE
    grid = F.affine_grid(torch.eye(2, 3).expand(count, 2, 3), [count, 3, SIDE, SIDE], align_corners=False)
    moved = F.grid_sample(batch, grid + offsets, padding_mode="border", align_corners=False)
    soft = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    moved = moved + (soft - moved) * (1.2 * share[1] - 0.6)  # sharpened, too
    grey = moved.mean(dim=1, keepdim=True)
    moved = grey + (moved - grey) * (0.8 + 0.5 * share[2])
    tint = 1 + 0.06 * torch.randn(count, 3, 1, 1, generator=generator)
    lit = (moved * (0.85 + 0.35 * share[3]) + 1) * tint - 1 + 0.16 * (share[4] - 0.5)
    noise = torch.randn(lit.shape, generator=generator) * (share[5] - 0.5).clamp(min=0) * 0.12
    return (lit + noise).clamp(-1, 1)


def learn(pictures: np.ndarray, classes: np.ndarray, checkpoint: Path, settings: JudgeSettings) -> Network:
    """Minimise the cross-entropy of every head that has a truth with AdamW, warm-up and cosine decay."""
    torch.manual_seed(settings.seed)
    network = Network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.02)
    first = resume(checkpoint, network, optimizer)
    bar = tqdm(range(first, settings.steps), initial=first, total=settings.steps, desc="judge", unit="step", mininterval=5)
    loss_now = 0.0
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 100) * (1 + math.cos(math.pi * step / settings.steps)) / 2
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        chosen = torch.randint(len(pictures), (64,), generator=generator).numpy()
        targets = torch.from_numpy(classes[chosen]).long()
        with half_precision():
            logits = network(augment(pictures[chosen], generator))
        losses = [
            F.cross_entropy(logits[head].float(), targets[:, index], ignore_index=UNDEFINED) for index, head in enumerate(HEADS)
        ]
        optimizer.zero_grad(set_to_none=True)
        loss = torch.stack(losses).sum()
        loss.backward()
        if not torch.isfinite(loss):
            raise ValueError(f"the loss is not finite at step {step}; remove {checkpoint} and train again")
        optimizer.step()
        loss_now += (loss.item() - loss_now) / min(step - first + 1, 100)
        if (step + 1) % settings.checkpointing_steps == 0 or step + 1 == settings.steps:
            bar.set_postfix(loss=f"{loss_now:.4f}")
            state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)
    return network


def resume(path: Path, network: Network, optimizer: torch.optim.Optimizer) -> int:
    """Restore the last checkpoint and return its step, 0 where there is none."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


# Measuring


def measure(judge: Judge, sets: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Return each head's accuracy, over all held-out pictures that have a truth and per set, and the mistakes."""
    report: dict[str, Any] = {"heads": {}, "sets": {}}
    mistakes: Counter[tuple[str, str, str, str]] = Counter()
    totals: dict[str, list[bool]] = {head: [] for head in HEADS}
    for name, (pictures, classes) in sets.items():
        table = judge.probabilities(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1)
        report["sets"][name] = {"pictures": len(pictures)}
        for column, (head, known) in enumerate(HEADS.items()):
            pairs = [
                (known[index], label)
                for index, label in zip(classes[:, column], name_all(head, table[head]), strict=True)
                if index != UNDEFINED
            ]
            if pairs:
                right = [true == label for true, label in pairs]
                totals[head] += right
                report["sets"][name][head] = round(sum(right) / len(right), 4)
                mistakes.update((name, head, *pair) for pair in pairs if pair[0] != pair[1])
    for head, right in totals.items():
        report["heads"][head] = {"pictures": len(right), "accuracy": round(sum(right) / len(right), 4)}
    worst = sorted(mistakes.items(), key=lambda item: (-item[1], item[0]))
    return report | {"mistakes": [[*pair, times] for pair, times in worst]}


def run_gates(settings: JudgeSettings) -> None:
    """Judge a pipeline's pictures of unseen combinations; write measures and a contact sheet."""
    pipeline = StableDiffusionPipeline.from_pretrained(settings.base, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    sampling = Sampling(settings.inference_steps, settings.guidance, settings.seed)
    started = time.perf_counter()
    pictures, scenes, measures = check_base(pipeline, Judge.load(settings.output), settings.prompts, sampling)
    measures["seconds"] = round(time.perf_counter() - started, 1)
    work = Path(settings.work_dir)
    work.mkdir(parents=True, exist_ok=True)
    (work / "gates.json").write_text(json.dumps(measures, indent=1) + "\n", encoding="utf-8")
    shown = slice(0, 64)
    sheet(pictures[shown].nan_to_num(), [scene.describe() for scene in scenes[shown]]).save(work / "gates.png")
    print(json.dumps({key: value for key, value in measures.items() if key not in ("mistakes", "per label")}, indent=1))


def main(argv: list[str] | None = None) -> int:
    """Run from the command line."""
    settings = parse(JudgeSettings, argv, description="Train the judge of the picture world, or let it judge a base.")
    return exit_status(lambda: judge(settings))


def judge(settings: JudgeSettings) -> None:
    """Do what is asked for; ValueError with every number that is out of its range."""
    if problems := out_of_range(settings, RULES):
        raise ValueError("; ".join(problems))
    torch.set_num_threads(settings.threads)
    if settings.gates:
        run_gates(settings)
    else:
        train_and_measure(settings)


def train_and_measure(settings: JudgeSettings) -> None:
    """Draw, train and measure; write the weights and, beside them, the report."""
    vae, name = load_vae(settings.vae)
    folder = Path(settings.work_dir) / name
    folder.mkdir(parents=True, exist_ok=True)
    sets = held_out_sets(vae, folder, settings)
    pictures, classes = pictures_to_learn(vae, folder, settings)
    checkpoint = folder / f"judge-{settings.seed}-{settings.pictures}-{settings.steps}.pt"
    started = time.perf_counter()
    output = Path(settings.output)
    write_judge(learn(pictures, classes, checkpoint, settings), output)
    seconds = round(time.perf_counter() - started, 1)
    how = {"seed": settings.seed, "steps": settings.steps, "pictures": len(pictures), "vae": name}
    report = {"trained": how, **measure(Judge.load(output), sets)}
    output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"seconds": seconds, "heads": report["heads"], "sets": report["sets"]}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
