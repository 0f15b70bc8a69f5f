"""Concept cards: what a person sees of a concept, found by search and shown a page at a time.

A card's picture is drawn once, at a fixed seed, in the background, and kept on disk under a key of the bases' version and
the concept; ten thousand concepts cost no drawing until their cards are looked at.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from app.history import thumbnail

PAGE = 24
ALL = "all"


@dataclass(frozen=True)
class Card:
    """One concept as the page knows it; `weight` is the one it is added with, `prompts` are its own examples."""

    name: str
    kind: str
    trigger: str
    retention: float
    weight: float
    prompts: tuple[str, ...]
    key: str

    @property
    def example(self) -> str:
        """A prompt that shows the concept."""
        return self.prompts[0] if self.prompts else self.trigger


def card_of(concept: Any, basis_version: str) -> Card:
    """Return the card of a held concept."""
    details = concept.details
    prompts = tuple(str(text)[:500] for text in details.get("prompts") or () if isinstance(text, str))
    weight = details.get("weight", 1.0)
    weight = float(weight) if isinstance(weight, (int, float)) and -10 <= weight <= 10 else 1.0
    marks = repr((basis_version, concept.name, round(concept.norm, 6), round(concept.retention, 6), prompts[:1]))
    key = hashlib.sha256(marks.encode()).hexdigest()[:24]
    return Card(concept.name, concept.kind, concept.trigger or concept.name, concept.retention, weight, prompts, key)


def found(cards: Sequence[Card], query: str = "", kind: str = ALL) -> list[Card]:
    """Return the cards whose name or trigger holds every word of the query, those that begin with it first."""
    words = folded(query).split()
    chosen = [card for card in cards if kind in (ALL, card.kind) and all(word in spelled(card) for word in words)]
    return sorted(chosen, key=lambda card: not spelled(card).startswith(words[0])) if words else chosen


@lru_cache(maxsize=65_536)
def spelled(card: Card) -> str:
    """Return what a search looks at."""
    return folded(f"{card.name} {card.trigger}")


def folded(text: str) -> str:
    """Return a text without differences of case and spelling of accents."""
    return unicodedata.normalize("NFKC", text).casefold()


def page_of(cards: Sequence[Card], number: int, size: int = PAGE) -> tuple[list[Card], int, int]:
    """Return a page of cards, its number (0 is the first) within what there is, and the number of pages."""
    pages = max(1, -(-len(cards) // size))
    number = min(max(0, number), pages - 1)
    return list(cards[number * size : (number + 1) * size]), number, pages


class CardPictures:
    """The cards' pictures on disk; `read` gives a data address, or "" where none has been drawn yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, card: Card) -> Path:
        """Return where a card's picture is, or will be."""
        return self.folder / f"{card.key}.png"

    def read(self, card: Card) -> str:
        """Return a card's picture as a data address."""
        path = self.path(card)
        return read_picture(str(path)) if path.is_file() else ""

    def missing(self, cards: Sequence[Card]) -> list[Card]:
        """Return the cards that have no picture yet."""
        return [card for card in cards if not self.path(card).is_file()]


@lru_cache(maxsize=1024)
def read_picture(path: str) -> str:
    """Return a picture file as a data address, "" where it is damaged."""
    try:
        with Image.open(path) as image:
            return thumbnail(image)
    except (OSError, SyntaxError, ValueError):
        return ""


def tile(card: Card, picture: str, chosen: bool) -> dict[str, Any]:
    """Return what a tile shows of a card."""
    facts = f"{card.kind}, trigger {card.trigger}, {card.retention:.1%} kept, weight {card.weight:g}"
    return {"id": card.name, "title": card.name, "note": card.kind, "hint": facts, "picture": picture, "on": chosen}
