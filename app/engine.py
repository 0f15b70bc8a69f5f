"""The engine behind the page: one pipeline, one subspace on it, one drawing at a time.

A drawing runs in a thread and hands over frames; whoever reads them may stop at any step. Card pictures are drawn in the
background and give way to people at once. The subspace file may grow while the page is open, by this page's own learning
or by another program: `refresh` attaches the new one between two drawings.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from app.cards import Card, CardPictures, card_of
from app.history import History
from app.preview import Previewer
from app.samplers import samplers_of
from app.wish import Limits, Wish
from share_diffusion.attached import AttachedSubspace, attach
from share_diffusion.base import TINY, base_name, load_base
from share_diffusion.blend import Blend
from share_diffusion.drawing import Sampling, generate, save_png
from share_diffusion.models.identity import weights_of
from share_diffusion.models.stable_diffusion import native_resolution
from share_diffusion.subspace import Subspace

READY_MADE = TINY.parent / "concepts.safetensors"
CARD_SEED = 7
PREVIEW_EVERY = 3


class Stopped(Exception):
    """A drawing was stopped by a person, or gave way to one."""


@dataclass(frozen=True)
class Frame:
    """One moment of a drawing: steps done, a preview of each picture now and then, the finished pictures' ids at the end."""

    step: int
    steps: int
    previews: Sequence[Image.Image] = ()
    ids: Sequence[str] = ()


@dataclass
class Engine:
    """Knows the model; `folder` is where history and card pictures live, `file` the subspace file, if there is one."""

    pipeline: Any
    base: str
    folder: Path
    file: Path | None
    subspace: Subspace | None = None
    handle: AttachedSubspace | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    people: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.history = History(self.folder / "history")
        self.pictures = CardPictures(self.folder / "cards")
        self.samplers = samplers_of(self.pipeline.scheduler)
        self.previewer = Previewer(self.pipeline)
        self.cards: dict[str, Card] = {}
        self.stamp: tuple[int, int] | None = None
        self.wanted: list[str] = []
        self.drawn = 0
        self.waiting = 0
        self.refresh()
        threading.Thread(target=self.draw_cards, daemon=True, name="card pictures").start()

    @property
    def limits(self) -> Limits:
        """What may be asked for with this base."""
        return Limits(native_resolution(self.pipeline), tuple(self.samplers))

    @property
    def start(self) -> Wish:
        """The base's own settings, with nothing asked for yet."""
        sampling = Sampling().resolved(self.pipeline)
        assert sampling.steps and sampling.guidance_scale is not None
        assert (sampling.width or 0) > 0
        assert (sampling.height or 0) > 0
        return Wish(
            steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            sampler=next(iter(self.samplers)),
            width=sampling.width,
            height=sampling.height,
        )

    def refresh(self) -> bool:
        """Attach the subspace file's present content; returns whether it had changed."""
        if self.file is None or not self.file.exists():
            return False
        status = self.file.stat()
        stamp = status.st_mtime_ns, status.st_size
        if stamp == self.stamp:
            return False
        with self.lock:
            subspace = Subspace.load(self.file, weights_of(self.pipeline))
            if self.handle is not None:
                self.handle.detach()
            self.handle = attach(self.pipeline, subspace)
            self.subspace, self.stamp = subspace, stamp
            version = subspace.basis_version
            self.cards = {name: card_of(concept, version) for name, concept in subspace.concepts.items()}
        return True

    def draw(self, wish: Wish, stop: threading.Event | None = None, *, keep: bool = True) -> Iterator[Frame]:
        """Yield a frame after every step; leaving the loop, or setting `stop`, ends the drawing within a step.

        The last frame has the finished pictures, written to the history if `keep`, else only as previews.
        """
        stop = stop or threading.Event()
        frames: queue.Queue[Frame | BaseException | None] = queue.Queue()

        def work() -> None:
            try:
                with self.for_people():
                    frames.put(self.finished(wish, self.pictures_of(wish, stop, frames.put), keep))
            except BaseException as error:
                frames.put(error)
            frames.put(None)

        thread = threading.Thread(target=work, daemon=True, name="drawing")
        thread.start()
        try:
            while (frame := frames.get()) is not None:
                if isinstance(frame, BaseException):
                    raise frame
                yield frame
        finally:
            stop.set()
            thread.join()

    @contextmanager
    def for_people(self) -> Iterator[None]:
        """Hold the pipeline for a person; a card picture in the making gives way."""
        self.waiting += 1
        self.people.set()
        try:
            with self.lock:
                yield
        finally:
            self.waiting -= 1
            if not self.waiting:
                self.people.clear()

    def pictures_of(self, wish: Wish, stop: threading.Event, tell: Any = None) -> list[Image.Image]:
        """Return the wish's pictures; the caller holds the lock."""
        sampling = self.sampling(wish)
        self.set_blend(wish.blend)
        self.pipeline.scheduler = self.samplers[wish.sampler]
        self.previewer.start()

        def watch(step: int, latents: torch.Tensor) -> None:
            if stop.is_set():
                raise Stopped
            if tell is None:
                return
            seen = self.previewer.see(step, latents)
            due = step % PREVIEW_EVERY == PREVIEW_EVERY - 1 and step + 1 < wish.steps
            tell(Frame(step + 1, wish.steps, self.previewer.pictures(seen) if due else ()))

        seeds = [wish.seed + index for index in range(wish.count)]
        try:
            return generate(self.pipeline, [wish.prompt] * wish.count, seeds, sampling, watch=watch)
        finally:
            self.pipeline.scheduler = next(iter(self.samplers.values()))

    def set_blend(self, written: str) -> None:
        """Make a blend active; without a subspace only the untouched base can be drawn."""
        if self.handle is not None:
            self.handle.set_blend(written)
        elif Blend.parse(written).weights:
            raise ValueError("no subspace file is open, so there is no concept to blend; learn one first")

    def sampling(self, wish: Wish) -> Sampling:
        """Return the wish's settings as the library takes them."""
        return Sampling(wish.steps, wish.guidance_scale, wish.negative_prompt, wish.width, wish.height)

    def finished(self, wish: Wish, pictures: list[Image.Image], keep: bool) -> Frame:
        """Return the last frame of a drawing."""
        if not keep:
            return Frame(wish.steps, wish.steps, pictures)
        facts = self.facts(wish)
        seeds = range(wish.seed, wish.seed + wish.count)
        ids = [
            self.history.add(picture, wish.prompt, seed, self.sampling(wish), wish.blend, facts)
            for seed, picture in zip(seeds, pictures, strict=True)
        ]
        return Frame(wish.steps, wish.steps, pictures, ids)

    def facts(self, wish: Wish) -> dict[str, Any]:
        """Return what a picture records beside its settings: names only, no path."""
        facts = {"base": base_name(self.base), "sampler": wish.sampler}
        if self.subspace is not None and self.file is not None:
            facts |= {"subspace": self.file.name, "basis_version": self.subspace.basis_version}
        return facts

    def want_cards(self, cards: Sequence[Card]) -> int:
        """Ask for these cards' pictures next and return how many are still to be drawn."""
        missing = self.pictures.missing(cards)
        self.wanted = [card.name for card in missing]
        return len(missing)

    def draw_cards(self) -> None:
        """Draw the wanted cards' pictures for ever, one at a time, whenever nobody else draws."""
        pause = threading.Event()
        while True:
            card = next((self.cards[name] for name in self.wanted if name in self.cards), None)
            if card is None or self.people.is_set():
                pause.wait(0.2)
                continue
            try:
                self.draw_card(card)
            except Stopped:
                continue
            except (ValueError, RuntimeError, OSError):
                pause.wait(1.0)
            self.wanted = [name for name in self.wanted if name != card.name]

    def draw_card(self, card: Card) -> None:
        """Draw one card's picture at the fixed seed, its concept alone, unless a person comes in between."""
        wish = self.start.changed(prompt=card.example, blend=str(Blend({card.name: card.weight})), seed=CARD_SEED)
        with self.lock:
            picture = self.pictures_of(wish, self.people)[0]
        save_png(picture, self.pictures.path(card))
        self.drawn += 1


def open_engine(base: str, file: Path | None, folder: Path, *, device: str = "cpu", local_files_only: bool = False) -> Engine:
    """Load the base and the subspace; without a file given, the one last learned here, else the ready-made one."""
    if file is not None and not file.is_file():
        raise ValueError(f"there is no subspace file {file}; learn one, or leave --subspace away")
    pipeline = load_base(base, device=device, local_files_only=local_files_only)
    own = folder.parent / base_name(base) / "subspace.safetensors"
    ready = READY_MADE if base == "tiny" else None
    chosen = file or (own if own.is_file() else ready if ready and ready.is_file() else None)
    return Engine(pipeline, base, folder, chosen)
