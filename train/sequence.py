"""Learn a list of concepts, one after another, into one subspace file.

    accelerate launch train/sequence.py --concepts watercolor blueprint robot

Concepts that the file already holds are passed over, and a concept that was interrupted goes on from its last
checkpoint: starting the same command again finishes what is left. Every flag of train/concept.py applies to each.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

from concept import ConceptSettings, learn, subspace_file

from share_diffusion.file import listing
from share_diffusion.settings import flag, parse


@dataclass(frozen=True)
class SequenceSettings(ConceptSettings):
    """Which concepts are learned, and how each of them is."""

    concepts: tuple[str, ...] = flag((), "the concepts, in order")


def held(file: Path) -> set[str]:
    """Return the names of the concepts that a file holds."""
    return {str(entry["name"]) for entry in listing(file).concepts} if file.exists() else set()


def learn_all(settings: SequenceSettings) -> list[str]:
    """Learn what is not held yet and return the names of the concepts learned now."""
    if not settings.concepts:
        raise ValueError("--concepts is missing; give names, as in --concepts watercolor blueprint robot")
    if twice := sorted({name for name in settings.concepts if settings.concepts.count(name) > 1}):
        raise ValueError(f"--concepts names {', '.join(twice)} more than once; each concept is learned once")
    common = {field.name: getattr(settings, field.name) for field in fields(ConceptSettings)}
    file = subspace_file(settings)
    todo = [name for name in settings.concepts if name not in held(file)]
    for name in settings.concepts:
        if name not in todo:
            print(f"{name}: already in {file}, passed over")
    for number, name in enumerate(todo, start=1):
        print(f"\n[{number} of {len(todo)}] {name}")
        one = ConceptSettings(**{**common, "concept": name, "instance_data_dir": None})
        learn(replace(one, resume_from_checkpoint=settings.resume_from_checkpoint or "auto"))
    return todo


def main(argv: list[str] | None = None) -> int:
    """Run from the command line."""
    settings = parse(SequenceSettings, argv, description="Learn a list of concepts into one subspace file.")
    try:
        learned = learn_all(settings)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; start the same command again to go on", file=sys.stderr)
        return 130
    print(f"\nlearned {len(learned)}: {', '.join(learned) or 'nothing was left to learn'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
