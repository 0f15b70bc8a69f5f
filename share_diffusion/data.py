"""A data set: one flat folder of pictures, each with a caption.

    001.png + 001.txt (or 001.caption)         or  metadata.jsonl with one {"file_name": ..., "text": ...} a line
    001.mask.png                               where to look: white counts, black does not
    10_name/001.png                            kohya's folders: every picture counts ten times
    train/metadata.csv, train/001.png          Hugging Face's imagefolder: its `train` split is read

A caption is looked for in metadata.jsonl, .txt, .caption, the file name (opt-in) and the instance prompt, in turn.
Every picture is decoded once here, so that training never meets a broken one; nothing is left out without a word.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from share_diffusion.metadata import NAMES, key_of_file, read_metadata, read_text, shown
from share_diffusion.pictures import PictureError, open_picture

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
FOREIGN = {".heic", ".heif", ".avif", ".jxl", ".jp2", ".jfif", ".svg", ".gif", ".tif", ".tiff", ".psd", ".dng", ".raw"}
KOHYA = re.compile(r"(\d+)_(.+)")
NO_TEXT = re.compile(r"[\0\ud800-\udfff]")  # what UTF-16 read as UTF-8, or a broken JSON escape, leaves behind
TRIGGER = "[trigger]"
MAX_CAPTION = 2000
MAX_REPEATS = 1000  # more is a date, as in 2024_summer

Skipped = list[tuple[Path, str]]


@dataclass(frozen=True)
class Example:
    """A picture file, what it shows, and how often it counts."""

    picture: Path
    caption: str
    repeats: int = 1
    digest: str = ""  # sha256 of the picture file
    mask: Path | None = None


@dataclass(frozen=True)
class Dataset:
    """The pictures of a folder in the order of their names, what was left out and why, and what to tell the user."""

    folder: Path
    examples: tuple[Example, ...]
    skipped: tuple[tuple[Path, str], ...]
    notes: tuple[str, ...]
    fingerprint: str  # sha256 of pictures, captions and repeats in order; the same wherever the folder lies

    def __len__(self) -> int:
        return len(self.examples)

    def report(self) -> str:
        """What will be trained on, in a few lines to print before training."""
        caption = self.examples[0].caption
        caption = caption if len(caption) <= 70 else caption[:66] + " ..."
        head = f"{len(self)} picture{'s' if len(self) > 1 else ''} ({len(self)} captioned, e.g. {caption!r})"
        if (total := sum(example.repeats for example in self.examples)) != len(self):
            head += f", {total} with repeats"
        if masks := sum(example.mask is not None for example in self.examples):
            head += f", {masks} with a mask"
        if self.skipped:
            head += f", {len(self.skipped)} skipped:"
        return "\n".join([head, *_lines(self.skipped, self.folder), *self.notes])


def read_dataset(
    folder: str | Path,
    *,
    trigger: str | None = None,
    instance_prompt: str | None = None,
    caption_from_filename: bool = False,
    caption_column: str = "text",
    repeats: int = 1,
    minimum_side: int = 32,
    recursive: bool = False,
) -> Dataset:
    """The data set in `folder`, every picture checked and captioned; each counts `repeats` times its folder's number.

    `[trigger]` in a caption becomes `trigger`, which is put in front where it is missing. `recursive` reads subfolders.
    Raises ValueError with everything that is wrong: captions missing, too long or not UTF-8, no usable picture, or
    more pictures refused than usable.
    """
    root = Path(folder)
    _check_arguments(root, trigger, instance_prompt, minimum_side, repeats)
    root = _split(root)
    files, skipped = _scan(root, root, recursive)
    masks, files, lost = _masks(files)
    pictures, refused = _sort_out(files, minimum_side)
    skipped += refused + lost
    rows, problems = read_metadata(root, files, caption_column)
    captions, more = _caption_all(root, pictures, files, rows, trigger, instance_prompt, caption_from_filename)
    more += [problem for picture in pictures if (problem := _mask_problem(picture, masks.get(picture), root))]
    if problems := _picture_problems(root, pictures, skipped) + problems + more:
        raise ValueError("\n".join(problems))

    digests = [_digest(picture) for picture in pictures]
    examples = tuple(
        Example(picture, caption.text, repeats * _repeats(picture, root), digest, masks.get(picture))
        for picture, caption, digest in zip(pictures, captions, digests, strict=True)
    )
    notes = [*_caption_notes(captions, trigger), *_unmatched(rows, files), *_duplicates(root, pictures, digests)]
    return Dataset(root, examples, tuple(skipped), tuple(notes), _fingerprint(examples, digests))


class Caption(NamedTuple):
    """A caption with where it stood; `prefixed` says that the trigger had to be put in front."""

    text: str
    source: str
    prefixed: bool


def with_trigger(text: str, trigger: str) -> str:
    """Return a caption or prompt with the trigger in its marked place."""
    return text.replace(TRIGGER, trigger)


def join_datasets(datasets: Sequence[Dataset]) -> Dataset:
    """Several folders as one data set, in their order."""
    if len(datasets) == 1:
        return datasets[0]
    examples = tuple(example for dataset in datasets for example in dataset.examples)
    folder = Path(os.path.commonpath([dataset.folder.resolve() for dataset in datasets]))
    return Dataset(
        folder,
        examples,
        tuple((path.parent.resolve() / path.name, reason) for dataset in datasets for path, reason in dataset.skipped),
        tuple(f"{dataset.folder}: {note}" for dataset in datasets for note in (f"{len(dataset)} pictures", *dataset.notes)),
        _fingerprint(examples, [example.digest for example in examples]),
    )


def _split(root: Path) -> Path:
    """The folder that holds the pictures: itself, or the `train` split of a Hugging Face imagefolder."""
    inner = root / "train"
    if not os.access(root, os.R_OK | os.X_OK):
        return root  # which listing it will explain
    here = any(entry.suffix.lower() in PICTURES or entry.name in NAMES for entry in root.iterdir())
    return inner if not here and inner.is_dir() and not inner.is_symlink() else root


def _masks(files: Sequence[Path]) -> tuple[dict[Path, Path], list[Path], Skipped]:
    """The mask of each picture that has one, the other files, and masks of no picture."""
    pictures = [file for file in files if file.suffix.lower() in PICTURES and not _is_mask(file)]
    found = {key_of_file(file.with_name(file.stem).with_suffix("")): file for file in files if _is_mask(file)}
    owners = {picture: key_of_file(picture.with_suffix("")) for picture in pictures}  # a.png and a.jpg may share one
    masks = {picture: found[owner] for picture, owner in owners.items() if owner in found}
    lost = [
        (file, "is the mask of a picture that is not there; remove it") for file in found.values() if file not in masks.values()
    ]
    return masks, [file for file in files if not _is_mask(file)], lost


def _is_mask(file: Path) -> bool:
    """Whether a file is named as a mask, 001.mask.png."""
    return file.suffix.lower() == ".png" and Path(file.stem).suffix.lower() == ".mask"


def _mask_problem(picture: Path, mask: Path | None, root: Path) -> str | None:
    """What is wrong with a picture's mask, if anything."""
    if mask is None:
        return None
    try:
        sizes = open_picture(picture).size, open_picture(mask).size
    except PictureError as error:
        return f"{shown(mask, root)}: {error.reason}"
    if sizes[0] == sizes[1]:
        return None
    return f"{shown(mask, root)} is {sizes[1][0]} x {sizes[1][1]}, its picture {sizes[0][0]} x {sizes[0][1]}; make them equal"


def _check_arguments(root: Path, trigger: str | None, instance_prompt: str | None, minimum_side: int, repeats: int) -> None:
    """Refuse a folder that is none, and settings that cannot be meant."""
    problems = [_folder_problem(root)]
    for name, words in (("trigger", trigger), ("instance_prompt", instance_prompt)):
        if words is not None and not words.strip():
            problems.append(f"{name} is {words!r}, at least one word is needed; leave it out to go without")
    if minimum_side < 1:
        problems.append(f"minimum_side is {minimum_side}, at least 1 pixel is needed; 32 is the default")
    if not 1 <= repeats <= MAX_REPEATS:
        problems.append(f"repeats is {repeats}; it is 1 to {MAX_REPEATS}")
    if problems := [problem for problem in problems if problem]:
        raise ValueError("\n".join(problems))


def _folder_problem(root: Path) -> str | None:
    """What is wrong with the path of the data set, if anything."""
    if root.is_dir():
        return None
    if root.exists():
        kind = "a picture" if root.suffix.lower() in PICTURES else "a file"
        return f"{root} is {kind}, a folder of pictures is needed; give its folder: {root.parent}"
    if not root.parent.is_dir():
        return f"there is no folder {root}, nor its parent {root.parent}; check the path"
    names = [entry.name for entry in root.parent.iterdir() if entry.is_dir()]
    nearest = difflib.get_close_matches(root.name, names, n=3, cutoff=0.5) or sorted(names, key=_order)[:5]
    hint = f"did you mean {', '.join(nearest)}?" if nearest else "that one holds no folders; check the path"
    return f"there is no folder {root.name} in {root.parent}; {hint}"


def _scan(folder: Path, root: Path, recursive: bool) -> tuple[list[Path], Skipped]:
    """The files of the data set in natural order, and the links, subfolders and pipes left out, with the reason."""
    files: list[Path] = []
    skipped: Skipped = []
    try:
        entries = sorted(folder.iterdir(), key=lambda entry: _order(entry.name))
    except OSError as error:
        raise ValueError(f"{folder} cannot be listed ({error.strerror}); check its permissions") from error
    for entry in entries:
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            continue
        if reason := _left_out(entry, root, recursive):
            skipped.append((entry, reason))
        elif entry.is_dir():
            inner_files, inner_skipped = _scan(entry, root, recursive)
            files += inner_files
            skipped += inner_skipped
        else:
            files.append(entry)
    return files, skipped


def _left_out(entry: Path, root: Path, recursive: bool) -> str | None:
    """Why an entry of the folder is not read, None if it is."""
    if entry.is_symlink():
        try:
            target = entry.resolve(strict=True)
        except (OSError, RuntimeError):  # RuntimeError: a loop, before Python 3.13
            return "is a link that loops or leads nowhere; put the file itself in its place"
        if not target.is_relative_to(root.resolve()):
            return "is a link that leaves the folder; put a copy of the file in its place"
        if target.is_dir():
            return "is a link to a folder, which is not followed; the folder itself is read"
    if not entry.is_dir():
        return None if entry.is_file() else "is not a regular file; remove it"
    counts = KOHYA.fullmatch(entry.name)
    if counts and not 1 <= int(counts[1]) <= MAX_REPEATS:
        return f"would repeat its pictures {counts[1]} times, 1 to {MAX_REPEATS} is possible; rename the folder"
    if recursive or (counts and entry.parent == root):
        return None
    return "is a subfolder, only the folder itself and 10_name/ folders are read; point --instance_data_dir at it"


def _sort_out(files: Sequence[Path], minimum_side: int) -> tuple[list[Path], Skipped]:
    """The pictures that can be used, and those that cannot with the reason; other files are neither."""
    pictures: list[Path] = []
    refused: Skipped = []
    for file in files:
        suffix = file.suffix.lower()
        if suffix in FOREIGN:
            refused.append((file, f"{suffix} is not read, only {' '.join(sorted(PICTURES))}; save it as PNG or JPEG"))
        elif suffix in PICTURES:
            reason = _fault(file, minimum_side)
            refused += [(file, reason)] if reason else []
            pictures += [] if reason else [file]
    return pictures, refused


def _fault(picture: Path, minimum_side: int) -> str | None:
    """Why a picture cannot be used, found by decoding it in full."""
    try:
        width, height = open_picture(picture).size
    except PictureError as error:
        return error.reason
    if min(width, height) >= minimum_side:
        return None
    return f"has {width} x {height} pixels, its shorter side needs {minimum_side}; use a larger copy"


def _picture_problems(root: Path, pictures: Sequence[Path], skipped: Skipped) -> list[str]:
    """What stands against training on these pictures at all."""
    refused = [(path, reason) for path, reason in skipped if path.suffix.lower() in PICTURES | FOREIGN]
    folders = [path.name for path, _ in skipped if path.is_dir() and not path.is_symlink()]
    if len(refused) > len(pictures):
        share = f"{len(refused)} of {len(refused) + len(pictures)} pictures"
        head = f"{share} in {root} cannot be used, at most half may fail; mend or remove them:"
        return ["\n".join([head, *_lines(refused, root)])]
    if pictures:
        return []
    if folders:
        return [f"{root} holds no pictures, only subfolders; point --instance_data_dir at one of: {_some(folders, 10)}"]
    if any(root.rglob("*.parquet")):
        return [f"{root} holds pictures inside .parquet files, which are not read; save them as files (imagefolder)"]
    head = f"{root} holds no pictures, at least 1 is needed; put {' '.join(sorted(PICTURES))} files in it"
    return ["\n".join([head, *_lines(skipped, root)])]


def _caption_all(
    root: Path,
    pictures: Sequence[Path],
    files: Sequence[Path],
    rows: Mapping[str, str],
    trigger: str | None,
    instance_prompt: str | None,
    from_filename: bool,
) -> tuple[list[Caption], list[str]]:
    """The caption of every picture, and what is wrong with them; the list is as long as `pictures` if nothing is."""
    texts = {key_of_file(file.with_suffix(file.suffix.lower())): file for file in files}
    captions: list[Caption] = []
    without: list[Path] = []
    problems: list[str] = []
    for picture in pictures:
        try:
            candidates = _candidates(picture, rows, texts, from_filename, instance_prompt)
            source, text = next((found for found in candidates if found[1]), ("", ""))
            if source:
                captions.append(_finish(text, source, trigger))
            else:
                without.append(picture)
        except ValueError as error:
            problems.append(f"{shown(picture, root)}: {error}")
    return captions, problems + _missing(root, without, len(pictures))


def _candidates(
    picture: Path, rows: Mapping[str, str], texts: Mapping[str, Path], from_filename: bool, instance_prompt: str | None
) -> Iterator[tuple[str, str]]:
    """Where the caption of a picture may stand and what it says there; the first that is not empty holds."""
    yield "metadata", _one_line(rows.get(key_of_file(picture), ""))
    for suffix in (".txt", ".caption"):
        if file := texts.get(key_of_file(picture.with_suffix(suffix))):
            yield suffix, _one_line(read_text(file))
    if from_filename:
        yield "the file name", _from_filename(picture)
    yield "the instance prompt", _one_line(instance_prompt or "")


def _finish(text: str, source: str, trigger: str | None) -> Caption:
    """A caption with the trigger in its place, checked."""
    if trigger is None and TRIGGER in text:
        raise ValueError(f"its caption from {source} holds {TRIGGER}, and no trigger is given; give --trigger WORD")
    word, text = (unicodedata.normalize("NFC", words) for words in (_one_line(trigger or ""), text))
    text = with_trigger(text, word)
    prefixed = bool(word) and not re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE)
    text = f"{word}, {text}" if prefixed else text
    if len(text) > MAX_CAPTION:
        raise ValueError(f"its caption from {source} has {len(text)} characters, at most {MAX_CAPTION}; shorten it")
    if odd := NO_TEXT.search(text):
        raise ValueError(f"its caption from {source} holds U+{ord(odd[0]):04X}, which is no text; save it as UTF-8")
    return Caption(text, source, prefixed)


def _missing(root: Path, without: Sequence[Path], total: int) -> list[str]:
    """The error for pictures that have no caption."""
    if not without:
        return []
    names = _some([shown(picture, root) for picture in without], 5)
    kohya = KOHYA.fullmatch(without[0].parent.name)
    prompt = kohya[2] if kohya else "a photo of a cat"
    return [
        f"{len(without)} of {total} pictures in {root} have no caption or an empty one, all need one: {names}\n"
        f"  write one beside each picture ({shown(without[0].with_suffix('.txt'), root)}) or in metadata.jsonl,\n"
        f"  or give all of them --instance_prompt {prompt!r},\n"
        f"  or take their file names with --caption_from_filename"
    ]


def _caption_notes(captions: Sequence[Caption], trigger: str | None) -> list[str]:
    """Where the captions come from, and how many had to be given the trigger."""
    sources = Counter(caption.source for caption in captions)
    notes = ["captions from " + ", ".join(f"{source} ({count})" for source, count in sources.items())]
    if prefixed := sum(caption.prefixed for caption in captions):
        notes.append(f"trigger {trigger!r} put in front of {prefixed} of {len(captions)} captions")
    return notes


def _unmatched(rows: Mapping[str, str], files: Sequence[Path]) -> list[str]:
    """A note on captions in the metadata for pictures that are not there."""
    there = {key_of_file(file) for file in files}
    names = [repr(Path(key).name) for key in rows if key not in there]
    return [f"captions in the metadata without a picture ({len(names)}): {_some(names, 5)}"] if names else []


def _duplicates(root: Path, pictures: Sequence[Path], digests: Sequence[str]) -> list[str]:
    """A note on pictures with the same bytes; they stay, and so count more than once."""
    first: dict[str, Path] = {}
    pairs = [
        f"{shown(picture, root)} = {shown(first[digest], root)}"
        for picture, digest in zip(pictures, digests, strict=True)
        if first.setdefault(digest, picture) != picture
    ]
    return [f"exact copies, which count again ({len(pairs)}): {_some(pairs, 5)}"] if pairs else []


def _fingerprint(examples: Sequence[Example], digests: Sequence[str]) -> str:
    """sha256 over what training sees, and nothing else (no times, no paths)."""
    seen = [
        [digest, example.caption, example.repeats, *([_digest(example.mask)] if example.mask else [])]
        for example, digest in zip(examples, digests, strict=True)
    ]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def _digest(file: Path) -> str:
    """sha256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _repeats(picture: Path, root: Path) -> int:
    """How often a picture counts: the number before its folder's name below `root`, as kohya writes it."""
    counts = KOHYA.fullmatch(picture.parent.name)
    return int(counts[1]) if counts and picture.parent != root else 1


def _one_line(text: str) -> str:
    """The text with every run of white space, line ends too, as one space."""
    return " ".join(text.split())


def _from_filename(picture: Path) -> str:
    """The words of a file name, without the number that counts files ("a_red_fox_03.png", "a red fox (2).png")."""
    name = unicodedata.normalize("NFC", picture.stem)
    words = re.sub(r"^\d+$|[\s_-]+\d+$|\s*\(\d+\)$", "", name)
    return _one_line(words.replace("_", " "))


def _order(name: str) -> tuple[list[str | int], str]:
    """What names are sorted by: numbers in them by value (2.png before 10.png), and always the same."""
    parts = re.split(r"(\d+)", unicodedata.normalize("NFC", name).casefold())
    return [int(part) if part.isdecimal() else part for part in parts], name


def _lines(skipped: Iterable[tuple[Path, str]], root: Path) -> list[str]:
    """Each left-out file with its reason, indented."""
    return [f"  {shown(path, root)}: {reason}" for path, reason in skipped]


def _some(names: Sequence[str], count: int) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
