"""Learning a concept in a process of its own: the same script as on the command line, started, watched and cancelled.

The subspace file changes in one step at the script's very end, so that whatever happens to the process before leaves it
as it was. Pictures come in through `open_picture`, which refuses what is not a picture, and are copied before anything
runs; names are labels here and never paths.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from share_diffusion.concept import KINDS, check_name
from share_diffusion.export.filename import safe_name
from share_diffusion.file import listing
from share_diffusion.pictures import PictureError, open_picture
from share_diffusion.progress import read_progress

SCRIPT = Path(__file__).resolve().parents[1] / "train" / "concept.py"
MOST_PICTURES = 200
MOST_STEPS = 5_000
GRACE = 15.0  # seconds between asking the process to end and ending it
LOOK = 0.3  # seconds between two looks at its progress


@dataclass(frozen=True)
class Lesson:
    """What is to be learned: pictures, and how the concept is called."""

    pictures: Sequence[Path]
    name: str
    kind: str
    trigger: str
    prompt: str
    steps: int

    @classmethod
    def of(cls, pictures: Sequence[str], name: str, kind: str, trigger: str, steps: Any, held: Sequence[str]) -> Lesson:
        """Return the lesson, or raise ValueError with everything that is wrong with it."""
        problems = []
        try:
            name = check_name(name or "")
        except ValueError as error:
            problems.append(str(error))
        if name.casefold() in (other.casefold() for other in held):
            problems.append(f"there is a concept {name!r} already; choose another name")
        trigger = (trigger or "").strip() or name
        if len(trigger) > 100 or not trigger.isprintable():
            problems.append("the trigger is a word or two, at most 100 characters")
        if kind not in KINDS:
            problems.append(f"kind is {str(kind)!r}; it is one of {', '.join(KINDS)}")
        if not 1 <= len(pictures or ()) <= MOST_PICTURES:
            problems.append(f"there are {len(pictures or ())} pictures; give 1 to {MOST_PICTURES}, 5 to 30 is usual")
        if not isinstance(steps, (int, float)) or not 1 <= steps <= MOST_STEPS:
            problems.append(f"steps is {steps}; it is 1 to {MOST_STEPS}")
        if problems:
            raise ValueError("; ".join(problems))
        prompt = f"{trigger} painting" if kind == "style" else f"a photo of {trigger}"
        return cls([Path(path) for path in pictures], name, kind, trigger, prompt, int(steps))


@dataclass
class Progress:
    """What is known of a running lesson."""

    step: int = 0
    steps: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    sample: Path | None = None
    retention: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    state: str = "starting"  # starting, learning, merging, done, failed, cancelled
    problem: str = ""


class Job:
    """One process that learns one lesson into a subspace file."""

    def __init__(self, lesson: Lesson, file: Path, base: str, folder: Path, alike: Sequence[str] = ()) -> None:
        self.lesson, self.file, self.base, self.alike = lesson, file, base, tuple(alike)
        self.folder = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{safe_name(lesson.name)}"
        self.facts = self.folder / "progress.jsonl"
        self.process: subprocess.Popen[bytes] | None = None
        self.cancelled = False

    def take_pictures(self) -> None:
        """Copy the pictures; one that cannot be read leaves nothing behind and is a ValueError."""
        pictures = self.folder / "pictures"
        pictures.mkdir(parents=True)
        problems = []
        for index, path in enumerate(self.lesson.pictures):
            try:
                open_picture(path).save(pictures / f"{index:03d}.png")
            except PictureError as error:
                problems.append(f"{path.name}: {error.reason}")
        if problems:
            shutil.rmtree(self.folder)
            raise ValueError("; ".join(problems))

    def start(self) -> None:
        """Start the script on the pictures that were taken."""
        with (self.folder / "log.txt").open("wb") as log:
            self.process = subprocess.Popen(
                self.command(self.folder / "pictures"),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])},
            )

    def command(self, pictures: Path) -> list[str]:
        """Return the command that a person would type."""
        lesson = self.lesson
        flags = {
            "concept": lesson.name,
            "kind": lesson.kind,
            "trigger": lesson.trigger,
            "instance_data_dir": str(pictures),
            "instance_prompt": lesson.prompt,
            "max_train_steps": str(lesson.steps),
            "pretrained_model_name_or_path": self.base,
            "subspace": str(self.file),
            "output_dir": str(self.folder),
            "progress_file": str(self.facts),
            "validation_steps": str(max(1, lesson.steps // 5)),
        }
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", str(SCRIPT)]
        return [*launcher, *(f"--{name}={value}" for name, value in flags.items()), "--no-sheet", *self.alike]

    def watch(self) -> Iterator[Progress]:
        """Yield what is known whenever there is more; ends when the process has."""
        assert self.process is not None
        progress, position = Progress(steps=self.lesson.steps), 0
        yield progress
        while True:
            ended = self.process.poll() is not None
            lines, position = read_progress(self.facts, position)
            for line in lines:
                self.take_in(progress, line)
            if lines:
                yield progress
            if ended:
                break
            time.sleep(LOOK)
        if progress.state != "done" and self.held():
            progress.state = "done"  # it ended after the merge
        if progress.state not in ("done", "failed"):
            progress.state = "cancelled" if self.cancelled else "failed"
            progress.problem = progress.problem or self.last_words()
        yield progress

    def held(self) -> bool:
        """Whether the subspace file holds the concept."""
        try:
            return self.lesson.name in names_in(self.file)
        except (OSError, ValueError):
            return False

    def take_in(self, progress: Progress, line: dict[str, Any]) -> None:
        """Add one line of the progress file to what is known."""
        progress.seconds = float(line.get("seconds", progress.seconds))
        if "loss" in line:
            progress.step, progress.state = int(line["step"]), "learning"
            progress.losses.append((progress.step, float(line["loss"])))
            if progress.step == progress.steps:
                progress.state = "merging"
        if "sample" in line:
            progress.sample = next(self.folder.glob(f"*/*/{line['sample']}"), None)
        if "error" in line:
            progress.state, progress.problem = "failed", str(line["error"])
        if line.get("done"):
            progress.state, progress.retention = "done", dict(line.get("retention", {}))

    def last_words(self) -> str:
        """Return the last line that the process wrote."""
        lines = (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "the process ended without a word")

    @property
    def running(self) -> bool:
        """Whether the process is still at it."""
        return self.process is not None and self.process.poll() is None

    def cancel(self) -> None:
        """End the process, kindly first; the subspace file is as it was, or has the whole concept."""
        process = self.process
        if process is None or process.poll() is not None:
            return
        self.cancelled = True
        for sign, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 5.0)):
            try:
                os.killpg(process.pid, sign)
                process.wait(patience)
                return
            except subprocess.TimeoutExpired:
                continue
            except ProcessLookupError:
                return


def names_in(file: Path | None) -> list[str]:
    """Return the concepts that a subspace file holds."""
    return [str(entry["name"]) for entry in listing(file).concepts] if file is not None and file.is_file() else []
