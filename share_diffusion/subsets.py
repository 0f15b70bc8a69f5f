"""Several folders as one data set, told in a TOML table that kohya's users know.

    [[datasets]]
      [[datasets.subsets]]
      image_dir = "photos/close"
      num_repeats = 10
      class_tokens = "a photo of mycat"      # the caption of pictures that have none

      [[datasets.subsets]]
      image_dir = "photos/cats"
      is_reg = true                          # pictures of the class

What belongs to the whole run (resolution, buckets, batch size, flips) is a flag here; such a key is answered with it.
"""

from __future__ import annotations

import difflib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KEYS = {"image_dir": str, "num_repeats": int, "class_tokens": str, "is_reg": bool, "caption_extension": str}
FLAGS = {
    "resolution": "--resolution",
    "enable_bucket": "--use_aspect_ratio_buckets",
    "bucket_reso_steps": "--bucket_step",
    "bucket_no_upscale": "--no-bucket_enlarge (the default)",
    "batch_size": "--train_batch_size",
    "flip_aug": "--random_flip",
    "random_crop": "--no-center_crop",
    "shuffle_caption": "--shuffle_caption",
    "keep_tokens": "--keep_tokens",
    "caption_dropout_rate": "--caption_dropout_rate",
    "caption_tag_dropout_rate": "--caption_tag_dropout_rate",
    "alpha_mask": "--alpha_mask",
}


@dataclass(frozen=True)
class Subset:
    """One folder: how often its pictures count, the caption of those that have none, and whether it shows the class."""

    folder: Path
    repeats: int = 1
    prompt: str | None = None
    of_class: bool = False


def read_subsets(path: str | Path) -> list[Subset]:
    """Return the folders of a table; raises ValueError with everything that is wrong with it."""
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--dataset_config {path}: {error.strerror or error}; give the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--dataset_config {path}: not TOML: {error}") from None
    problems = misplaced(table, {"general", "datasets"}, "")
    general = table.get("general", {})
    problems += (
        misplaced(general, set(), "general.") if isinstance(general, dict) else [no_table("general", general, "[general]")]
    )
    rows: list[dict[str, Any]] = []
    for dataset in tables(table, "datasets", "[[datasets]]", problems):
        problems += misplaced(dataset, {"subsets"}, "datasets.")
        rows += tables(dataset, "subsets", "[[datasets.subsets]]", problems)
    problems += [problem for row in rows for problem in row_problems(row)]
    if not rows:
        problems.append("it names no folder; write [[datasets]] and below it [[datasets.subsets]] with image_dir")
    if problems:
        raise ValueError(f"--dataset_config {path}: {'; '.join(dict.fromkeys(problems))}")
    return [
        Subset(Path(row["image_dir"]), row.get("num_repeats", 1), row.get("class_tokens"), row.get("is_reg", False))
        for row in rows
    ]


def tables(table: dict[str, Any], key: str, spelling: str, problems: list[str]) -> list[dict[str, Any]]:
    """Return the tables of a list of them, adding to the problems where it is none."""
    found = table.get(key, [])
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        problems.append(no_table(key, found, spelling))
        return []
    return found


def no_table(key: str, value: Any, spelling: str) -> str:
    """Return the message for a value where tables belong."""
    return f"{key} is {value!r}; write it as a table, headed {spelling}"


def misplaced(table: dict[str, Any], known: set[str], prefix: str) -> list[str]:
    """Return what does not belong into a table, with the flag to use instead or the nearest key."""
    return [unknown(prefix + key, key, known) for key in table if key not in known]


def unknown(place: str, key: str, known: set[str]) -> str:
    """Return the message for a key that is not read here."""
    if key in FLAGS:
        return f"{place} is for the whole run; give the flag {FLAGS[key]}"
    close = difflib.get_close_matches(key, [*known, *KEYS], n=1)
    return f"unknown key {place}" + (f"; did you mean {close[0]}?" if close else f"; known are {', '.join(KEYS)}")


def row_problems(row: dict[str, Any]) -> list[str]:
    """Return what is wrong with one subset."""
    problems = misplaced(row, set(KEYS), "subsets.")
    problems += [
        f"subsets.{key} is {row[key]!r}; expected {kind.__name__}"
        for key, kind in KEYS.items()
        if key in row and type(row[key]) is not kind
    ]
    if "image_dir" not in row:
        problems.append("a subset has no image_dir")
    if row.get("caption_extension", ".txt") not in (".txt", ".caption"):
        problems.append(f"caption_extension is {row['caption_extension']!r}; .txt and .caption are read, both by themselves")
    return problems
