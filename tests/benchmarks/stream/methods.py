"""What a method of continual learning is to the benchmark, and all of them by kind.

A method learns one concept after another and can say, at any time, which update is active when a concept is drawn. One
that keeps concepts apart answers with a different update for each; one that keeps a single adapter always with the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from share_diffusion.lora import LoRA
from stream.separate import CompressedLoRA, MergedLoRA, OwnLoRA, UntouchedBase
from stream.shared import PaperStream, ShareStream
from stream.single import JointLoRA, SequentialLoRA
from stream.workbench import Lesson, Workbench


class Method(Protocol):
    """One stream in the making; `every_step` is False where there is nothing to look at before the last concept."""

    every_step: bool

    def learn(self, concept: str) -> Lesson | None:
        """Learn a concept."""
        ...

    def update(self, concept: str) -> LoRA | None:
        """Return what is active when a concept is drawn; None is the untouched base."""
        ...

    def costs(self) -> tuple[int, int, int]:
        """Return numbers stored in all, numbers that the last concept added, bytes of the files."""
        ...

    def save(self, folder: Path) -> None:
        """Write the state."""
        ...

    def load(self, folder: Path) -> None:
        """Read the state."""
        ...


KINDS: dict[str, Callable[..., Method]] = {
    "base": UntouchedBase,
    "own_lora": OwnLoRA,
    "compressed": CompressedLoRA,
    "merged": MergedLoRA,
    "sequential": SequentialLoRA,
    "joint": JointLoRA,
    "share": ShareStream,
    "paper": PaperStream,
}


def make(bench: Workbench, settings: Mapping[str, Any], seed: int, ignored: set[str]) -> Method:
    """Return a method of a plan, at the start of its stream."""
    options = {key: value for key, value in settings.items() if key not in ignored}
    return KINDS[settings["kind"]](bench, seed, **options)
