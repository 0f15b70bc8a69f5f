"""The engine behind the page: one pipeline, one subspace on it, one drawing at a time.

A drawing runs in a thread and hands over frames; whoever reads them may stop at any step. Card pictures are drawn in the
background and give way to people at once. The subspace file may grow while the page is open, by this page's own learning
or by another program: `refresh` attaches the new one between two drawings.
"""

from __future__ import annotations

import logging
import queue
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from app.cards import Card, CardPictures, card_of
from app.export import FORMATS, write_blend
from app.history import History
from app.job import Job, Lesson, names_in
from app.knowledge import Knowledge, read_reports, report_files
from app.masks import read_masks
from app.plans import Plan, grid_of, write_grid
from app.preview import Previewer
from app.samplers import samplers_of
from app.wish import FIELDS, Limits, Wish
from app.words import WORDS
from share_diffusion.attached import AttachedSubspace, attach
from share_diffusion.base import TINY, base_name, load_base
from share_diffusion.blend import Blend
from share_diffusion.drawing import BATCH, Sampling, generate, save_png, save_whole
from share_diffusion.loudness import loudest
from share_diffusion.models.identity import weights_of
from share_diffusion.overlap import SOME, overlaps
from share_diffusion.subspace import Subspace

MIXED = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}
READY_MADE = TINY.parent / "concepts.safetensors"
CARD_SEED = 7
PREVIEW_EVERY = 3
CLOSING = 5.0  # seconds that a drawing has to end in when the page is closed
MOST_ADVISED = 12  # concepts of a blend whose overlaps are told
Tell = Callable[["Frame"], None]
log = logging.getLogger("app")


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
    alike: Sequence[str] = ()  # flags that have a lesson load the base as it was loaded here
    lock: threading.Lock = field(default_factory=threading.Lock)
    people: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.history = History(self.folder / "history")
        self.pictures = CardPictures(self.folder / "cards")
        self.samplers = samplers_of(self.pipeline.scheduler)
        self.previewer = Previewer(self.pipeline)
        self.cards: dict[str, Card] = {}
        self.stamp: tuple[int, int] | None = None
        self.trouble = ""  # what is wrong with the file as it lies there now
        self.wanted: list[str] = []
        self.failed: set[str] = set()
        self.drawn = 0
        self.waiting = 0
        self.job: Job | None = None
        self.refresh()
        threading.Thread(target=self.draw_cards, daemon=True, name="card pictures").start()

    @property
    def limits(self) -> Limits:
        """What may be asked for with this base."""
        return Limits(Sampling().resolved(self.pipeline).width or 64, tuple(self.samplers))

    @property
    def start(self) -> Wish:
        """The base's own settings, with nothing asked for yet."""
        sampling = Sampling().resolved(self.pipeline)
        chosen = {name: value for name, value in asdict(sampling).items() if name in FIELDS}
        return Wish(**chosen, sampler=next(iter(self.samplers)))

    def refresh(self) -> bool:
        """Attach the subspace file's present content; returns whether it had changed."""
        if self.file is None or not self.file.exists():
            return False
        status = self.file.stat()
        stamp = status.st_mtime_ns, status.st_size
        if stamp == self.stamp:
            return False
        with self.lock:
            try:
                subspace = Subspace.load(self.file, weights_of(self.pipeline))
                self.swap(subspace)
            except (OSError, ValueError) as error:
                self.stamp = stamp if self.subspace is not None else None  # what is attached goes on
                self.trouble = str(error)
                raise
            self.subspace, self.stamp, self.trouble = subspace, stamp, ""
            version = subspace.basis_version
            self.cards = {name: card_of(concept, version) for name, concept in subspace.concepts.items()}
        return True

    def look(self) -> None:
        """Attach the file's present content, or go on with what is attached."""
        try:
            self.refresh()
        except (OSError, ValueError) as error:
            if self.subspace is None:
                raise
            log.warning("the subspace file cannot be read, the page goes on with what it has: %s", error)

    def swap(self, subspace: Subspace) -> None:
        """Put a subspace onto the model in the place of the present one, which stays where the new one does not fit."""
        if self.handle is not None:
            self.handle.detach()
        self.handle, self.stamp = None, None
        try:
            self.handle = attach(self.pipeline, subspace)
        finally:
            if self.handle is None and self.subspace is not None:
                self.handle = attach(self.pipeline, self.subspace)

    def draw(self, wishes: Sequence[Wish], stop: threading.Event | None = None, *, keep: bool = True) -> Iterator[Frame]:
        """Yield a frame after every step; leaving the loop, or setting `stop`, ends the drawing within a step.

        The wishes may differ in prompt, blend and seed and are drawn as one batch. The last frame has the finished
        pictures, written to the history if `keep`.
        """
        stop = stop or threading.Event()
        frames: queue.Queue[Frame | BaseException | None] = queue.Queue()
        each = [one for wish in wishes for one in wish.each()]

        def work() -> None:
            try:
                with self.for_people():
                    frames.put(self.finished(each, self.pictures_of(each, stop, frames.put), keep))
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

    def pictures_of(self, wishes: Sequence[Wish], stop: threading.Event, tell: Tell | None = None) -> list[Image.Image]:
        """Return one picture for each wish, drawn in batches; the caller holds the lock."""
        pictures: list[Image.Image] = []
        rounds = [wishes[start : start + BATCH] for start in range(0, len(wishes), BATCH)]
        self.pipeline.scheduler = self.samplers[wishes[0].sampler]
        try:
            for number, some in enumerate(rounds):
                self.set_blends(some)
                self.previewer.start()
                watch = self.watcher(stop, tell, number, len(rounds), pictures)
                prompts, seeds = [wish.prompt for wish in some], [wish.seed for wish in some]
                pictures = pictures + generate(self.pipeline, prompts, seeds, self.sampling(some[0]), watch=watch)
        finally:
            self.pipeline.scheduler = next(iter(self.samplers.values()))
        return pictures

    def watcher(
        self, stop: threading.Event, tell: Tell | None, number: int, rounds: int, done: list[Image.Image]
    ) -> Callable[[int, torch.Tensor], None]:
        """Return what looks on after every step of one batch: it stops the drawing, or tells of it."""

        def watch(step: int, latents: torch.Tensor) -> None:
            if stop.is_set():
                raise Stopped
            if tell is None:
                return
            steps = len(self.pipeline.scheduler.timesteps)
            seen = self.previewer.see(step, latents)
            due = step % PREVIEW_EVERY == PREVIEW_EVERY - 1 and step + 1 < steps
            tell(Frame(number * steps + step + 1, rounds * steps, [*done, *self.previewer.pictures(seen)] if due else ()))

        return watch

    def set_blends(self, wishes: Sequence[Wish]) -> None:
        """Make the wishes' blends active, each for its own picture; without a subspace only the base can be drawn."""
        masks = {name: text for wish in wishes for name, text in wish.masks.items()}
        blends = [wish.blend for wish in wishes]
        if self.handle is None:
            if any(Blend.parse(blend).terms for blend in blends):
                raise ValueError("no subspace file is open, so there is no concept to blend; learn one first")
        elif len(set(blends)) == 1:
            self.handle.set_blend(blends[0], masks=read_masks(masks))
        else:
            self.handle.set_blends(blends, masks=read_masks(masks))

    def sampling(self, wish: Wish) -> Sampling:
        """Return the wish's settings as the library takes them."""
        return Sampling(wish.steps, wish.guidance_scale, wish.negative_prompt, wish.width, wish.height)

    def finished(self, wishes: Sequence[Wish], pictures: list[Image.Image], keep: bool) -> Frame:
        """Return the last frame of a drawing."""
        steps = len(self.pipeline.scheduler.timesteps)
        if not keep:
            return Frame(steps, steps, pictures)
        ids = [
            self.history.add(picture, wish.prompt, wish.seed, self.sampling(wish), wish.blend, self.facts(wish))
            for wish, picture in zip(wishes, pictures, strict=True)
        ]
        return Frame(steps, steps, pictures, ids)

    def facts(self, wish: Wish) -> dict[str, Any]:
        """Return what a picture records beside its settings: names only, no path."""
        facts: dict[str, Any] = {"base": base_name(self.base), "sampler": wish.sampler}
        if wish.masks:
            facts["masks"] = dict(wish.masks)
        if self.subspace is not None and self.file is not None:
            facts |= {"subspace": self.file.name, "basis_version": self.subspace.basis_version}
        return facts

    @property
    def served(self) -> list[Path]:
        """The folders that hold only what this page writes for download."""
        return [self.folder / name for name in ("history", "sheets", "exports")]

    @property
    def formats(self) -> list[str]:
        """In which forms a blend can be exported."""
        return list(FORMATS)

    def export(self, blend: str, name: str | None, kind: str) -> Path:
        """Write a blend as a file that other programs read and return where it is."""
        self.refresh()
        if self.subspace is None:
            raise ValueError("no subspace file is open, so there is nothing to export; learn a concept first")
        # The embedded base goes along where a format holds the base: no other program has it, and drawing changes it here.
        bare = load_base("tiny") if self.base == "tiny" and FORMATS.get(kind) == "comfyui" else None
        return write_blend(self.subspace, blend, name, kind, self.folder / "exports", bare)

    def learn(self, pictures: Sequence[str], name: str, kind: str, trigger: str, steps: Any) -> Job:
        """Start learning a concept in its own process and return the job; one at a time."""
        if self.learning:
            raise ValueError("a concept is being learned already; wait for it, or cancel it")
        own = self.own_file
        lesson = Lesson.of(pictures, name, kind, trigger, steps, names_in(own if own.is_file() else self.file))
        job = Job(lesson, own, self.base, self.folder / "lessons", self.alike)
        job.take_pictures()
        self.open_own()
        job.start()
        self.job = job
        return job

    @property
    def learning(self) -> bool:
        """Whether a concept is being learned; a lesson goes on when the page that started it is closed."""
        return self.job is not None and self.job.running

    @property
    def own_file(self) -> Path:
        """The subspace file that learning may change: never the ready-made one, however it was named."""
        if self.file is None or self.file.resolve() == READY_MADE.resolve():
            return own_place(self.folder, self.base)
        return self.file

    def open_own(self) -> None:
        """Open the file that learning may change; it begins as a copy of the ready-made one where that was open."""
        own, before = self.own_file, self.file
        own.parent.mkdir(parents=True, exist_ok=True)
        if before is not None and not own.exists():

            def copy(part: Path) -> None:
                shutil.copyfile(before, part)

            save_whole(own, copy)
        self.file = own

    def cancel_learning(self) -> None:
        """End the running lesson, if there is one."""
        if (job := self.job) is not None:
            job.cancel()

    def close(self) -> None:
        """End the running lesson, and see that nobody is at the model when the process ends."""
        self.cancel_learning()
        self.waiting += 1
        self.people.set()  # a card picture in the making gives way within a step
        self.lock.acquire(timeout=CLOSING)

    def sheet(self, plan: Plan, pictures: Sequence[Image.Image], *, film: bool = False) -> tuple[Path, Path | None]:
        """Write the finished pictures of a plan on a labelled sheet, and as a film."""
        return write_grid(grid_of(plan, pictures, self.facts(plan.wishes[0])), self.folder / "sheets", film=film)

    def knowledge(self) -> Knowledge | None:
        """Return what the subspace knows, None where there is no file."""
        if self.subspace is None or self.file is None:
            return None
        if not self.file.is_file():
            raise ValueError(WORDS.gone(self.file.name))
        reports = read_reports(report_files(self.file, self.folder / "lessons"), list(self.cards))
        return Knowledge.of(self.subspace, self.file, reports)

    def advice(self, blend: Blend) -> str:
        """Return warnings about the two concepts that overlap most and about one that drowns another, "" where none do."""
        names = list(dict.fromkeys(blend.names))
        if self.subspace is None or not 2 <= len(names) <= MOST_ADVISED or any(name not in self.cards for name in names):
            return ""
        pair, uneven = overlaps(self.subspace, names)[0], self.uneven(blend)
        told = [WORDS.overlaps(pair.one, pair.other, pair.cosine, pair.advice)] if pair.cosine >= SOME else []
        return " ".join([*told, *([WORDS.uneven(*uneven)] if uneven else [])])

    def uneven(self, blend: Blend) -> tuple[str, str, float] | None:
        """Return (the loudest, the quietest, how many times as loud) of a blend that is summed as it is, where it matters."""
        if self.subspace is None or blend.method is not None:
            return None
        return loudest(self.subspace[name] for name in dict.fromkeys(blend.names) if name in self.cards)

    def want_cards(self, cards: Sequence[Card]) -> int:
        """Ask for these cards' pictures next and return how many are still to be drawn; one that failed is not tried again."""
        missing = [card for card in self.pictures.missing(cards) if card.key not in self.failed]
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
            except Exception as error:  # one card that cannot be drawn leaves the others theirs
                self.failed.add(card.key)
                log.warning("no picture for the card of %r", card.name, exc_info=error)
            self.wanted = [name for name in self.wanted if name != card.name]

    def draw_card(self, card: Card) -> None:
        """Draw one card's picture at the fixed seed, its concept alone, unless a person comes in between."""
        wish = self.start.changed(prompt=card.example, blend=str(Blend({card.name: card.weight})), seed=CARD_SEED)
        with self.lock:
            picture = self.pictures_of([wish], self.people)[0]
        save_png(picture, self.pictures.path(card))
        self.drawn += 1


def open_engine(
    base: str,
    file: Path | None,
    folder: Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    local_files_only: bool = False,
) -> Engine:
    """Load the base and the subspace; without a file given, the one last learned here, else the ready-made one."""
    if file is not None and not file.is_file():
        raise ValueError(f"there is no subspace file {file}; learn one, or leave --subspace away")
    pipeline = load_base(base, dtype=dtype, device=device, local_files_only=local_files_only)
    own = own_place(folder, base)
    ready = READY_MADE if base == "tiny" else None
    chosen = file or (own if own.is_file() else ready if ready and ready.is_file() else None)
    alike = [f"--mixed_precision={MIXED[dtype]}", *(["--cpu"] if torch.device(device).type == "cpu" else [])]
    return Engine(pipeline, base, folder, chosen, alike=[*alike, *(["--local_files_only"] if local_files_only else [])])


def own_place(folder: Path, base: str) -> Path:
    """Return where a base's subspace file is learned: beside the page's own folder, as the training scripts do."""
    return folder.parent / base_name(base) / "subspace.safetensors"
