"""Training states that are either whole or not there: one folder `checkpoint-<step>` each, with a manifest written last.

The random numbers of a step are a function of (seed, step), so a state is only weights, optimizer and the step. A folder
is filled under a temporary name and renamed; one whose manifest is absent or does not fit its contents is passed over.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class State:
    """One stored training state: the step it was taken after, tensors and facts."""

    step: int
    tensors: dict[str, Any]
    facts: dict[str, Any]


def save_state(folder: Path, step: int, tensors: Mapping[str, Any], facts: Mapping[str, Any], keep: int | None) -> Path:
    """Write `checkpoint-<step>` and remove those beyond `keep` that were written first, another run's among them.

    Raises ValueError where it cannot be written.
    """
    target = folder / f"checkpoint-{step}"
    part = folder / f".checkpoint-{step}.{os.getpid()}.part"
    try:
        for left in folder.glob(".checkpoint-*.part"):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        part.mkdir(parents=True)
        with (part / "state.pt").open("wb") as file:
            torch.save(dict(tensors), file)
            file.flush()
            os.fsync(file.fileno())
        number = max((written(path) for path in list_states(folder)), default=0) + 1
        manifest = {"step": step, "number": number, "sha256": digest(part / "state.pt"), "facts": dict(facts)}
        (part / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
    except (OSError, RuntimeError) as error:  # torch tells a full disk by a RuntimeError
        shutil.rmtree(part, ignore_errors=True)
        why = (error.strerror if isinstance(error, OSError) else None) or error
        raise ValueError(f"cannot write the checkpoint {target} ({why}); make room, or choose another --output_dir") from error
    for old in list_states(folder)[:-keep] if keep else []:
        if old != target:
            shutil.rmtree(old, ignore_errors=True)
    return target


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def list_states(folder: Path) -> list[Path]:
    """Return the checkpoint folders in the order in which they were written; those that do not tell come first, by step."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := NAME.fullmatch(path.name))]
    return [path for _, _, path in sorted((written(path), step, path) for step, path in found)]


def written(path: Path) -> int:
    """Return a checkpoint's number, one more than that of the one written before it; 0 where its manifest does not tell."""
    try:
        return int(json.loads((path / "manifest.json").read_text(encoding="utf-8"))["number"])
    except (OSError, ValueError, TypeError, KeyError):
        return 0


def load_state(path: Path) -> State:
    """Read one checkpoint folder; raises ValueError when it is incomplete or damaged."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if digest(path / "state.pt") != manifest["sha256"]:
            raise ValueError("its contents do not fit its manifest")
        tensors = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        return State(manifest["step"], tensors, manifest["facts"])
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"checkpoint {path} cannot be used: {error}; resume from another or start again") from error


def find_state(folder: Path, wanted: str) -> tuple[State | None, list[str]]:
    """Return the state that `--resume_from_checkpoint` names (`latest` or a path), and what was passed over on the way.

    With `latest` and no usable checkpoint there is nothing to resume: (None, notes).
    """
    if wanted != "latest":
        return load_state(Path(wanted)), []
    notes = []
    for path in reversed(list_states(folder)):
        try:
            return load_state(path), notes
        except ValueError as error:
            notes.append(str(error))
    return None, notes
