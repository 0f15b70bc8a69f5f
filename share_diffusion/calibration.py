"""Measure a base: which directions its layers use, and how many columns each of them should have.

    principal = calibrate(pipeline, modules, pictures, rank=48)

What is measured is a forward and backward pass of the untouched base on pictures of its own (`own_pictures`): of every layer
the second moments of its inputs x and of the gradient g of the denoising loss at its output. By K-FAC (Martens and Grosse,
arXiv 1503.05671) the gain of a change in the direction g x^T is about the product of both, so their eigenvectors are the
columns that are worth most. Nothing of a concept is looked at, so that all concepts of a base are alike in its columns.

Two passes over the same batches keep memory small at any width, no second moment is ever formed whole:

    1. the range: Y = sum x^T (x omega) with a random omega (c, m), one step of subspace iteration
    2. inside it: B = sum (x Q)^T (x Q), Q = orth(Y), whose eigenvectors turn Q to the principal directions

For a convolution B is also measured through every pattern over the kernel, which gives the energy of each pair of a direction
and a pattern. Pairs of all layers then compete: energy as a share of their own side's, over the root of what they cost to
store, until the columns are `rank` a side on average and the stored numbers `STORED` times the sides' widths.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from share_diffusion.basis import WORK
from share_diffusion.data import read_dataset
from share_diffusion.drawing import Sampling, generate, save_png
from share_diffusion.learning import Frozen, Source, denoising_loss, freeze
from share_diffusion.models import family_of
from share_diffusion.models.identity import identify
from share_diffusion.models.layers import shape_of
from share_diffusion.objective import step_generator
from share_diffusion.picture_set import PictureSet, prepare_pictures
from share_diffusion.principal import POINT, Kernel, Principal, Side, patterns, rounded
from share_diffusion.step import draw_step
from share_diffusion.subspace import Origin, Subspace

Progress = Callable[[int, int], None]  # (done, of all)
PICTURES = 32
MOST = 128  # directions of one side that are looked for
LEAST = 4  # columns of every side, whatever it sees
STORED = 14  # numbers of four bits for each unit of width: what a LoRA of rank 3.5 takes in half precision
SHIPPED = Path(__file__).parent / "assets" / "columns.safetensors"  # `share-diffusion measure` of the embedded base
OFFSET = 86_028_121  # keeps these draws apart from those that train
THINGS = ("cat", "dog", "car", "house", "tree", "boat", "bird", "flower")
PLACES = (
    "in a forest",
    "on a beach",
    "in the snow",
    "in the desert",
    "in a meadow",
    "at night",
    "by the sea",
    "in the mountains",
)
COLOURS = ("red", "blue", "green", "yellow", "white", "orange", "purple", "brown")


def prompts(count: int) -> list[str]:
    """Return what the base is asked to draw: plain things in plain places."""
    some = [f"a {COLOURS[(i + i // 8) % 8]} {THINGS[i % 8]} {PLACES[(i // 8 + i * 3) % 8]}" for i in range(64)]
    return [some[i % 64] for i in range(count)]


@dataclass(frozen=True)
class Survey:
    """How a base is measured: `pictures` that it draws at a `resolution` (None: its own), `draws` of them in each pass."""

    pictures: int = PICTURES
    draws: int = 128
    batch: int = 8
    resolution: int | None = None

    def __post_init__(self) -> None:
        if problems := [f"{name} is {getattr(self, name)}; at least 1 is needed" for name in ("pictures", "draws", "batch")
                        if getattr(self, name) < 1]:  # fmt: skip
            raise ValueError("; ".join(problems))


def measured(
    pipeline: Any,
    modules: Mapping[str, nn.Module],
    origin: Origin,
    survey: Survey | None = None,
    progress: Progress | None = None,
) -> Origin:
    """Return an origin of kind `activations` with the columns of these layers measured on pictures that the base draws.

    Those of the embedded base were measured once and come with the package.
    """
    if (known := shipped(pipeline, modules, origin)) is not None:
        return known
    survey = survey or Survey()
    with own_pictures(pipeline, survey) as pictures:
        found = calibrate(pipeline, modules, pictures, origin.rank, survey, seed=origin.seed, progress=progress)
    return replace(origin, principal=found)


def shipped(pipeline: Any, modules: Mapping[str, nn.Module], origin: Origin) -> Origin | None:
    """Return the origin with the columns that come with the package, where they are those of this base and these layers."""
    if not SHIPPED.is_file():
        return None
    held, ours = package_columns(), identify(pipeline)
    alike = held.base.architecture == ours.architecture and bool(ours.weights) and held.base.mismatch(ours) is None
    known = held.origin.principal
    if not alike or known is None or held.origin.facts | {"digest": ""} != origin.facts | {"digest": ""}:
        return None
    if not set(modules) <= set(known.sides):
        return None
    return replace(origin, principal=Principal({path: known.sides[path] for path in modules}))


@cache
def package_columns() -> Subspace:
    """Return the file of columns that comes with the package; a run asks for it several times."""
    return Subspace.load(SHIPPED)


@contextmanager
def own_pictures(pipeline: Any, survey: Survey) -> Iterator[PictureSet]:
    """Within the block there are pictures that the untouched base drew; picture i is drawn at seed i."""
    side = max(16, (survey.resolution or family_of(pipeline).native_resolution(pipeline)) // 16 * 16)
    texts = prompts(survey.pictures)
    with TemporaryDirectory() as folder:
        for start in range(0, survey.pictures, survey.batch):
            numbers = list(range(start, min(start + survey.batch, survey.pictures)))
            drawn = generate(pipeline, [texts[n] for n in numbers], numbers, Sampling(width=side, height=side))
            for number, picture in zip(numbers, drawn, strict=True):
                save_png(picture, Path(folder) / f"{number:05d}.png")
                (Path(folder) / f"{number:05d}.txt").write_text(texts[number], encoding="utf-8")
        yield prepare_pictures(pipeline, read_dataset(folder), side)


def calibrate(
    pipeline: Any,
    modules: Mapping[str, nn.Module],
    pictures: Source,
    rank: int,
    survey: Survey | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Principal:
    """Return the measured columns of these layers, `rank` a side on average; the base is left as it was."""
    moments = {path: Moments.of(path, module, seed) for path, module in modules.items()}
    frozen, survey = Frozen(pipeline), survey or Survey()
    batches = math.ceil(survey.draws / survey.batch)
    asked = [
        (p, p.requires_grad) for part in pipeline.components.values() if isinstance(part, nn.Module) for p in part.parameters()
    ]
    freeze(pipeline)
    try:
        for second in (False, True):
            with ExitStack() as hooks:
                for path, module in modules.items():
                    moments[path].watch(module, hooks)
                for index in range(batches):
                    drawn = draw_step(pipeline, pictures, survey.batch, seed + OFFSET, index)  # type: ignore[arg-type]
                    loss = denoising_loss(frozen, pipeline, pictures, drawn, pipeline.device).mean()
                    (loss * drawn.noise.numel()).backward()  # a sum: half precision would lose the mean's small gradients
                    if progress is not None:
                        progress(int(second) * batches + index + 1, 2 * batches)
            refuse_broken(moments)
            for entry in moments.values():
                entry.turn()
    finally:
        for parameter, wanted in asked:
            parameter.requires_grad_(wanted)
    return choose({path: (entry.alpha, entry.beta) for path, entry in moments.items()}, rank)


def refuse_broken(moments: Mapping[str, Moments]) -> None:
    """Raise ValueError where a layer saw numbers that are not finite."""
    sides = {path: (entry.alpha.total, entry.beta.total) for path, entry in moments.items()}
    broken = [path for path, pair in sides.items() if any(total is not None and not total.isfinite().all() for total in pair)]
    if broken:
        raise ValueError(
            f"measuring the base gave numbers that are not finite in {len(broken)} of {len(moments)} layers, {broken[0]} the "
            "first; use float32 or bf16 (--mixed_precision)"
        )


@dataclass
class Spectrum:
    """One side of one layer while it is measured: a frame Q (c, m), and B (patterns, m, m) inside it."""

    channels: int
    kernel: Kernel
    frame: Tensor
    total: Tensor | None = None
    measured: bool = False  # whether the frame is the range already
    energies: Tensor = field(default_factory=lambda: torch.zeros(0))  # (m, patterns), once it is turned

    def see(self, values: Tensor, conv: nn.Conv2d | None) -> None:
        """Add a batch of values: (..., c) of a linear layer or (n, c, h, w) of a convolution."""
        values = values.detach().float()
        self.frame = self.frame.to(values.device)
        if conv is not None and self.measured and self.kernel != POINT:
            inside = torch.einsum("nchw,cm->nmhw", values, self.frame)
            places = F.unfold(inside, self.kernel, conv.dilation, conv.padding, conv.stride)  # type: ignore[arg-type]
            waves = patterns(self.kernel).to(places)
            seen = torch.einsum("nmtl,tb->bnlm", places.unflatten(1, (-1, waves.shape[0])), waves).flatten(1, 2)
        else:
            rows = (values.movedim(1, -1) if conv is not None else values).reshape(-1, self.channels)
            seen = rows @ self.frame
            if not self.measured:
                added = rows.mT @ seen
                self.total = added if self.total is None else self.total + added
                return
            seen = seen[None]
        added = seen.mT @ seen
        self.total = added if self.total is None else self.total + added

    def turn(self) -> None:
        """After the first pass take the range as frame, after the second the principal directions."""
        count = math.prod(self.kernel)
        self.frame = self.frame.to("cpu", WORK)
        if not self.measured:
            seen = torch.zeros_like(self.frame) if self.total is None else self.total.to("cpu", WORK)
            self.frame, self.total, self.measured = torch.linalg.qr(seen)[0].float(), None, True
            return
        size = self.frame.shape[1]
        inner = torch.zeros(count, size, size, dtype=WORK) if self.total is None else self.total.to("cpu", WORK)
        turned = torch.linalg.eigh(inner.sum(0))[1].flip(1)
        self.frame = self.frame @ turned
        self.energies = torch.einsum("im,bij,jm->mb", turned, inner, turned).clamp_min(0)


@dataclass
class Moments:
    """Both sides of a layer."""

    alpha: Spectrum
    beta: Spectrum

    @classmethod
    def of(cls, path: str, module: nn.Module, seed: int) -> Moments:
        """Return both sides of a layer with the random start of the first pass."""
        (out, width), kernel = shape_of(module)
        kernel = kernel or POINT
        channels = width // math.prod(kernel)
        generator = step_generator(seed + OFFSET, sum(path.encode()))
        starts = [torch.randn(side, min(side, MOST), generator=generator) for side in (channels, out)]
        return cls(Spectrum(channels, kernel, starts[0]), Spectrum(out, POINT, starts[1]))

    def watch(self, module: nn.Module, hooks: ExitStack) -> None:
        """Look at the inputs and at the gradient of the outputs of a layer for as long as the stack is open."""
        conv = module if isinstance(module, nn.Conv2d) else None

        def before(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            self.alpha.see(given[0], conv)
            wanted = given[0] if given[0].requires_grad else given[0].detach().requires_grad_()
            return (wanted, *given[1:])

        def after(_: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            if out.requires_grad:
                out.register_hook(lambda gradient: self.beta.see(gradient, conv))

        hooks.enter_context(removed(module.register_forward_pre_hook(before)))
        hooks.enter_context(removed(module.register_forward_hook(after)))

    def turn(self) -> None:
        """Go on to the second pass, or end it."""
        self.alpha.turn()
        self.beta.turn()


@contextmanager
def removed(handle: Any) -> Iterator[None]:
    """Remove a hook at the end of the block."""
    try:
        yield
    finally:
        handle.remove()


def choose(spectra: Mapping[str, tuple[Spectrum, Spectrum]], rank: int, stored: float = STORED) -> Principal:
    """Return the columns that are worth most: `rank` a side on average, `stored` numbers for each unit of width."""
    sides = [(path, which, side) for path, pair in sorted(spectra.items()) for which, side in enumerate(pair)]
    room = stored * sum(side.channels * math.prod(side.kernel) for _, _, side in sides)
    candidates = sorted((entry for number, (_, _, side) in enumerate(sides) for entry in worth(number, side)), reverse=True)
    pairs: list[list[int]] = [[] for _ in sides]
    directions: list[dict[int, int]] = [{} for _ in sides]
    left = rank * len(sides)
    for _, _, number, pair in candidates:
        side = sides[number][2]
        direction, pattern = divmod(pair, side.energies.shape[1])
        cost = 0 if direction in directions[number] else side.channels
        forced = len(pairs[number]) < LEAST
        if not forced and (left <= 0 or cost > room or len(pairs[number]) >= side.channels * side.energies.shape[1]):
            continue
        place = directions[number].setdefault(direction, len(directions[number]))
        pairs[number].append(place * side.energies.shape[1] + pattern)
        left, room = left - 1, room - cost
    found: dict[str, list[Side]] = {}
    for (path, _, side), taken, chosen in zip(sides, directions, pairs, strict=True):
        frame = rounded(side.frame[:, list(taken)])
        found.setdefault(path, []).append(Side(frame, torch.tensor(chosen, dtype=torch.int16), side.kernel))
    return Principal({path: (alpha, beta) for path, (alpha, beta) in found.items()})


def worth(number: int, side: Spectrum) -> Iterator[tuple[float, int, int, int]]:
    """Return (worth, -place, side, pair) of a side's pairs, strongest first; the first `LEAST` come before everything else."""
    energies = side.energies.flatten()
    order = energies.argsort(descending=True, stable=True).tolist()
    whole = float(energies.sum()) or 1.0
    price = (side.channels / (1 if side.kernel == POINT else 3)) ** 0.5  # a direction of channels serves some three patterns
    for place, pair in enumerate(order):
        yield (math.inf if place < LEAST else float(energies[pair]) / whole / price, -place, number, pair)


def begin(
    file: str | os.PathLike[str],
    pipeline: Any,
    modules: Mapping[str, nn.Module],
    origin: Origin,
    name: str,
    survey: Survey | None = None,
    progress: Progress | None = None,
) -> Subspace:
    """Write the file of an empty subspace whose columns are measured on these layers of the base called `name`.

    Raises ValueError where the file is there already.
    """
    if os.path.lexists(file):
        raise ValueError(f"{os.fspath(file)} is there already; its columns stay as they are: choose another file")
    begun = Subspace(base=identify(pipeline, name), origin=measured(pipeline, modules, origin, survey, progress))
    return begun.cover({path: shape_of(module) for path, module in modules.items()}).save(file)
