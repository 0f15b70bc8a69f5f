"""The committed table: one line per finished cell, appended as it is measured and never measured twice.

A cell is one concept, looked at after one step of one stream: R[after, concept] of (method, order, seed). Facts of the
lesson itself (trainables, seconds, learning curve) stand in the cell of the concept that was just learned.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

KEY = ("settings", "method", "order", "seed", "after", "concept", "weight")
MEASURED = ("loss", "base_loss", "judge", "adherence", "broken", "norm", "retention")
LESSON = ("learned", "trainable", "numbers", "concept_numbers", "file_bytes", "seconds", "merge_seconds", "curve")
FIELDS = (*KEY, *MEASURED, *LESSON, "commit")
NUMBERS = {"loss", "base_loss", "judge", "adherence", "norm", "retention", "seconds", "merge_seconds", "weight"}
COUNTS = {"order", "seed", "after", "broken", "trainable", "numbers", "concept_numbers", "file_bytes"}

Row = dict[str, Any]


class Table:
    """The cells of one CSV file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple[Any, ...], Row] = {key_of(row): row for row in read_rows(path)}

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return key in self.rows

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a cell to the file; a cell that is there already is an error of the caller."""
        typed = {name: row.get(name, "") for name in FIELDS}
        assert key_of(typed) not in self.rows, key_of(typed)
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, FIELDS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow({name: written(value) for name, value in typed.items()})
        self.rows[key_of(typed)] = {name: parsed(name, written(value)) for name, value in typed.items()}

    def select(self, settings: Iterable[str]) -> list[Row]:
        """Return the cells that were measured with these settings' digests."""
        known = set(settings)
        return [row for row in self.rows.values() if row["settings"] in known]


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what makes a cell the same cell."""
    return tuple(row[name] for name in KEY)


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the cells of a file, typed; none where there is no file."""
    if path.exists():
        with path.open(newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                yield {name: parsed(name, row.get(name) or "") for name in FIELDS}


def written(value: Any) -> str:
    """Return a value as it stands in the file; floats come back the same."""
    return repr(float(value)) if isinstance(value, float) else str(value)


def parsed(name: str, text: str) -> Any:
    """Return a field's value; empty stays empty."""
    if text == "":
        return ""
    return float(text) if name in NUMBERS else int(text) if name in COUNTS else text


def curve_of(row: Row) -> dict[int, float]:
    """Return a lesson's losses by step, 0 being the untouched base."""
    pairs = (pair.split(":") for pair in row["curve"].split() if row["curve"])
    return {int(step): float(loss) for step, loss in pairs}
