"""Captions as token ids, for every text encoder of a base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from share_diffusion.models.family import Family, Reader


def tokenize(family: Family, pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
    """Return token ids (n, L) by text encoder, padded and cut to what it takes."""
    return {component: token_ids(reader, captions) for component, reader in family.readers(pipeline).items()}


def token_ids(reader: Reader, captions: Sequence[str]) -> Tensor:
    """Return one text encoder's token ids (n, L)."""
    return reader.tokenizer(
        list(captions), padding="max_length", truncation=True, max_length=reader.length, return_tensors="pt"
    ).input_ids


def too_long(family: Family, pipeline: Any, captions: Sequence[str]) -> list[str]:
    """Return the captions that no text encoder of the base reads to their end."""
    readers = list(family.readers(pipeline).values())
    return [text for text in captions if all(len(one.tokenizer(text).input_ids) > one.length for one in readers)]
