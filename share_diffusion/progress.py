"""A run's progress for other programs: a file of JSON lines that grows while the run goes on.

    {"step": 12, "steps": 200, "loss": 0.31, "seconds": 9.4}
    {"step": 50, "steps": 200, "sample": "sample-000050.png", "seconds": 38.0}
    {"done": true, "concept": "mycat", "retention": {"mycat": 0.9991}, "seconds": 161.0}      or {"error": "...", ...}

A reader takes whole lines only; the last one has `done`, `error` or `stopped`, which says what a stop has left.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any


class ProgressFile:
    """Appends one line a fact to a file that should be new; without a path nothing is written.

    Raises ValueError where the file cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.started = time.perf_counter()
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.open("a").close()
            except OSError as error:
                raise ValueError(f"--progress_file {path}: {error.strerror or error}; choose another file") from None

    def tell(self, **facts: Any) -> None:
        """Write one line, with the seconds since the start; a full disk leaves it out, and the run goes on."""
        if self.path is not None:
            facts["seconds"] = round(time.perf_counter() - self.started, 3)
            with suppress(OSError), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(facts, sort_keys=True) + "\n")


def read_progress(path: Path, start: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Return the whole lines that lie after byte `start`, and where the next ones begin."""
    if not path.is_file():
        return [], start
    with path.open("rb") as file:
        file.seek(start)
        content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.splitlines() if line.strip()], start + len(whole)
