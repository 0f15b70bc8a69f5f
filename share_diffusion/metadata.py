"""Captions that stand in one file for a whole folder, as Hugging Face `datasets` writes and reads them (imagefolder).

    metadata.jsonl    {"file_name": "001.png", "text": "a cat"}          one object a line
    metadata.csv      file_name,text                                     a header, then one picture a line

Text files are UTF-8, with or without a byte order mark. Every fault is told with its line.
"""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

NAMES = ("metadata.jsonl", "metadata.csv")
MAX_TEXT_BYTES = 64 * 2**20


def read_metadata(root: Path, files: Sequence[Path], column: str = "text") -> tuple[dict[str, str], list[str]]:
    """The captions of all metadata.jsonl and metadata.csv by `key_of_file` of their picture, and what is wrong with them."""
    rows: dict[str, str] = {}
    problems: list[str] = []
    for file in (file for file in files if file.name in NAMES):
        try:
            parse, lines = reader(file, column)
        except ValueError as error:
            problems.append(f"{shown(file, root)}: {error}")
            continue
        for number, line in lines:
            try:
                name, text = parse(line)
                if rows.setdefault(key_of_file(file.parent / name), text) != text:
                    raise ValueError(f"gives {name!r} a second, different text; keep one")
            except ValueError as error:
                problems.append(f"{shown(file, root)} line {number} {error}")
    return rows, problems


def reader(file: Path, column: str) -> tuple[Callable[[Any], tuple[str, str]], list[tuple[int, Any]]]:
    """How a row of this file is read, and its rows with their numbers."""
    content = read_text(file)
    if file.suffix == ".csv":
        try:
            rows = csv.DictReader(io.StringIO(content))
            names, table = list(rows.fieldnames or ()), list(enumerate(rows, 2))
        except csv.Error as error:
            raise ValueError(f"is not CSV ({error}); write a header and one picture a line") from error
        if absent := [name for name in ("file_name", column) if name not in names]:
            raise ValueError(f"has no column {' and no '.join(absent)}; it has {', '.join(names) or 'none'}")
        return lambda row: (row["file_name"] or "", row[column] or ""), table
    lines = enumerate(content.split("\n"), 1)  # not splitlines: JSON may hold U+2028 as it is
    return lambda line: parse_row(line, column), [(number, line) for number, line in lines if line.strip()]


def parse_row(line: str, column: str) -> tuple[str, str]:
    """file_name and caption of one line of metadata.jsonl."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error}); write one object a line") from error
    name, text = (row.get("file_name"), row.get(column)) if isinstance(row, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(text, str):
        raise ValueError(f'is {line.strip()[:60]!r}; write it as {{"file_name": "001.png", "text": "a cat"}}')
    return name, text


def read_text(file: Path) -> str:
    """A UTF-8 text file, with or without a byte order mark."""
    if (size := file.stat().st_size) > MAX_TEXT_BYTES:
        raise ValueError(f"{file.name} has {size:,} bytes, at most {MAX_TEXT_BYTES:,}; shorten it")
    try:
        return file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{file.name} cannot be read ({error.strerror}); check its permissions") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file.name} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}; save it as UTF-8"
        ) from error


def key_of_file(path: Path) -> str:
    """A path to compare by: macOS stores names decomposed, captions are often written composed."""
    return unicodedata.normalize("NFC", str(path))


def shown(path: Path, root: Path) -> str:
    """A path below `root`, with everything escaped that is not printable."""
    return repr(path.relative_to(root).as_posix())[1:-1]
