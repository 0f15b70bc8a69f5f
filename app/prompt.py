"""A concept's trigger in a prompt: put in when the concept is added, taken out when it goes."""

from __future__ import annotations

import re

from app.cards import Card


def holds(prompt: str, trigger: str) -> bool:
    """Tell whether a prompt has the trigger as whole words, in any case."""
    return bool(trigger) and word(trigger).search(prompt) is not None


def word(trigger: str) -> re.Pattern[str]:
    """Return what matches the trigger as whole words."""
    return re.compile(rf"(?<!\w){re.escape(trigger)}(?!\w)", re.IGNORECASE)


def with_trigger(prompt: str, card: Card) -> str:
    """Return the prompt with the concept's trigger: its own example where the prompt is empty, else a word at its edge."""
    if holds(prompt, card.trigger):
        return prompt
    if not prompt.strip():
        return card.example if holds(card.example, card.trigger) else card.trigger
    return f"{card.trigger}, {prompt}" if card.kind == "style" else f"{prompt}, {card.trigger}"


def without_trigger(prompt: str, trigger: str) -> str:
    """Return the prompt without the trigger and the comma that came with it."""
    if not trigger:
        return prompt
    cut = word(trigger).sub("\0", prompt)
    cut = re.sub(r"^\s*\0\s*,\s*|\s*,\s*\0(?=\s*(,|$))|\0\s?", "", cut)
    return re.sub(r"\s{2,}", " ", cut).strip()
