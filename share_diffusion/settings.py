"""Command-line flags from one frozen dataclass: types from its annotations, words from its fields' metadata.

A script states its settings once, as a dataclass whose fields are made by `flag(...)`; `parse` turns them into flags,
reads `--config run.toml` beneath the flags given by hand, accepts the other trainers' spellings as aliases, and answers
an unknown flag or key with the nearest known one.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Settings = TypeVar("Settings")


def flag(
    default: Any,
    text: str,
    *,
    choices: Sequence[str] | None = None,
    aliases: Sequence[str] = (),
    read: Callable[[str], Any] | None = None,
) -> Any:
    """Return a dataclass field with its help text, legal values, other spellings and how its text is read."""
    facts = {"help": text, "choices": choices, "aliases": tuple(aliases), "read": read}
    return dataclasses.field(default=default, metadata=facts)


def side(text: str) -> int:
    """Return the side of square pictures, from 512 or kohya's 512,512."""
    sides = {int(part) for part in text.replace("x", ",").split(",")}
    if len(sides) != 1:
        raise argparse.ArgumentTypeError(f"{text} is not square; give one number, and --use_aspect_ratio_buckets")
    return sides.pop()


class _Parser(argparse.ArgumentParser):
    """Exits with one line that names the value, what is legal and the nearest flag."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n(--help lists every flag)\n")


def _plain_type(annotation: Any) -> tuple[type, bool]:
    """Return (element type, is it a list) of an annotation such as `int | None` or `tuple[str, ...]`."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
    if typing.get_origin(annotation) is tuple:
        return typing.get_args(annotation)[0], True
    return annotation, False


def _build(settings: type, prog: str | None, description: str | None) -> _Parser:
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="a TOML file of these flags; flags given by hand win over it")
    hints = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        kind, many = _plain_type(hints[field.name])
        names = [f"--{name}" for name in (field.name, *field.metadata["aliases"])]
        shown = "" if field.default in (None, ()) else f" (default: {field.default})"
        text = (field.metadata["help"] + shown).replace("%", "%%")
        common: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": text}
        if kind is bool:
            parser.add_argument(*names, action=argparse.BooleanOptionalAction, **common)
        else:
            parser.add_argument(
                *names,
                type=field.metadata.get("read") or kind,
                choices=field.metadata["choices"],
                nargs="+" if many else None,
                metavar="VALUE",
                **common,
            )
    return parser


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""


def _read_config(path: str, parser: _Parser) -> list[str]:
    """Return the TOML file's keys as flags, so that they pass through the same checks as flags given by hand."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        parser.error(f"--config {path}: {error.strerror or error}; give the path of a TOML file")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        parser.error(f"--config {path}: not TOML: {error}")
    words: list[str] = []
    for key, value in values.items():
        if isinstance(value, bool):
            words.append(f"--{key}" if value else f"--no-{key}")
        elif key == "config":
            parser.error(f"--config {path}: a file of flags names no further one; copy its flags here")
        elif isinstance(value, list):
            action = parser._option_string_actions.get(f"--{key}")
            many = action is None or action.nargs == "+"
            words += [f"--{key}", *map(str, value)] if many else [f"--{key}={','.join(map(str, value))}"]
        else:
            words += [f"--{key}={value}"]
    return words


def spell(settings: Any) -> list[str]:
    """Return settings as the flags that give them, for another process."""
    words: list[str] = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, bool):
            words.append(f"--{field.name}" if value else f"--no-{field.name}")
        elif isinstance(value, tuple):
            words += [f"--{field.name}", *map(str, value)] if value else []
        elif value is not None:
            words.append(f"--{field.name}={value}")
    return words


def parse(
    settings: type[Settings],
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    description: str | None = None,
    elsewhere: Mapping[str, str] = types.MappingProxyType({}),
) -> Settings:
    """Read flags into the dataclass; exits with status 2 and one message when anything is wrong.

    `elsewhere` says what to do in place of flags that only other programs have.
    """
    parser = _build(settings, prog, description)
    words = list(sys.argv[1:] if argv is None else argv)
    config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config.add_argument("--config", action="append", default=[])
    paths = config.parse_known_args(words)[0].config
    if len(paths) > 1:
        parser.error(f"--config is given {len(paths)} times ({', '.join(paths)}); give one file, and further flags by hand")
    if paths:
        words = _read_config(paths[0], parser) + words
    values, unknown = parser.parse_known_args(words)
    if unknown:
        known = [name for action in parser._actions for name in action.option_strings]
        wrong = [word for word in unknown if word.startswith("-")] or unknown
        names = [word.split("=")[0] for word in wrong]
        parser.error(
            "; ".join(
                f"{name}: {elsewhere[name[2:]]}" if name[2:] in elsewhere else f"unknown {name}{_nearest(name, known)}"
                for name in names
            )
        )
    chosen = {
        name: tuple(value) if isinstance(value, list) else value for name, value in vars(values).items() if name != "config"
    }
    return settings(**chosen)
