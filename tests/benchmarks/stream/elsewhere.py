"""The same core on models that draw nothing: a vision transformer that classifies digits, and a text encoder.

Nothing of the library is replaced: `attach`, `make_learner`, `gradient_directions` and `Subspace.merge` see layers, not
pipelines. A plain module only has to be given under a component's name, `SimpleNamespace(transformer=model)`.

    digits     class-incremental: every concept is two further digits, answered among all ten classes. The data are the
               1,797 scans of 8 x 8 of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, UCI
               repository, CC BY 4.0), in the order and form in which scikit-learn ships them, in digits.csv.gz
    captions   every concept is another question about a scene's caption: how many, on which side, of what size
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from share_diffusion.adapt import Adaptation, Learner, gradient_directions, make_learner
from share_diffusion.attached import Attached, attach
from share_diffusion.capacity import Capacity
from share_diffusion.lora import LoRA
from share_diffusion.models.identity import identify
from share_diffusion.models.layers import select, shape_of
from share_diffusion.subspace import Subspace
from share_diffusion.world.scene import SIDES, sample_scene
from share_diffusion.world.scene import SIZES as SIZE_WORDS

DIGITS = Path(__file__).resolve().parents[1] / "digits.csv.gz"
WIDTH = 32
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
LINEAR = r"(query|key|value|dense|q_proj|k_proj|v_proj|o_proj|out_proj|fc1|fc2)$"
START = 1.0  # without decay and in 80 steps more is learned from larger columns: captions .86 against .85, mean of four seeds
WAYS = {mode: Adaptation(mode, pseudo_rank=4, temporary_rank=4, rank=4, start=START) for mode in ("gradient", "hybrid")}


@dataclass(frozen=True)
class Task:
    """Inputs and labels to learn from and to be tested on."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    """A frozen model under a component's name, how it answers, and the tasks that come one after another."""

    host: Any
    answer: Callable[[Tensor], Tensor]  # inputs (n, ...) -> logits (n, classes)
    tasks: Mapping[str, Task]
    steps: int = 80
    batch: int = 32


def go_through(problem: Problem, seed: int = 0) -> dict[str, Any]:
    """Learn every task by own LoRAs, one sequential LoRA and Share in all WAYS; returns accuracies and stored numbers."""
    modules = select(problem.host, LINEAR)
    untouched = {name: accuracy(problem, task) for name, task in problem.tasks.items()}
    own, at_once, single = {}, {}, None
    for name, task in problem.tasks.items():
        alone = taught(problem, modules, Subspace(), task, Adaptation("lora", rank=4), seed)
        own[name] = with_lora(problem, alone.lora(), task)
        single = alone if single is None else taught(problem, modules, Subspace(), task, Adaptation("lora"), seed, single)
        at_once[name] = with_lora(problem, single.lora(), task)
    assert single is not None
    shared = {way: share(problem, modules, adaptation, seed) for way, adaptation in WAYS.items()}
    forgotten = {name: with_lora(problem, single.lora(), task) for name, task in problem.tasks.items()}
    again = {name: accuracy(problem, task) for name, task in problem.tasks.items()}
    return {
        "base": untouched,
        "own_lora": own,
        "share": shared,
        "sequential_lora": {"when_learned": at_once, "at_the_end": forgotten},
        "base_untouched": again == untouched,
        "loras_numbers": len(problem.tasks) * sum(4 * sum(shape_of(module)[0]) for module in modules.values()),
    }


def share(problem: Problem, modules: Mapping[str, nn.Module], adaptation: Adaptation, seed: int) -> dict[str, Any]:
    """Learn every task into one subspace that starts empty; returns accuracies at once and at the end, and its numbers."""
    learned = {}
    subspace = Subspace(base=identify(problem.host)).cover({path: shape_of(module) for path, module in modules.items()})
    for name, task in problem.tasks.items():
        learner = taught(problem, modules, subspace, task, adaptation, seed)
        subspace = subspace.merge({name: learner.lora()}, capacity=Capacity(0.999))
        learned[name] = with_concept(problem, subspace, name, task)
    columns = sum(basis.alpha.numel() + basis.beta.numel() for basis in subspace.layers.values())
    coefficients = sum(concept.numbers for concept in subspace.concepts.values())
    return {
        "when_learned": learned,
        "at_the_end": {name: with_concept(problem, subspace, name, task) for name, task in problem.tasks.items()},
        "numbers": columns + coefficients,
        "concept_numbers": coefficients / len(problem.tasks),
        "retention": min(concept.retention for concept in subspace.concepts.values()),
    }


def taught(
    problem: Problem,
    modules: Mapping[str, nn.Module],
    subspace: Subspace,
    task: Task,
    adaptation: Adaptation,
    seed: int,
    going_on: Learner | None = None,
) -> Learner:
    """Return a learner trained on a task in the subspace's bases, or one that goes on from where it stands."""
    inputs, labels = task.train

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        chosen = torch.randint(len(labels), (problem.batch,), generator=generator)
        return F.cross_entropy(problem.answer(inputs[chosen]), labels[chosen])

    with Attached(problem.host, sorted(modules)) as attached:
        bases = dict(subspace.layers)
        wanted = adaptation.looks_at_gradient
        directions = gradient_directions(attached, bases, adaptation.temporary_rank, loss, 8, seed) if wanted else {}
        learner = going_on or make_learner(modules, bases, adaptation, directions, seed)
        optimizer = torch.optim.AdamW(learner.parameter_groups(2e-2, 1e-2), weight_decay=0.0)
        for step in range(problem.steps):
            attached.set(learner.updates())
            optimizer.zero_grad()
            loss(1_000 + step).backward()
            optimizer.step()
    return learner


@torch.no_grad()
def accuracy(problem: Problem, task: Task) -> float:
    """Return the share of test inputs answered right with whatever is active."""
    inputs, labels = task.test
    return float((problem.answer(inputs).argmax(1) == labels).double().mean())


def with_lora(problem: Problem, lora: LoRA, task: Task) -> float:
    """Return the accuracy with a LoRA active."""
    subspace = Subspace(base=identify(problem.host)).merge({"one": lora}, capacity=Capacity(1.0))
    return with_concept(problem, subspace, "one", task)


def with_concept(problem: Problem, subspace: Subspace, name: str, task: Task) -> float:
    """Return the accuracy with a concept of a subspace active."""
    with attach(problem.host, subspace) as handle:
        handle.set_blend({name: 1.0})
        return accuracy(problem, task)


def pretrained(model: nn.Module, features: Callable[[Tensor], Tensor], inputs: Tensor, labels: Tensor, steps: int) -> Tensor:
    """Train a whole model on a first task with a head that is thrown away; returns the streams' head, random and frozen."""
    head = nn.Linear(WIDTH, int(labels.max()) + 1)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=3e-3)
    for step in range(steps):
        chosen = torch.randint(len(labels), (64,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.cross_entropy(head(features(inputs[chosen])), labels[chosen]).backward()
        optimizer.step()
    model.requires_grad_(False).eval()
    return 2 * torch.randn(WIDTH, 10, generator=torch.Generator().manual_seed(1)) / WIDTH**0.5


def digits(seed: int = 0) -> Problem:
    """Return the class-incremental stream of digits on a small ViT that was pretrained to tell how a scan is turned."""
    from transformers import ViTConfig, ViTModel

    with gzip.open(DIGITS, "rt") as file:
        table = torch.tensor(np.loadtxt(file, delimiter=",", dtype=np.float32))
    pictures, labels = table[:, :-1].reshape(-1, 1, 8, 8) / 8 - 1, table[:, -1].long()
    torch.manual_seed(seed)
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, **SIZES)
    model = ViTModel(config, add_pooling_layer=False).eval()

    def features(inputs: Tensor) -> Tensor:
        return model(pixel_values=inputs).last_hidden_state[:, 0]

    held_out, turns = torch.arange(len(labels)) % 5 == 0, torch.arange(len(labels)) % 4
    turned = torch.stack([picture.rot90(int(turn), (1, 2)) for picture, turn in zip(pictures, turns, strict=True)])
    head = pretrained(model, features, turned[~held_out], turns[~held_out], 150)
    tasks = {}
    for first in range(0, 10, 2):
        mine = (labels == first) | (labels == first + 1)
        tasks[f"{first} and {first + 1}"] = Task(
            (pictures[mine & ~held_out], labels[mine & ~held_out]), (pictures[mine & held_out], labels[mine & held_out])
        )
    return Problem(SimpleNamespace(transformer=model), lambda inputs: features(inputs) @ head, tasks)


def captions(seed: int = 0) -> Problem:
    """Return a stream of questions about captions on a small CLIP text encoder that was pretrained to name the subject."""
    from transformers import CLIPTextConfig, CLIPTextModel

    generator = np.random.default_rng(seed)
    scenes = [sample_scene(generator) for _ in range(1_200)]
    texts = [scene.describe().split() for scene in scenes]
    words = {word: index + 1 for index, word in enumerate(sorted({word for text in texts for word in text}))}
    tokens = torch.zeros(len(texts), 16, dtype=torch.long)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = torch.tensor([words[word] for word in text])
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(words) + 1, max_position_embeddings=16, bos_token_id=0, eos_token_id=0, pad_token_id=0, **SIZES
    )
    model = CLIPTextModel(config).eval()

    def features(inputs: Tensor) -> Tensor:
        states = model(input_ids=inputs, attention_mask=(inputs > 0).long()).last_hidden_state
        return states.masked_fill((inputs == 0)[..., None], -9.0).amax(1)

    asked = {
        "number": [scene.count - 1 for scene in scenes],
        "side": [3 + SIDES.index(scene.side) for scene in scenes],
        "size": [6 + SIZE_WORDS.index(scene.size) for scene in scenes],
    }
    subjects = sorted({scene.subject for scene in scenes})
    names, split = torch.tensor([subjects.index(scene.subject) for scene in scenes]), len(scenes) * 3 // 4
    head = pretrained(model, features, tokens[:split], names[:split], 150)
    tasks = {
        name: Task((tokens[:split], torch.tensor(labels)[:split]), (tokens[split:], torch.tensor(labels)[split:]))
        for name, labels in asked.items()
    }
    return Problem(SimpleNamespace(text_encoder=model), lambda inputs: features(inputs) @ head, tasks, steps=120)
