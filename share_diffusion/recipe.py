"""What a concept is before it is learned: its name, kind, trigger, where its pictures are, what to draw of it.

`--concept NAME` alone finds `configs/concepts/NAME.toml`, else the folder `data/NAME/`; flags win over the file.
"""

from __future__ import annotations

import difflib
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from share_diffusion.concept import KINDS, check_name
from share_diffusion.data import with_trigger

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PLACES = ("in a meadow", "at night", "in a city", "in a room")
KEYS = {"name": str, "kind": str, "trigger": str, "data": dict, "sample": dict}
DATA_KEYS = {"world": str, "pictures": int, "seed": int, "caption": str, "folder": str, "instance_prompt": str}
SAMPLE_KEYS = {"prompts": list}


@dataclass(frozen=True)
class World:
    """Pictures that the picture world draws: which style or character, how many, from which seed, how captioned."""

    name: str
    pictures: int = 24
    seed: int = 0
    caption: str = "[trigger] {scene}"


@dataclass(frozen=True)
class Recipe:
    """One concept to learn; `folder` holds its pictures, or will once `world` has drawn them."""

    name: str
    kind: str
    trigger: str
    folder: Path
    prompts: tuple[str, ...]
    instance_prompt: str | None = None
    world: World | None = None


def find_recipe(
    name: str,
    configs: Sequence[Path],
    data: Path,
    *,
    folder: str | None = None,
    kind: str | None = None,
    trigger: str | None = None,
    instance_prompt: str | None = None,
    prompts: Sequence[str] = (),
) -> Recipe:
    """Return the recipe of a concept from its file or folder, with flags laid over it.

    Raises ValueError that lists the known concepts when there is neither file nor folder.
    """
    name, spelled = check_name(name), name
    files = (path / f"{spelling}.toml" for path in configs for spelling in (name, spelled))
    file = next((path for path in files if path.is_file()), None)
    values = read_recipe_file(file) if file else {}
    section = values.get("data", {})
    own = data / spelled if (data / spelled).is_dir() else data / name
    if folder is None and not file and not own.is_dir():
        raise ValueError(unknown(name, configs, data))
    place = Path(folder) if folder else Path(section["folder"]) if "folder" in section else own
    world = None
    if "world" in section and folder is None:
        known = {key: section[key] for key in ("pictures", "seed", "caption") if key in section}
        world = World(section["world"], **known)
    instance_prompt = instance_prompt or section.get("instance_prompt")
    kind = kind or str(values.get("kind", "style"))
    word = trigger or values.get("trigger") or default_trigger(name, instance_prompt)
    own_prompts = values.get("sample", {}).get("prompts", ()) if folder is None else ()  # other pictures, another trigger
    asked = tuple(prompts) or tuple(own_prompts)
    return Recipe(
        name=name,
        kind=kind,
        trigger=word,
        folder=place,
        prompts=tuple(with_trigger(text, word) for text in asked or default_prompts(word, kind, instance_prompt)),
        instance_prompt=instance_prompt,
        world=world,
    )


def default_trigger(name: str, instance_prompt: str | None) -> str:
    """Return the concept's name as it appears in prompts: its letters, their marks and its digits, in lower case, one word."""
    whole = unicodedata.normalize("NFC", name.casefold())
    word = "".join(sign for sign in whole if sign.isalnum() or unicodedata.category(sign).startswith("M")) or name
    return name if instance_prompt and name in instance_prompt else word


def default_prompts(trigger: str, kind: str, instance_prompt: str | None) -> tuple[str, ...]:
    """Return four prompts to draw a concept of which no prompts are known."""
    if instance_prompt:
        return (instance_prompt, *(f"{instance_prompt} {place}" for place in PLACES[:3]))
    if kind == "subject":
        return tuple(f"a {trigger} {place}" for place in PLACES)
    return tuple(
        f"{trigger}, a {thing} {place}"
        for thing, place in zip(("red house", "blue cat", "green tree", "yellow boat"), PLACES, strict=True)
    )


def read_recipe_file(path: Path) -> dict[str, Any]:
    """Return a concept file's values; raises ValueError with every unknown key and wrong type."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML: {error}") from None
    problems = wrong_keys(values, KEYS, "")
    problems += wrong_keys(values.get("data", {}), DATA_KEYS, "data.") if not problems else []
    problems += wrong_keys(values.get("sample", {}), SAMPLE_KEYS, "sample.") if not problems else []
    if values.get("kind", "style") not in KINDS:
        problems.append(f"kind is {values['kind']!r}; it is one of {', '.join(KINDS)}")
    if not problems and check_name(values.get("name", path.stem)) != unicodedata.normalize("NFC", path.stem):
        problems.append(f"name is {values['name']!r}, and the file's own is {path.stem!r}; make them the same")
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}")
    return values


def wrong_keys(values: dict[str, Any], known: dict[str, type], prefix: str) -> list[str]:
    """Return what is wrong with the keys of a table, each with the nearest known one."""
    problems = []
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            problems.append(
                f"unknown key {prefix}{key}" + (f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}")
            )
        elif not isinstance(value, known[key]) or isinstance(value, bool):
            problems.append(f"{prefix}{key} is {value!r}; expected {known[key].__name__}")
        elif isinstance(value, list) and not all(isinstance(item, str) for item in value):
            problems.append(f"{prefix}{key} is {value!r}; expected a list of texts")
    return problems


def unknown(name: str, configs: Sequence[Path], data: Path) -> str:
    """Return the message for a concept of which nothing is known."""
    known = sorted({path.stem for folder in configs if folder.is_dir() for path in folder.glob("*.toml")})
    folders = sorted(path.name for path in data.iterdir() if path.is_dir()) if data.is_dir() else []
    close = difflib.get_close_matches(name, [*known, *folders], n=1)
    return (
        f"nothing is known of concept {name!r}{f'; did you mean {close[0]!r}?' if close else ''}. "
        f"Concept files: {', '.join(known) or 'none'}. Folders in {data}: {', '.join(folders) or 'none'}. "
        "For your own pictures give --instance_data_dir FOLDER and --instance_prompt 'a photo of NAME'"
    )
