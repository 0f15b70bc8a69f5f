"""What the text encoder is told of a picture at a step: its caption, now and then shuffled or left out.

Everything random is a pure function of (seed, step, place in the batch), so that a resumed run says the same words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from share_diffusion.objective import step_generator

OFFSET = 104_729  # keeps these draws apart from those of times and noise


@dataclass(frozen=True)
class Variation:
    """How captions vary: the share left out, and of the tags behind the first `keep`: shuffled or not, the share dropped."""

    dropout: float = 0.0
    shuffle: bool = False
    keep: int = 1
    tag_dropout: float = 0.0

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value}; it is a share from 0 to 1"
            for name, value in (("caption_dropout_rate", self.dropout), ("caption_tag_dropout_rate", self.tag_dropout))
            if not 0 <= value <= 1
        ]
        if self.keep < 0:
            problems.append(f"keep_tokens is {self.keep}; it is 0 or more")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def any(self) -> bool:
        """Whether captions vary at all."""
        return self.dropout > 0 or self.shuffle or self.tag_dropout > 0

    def apply(self, captions: Sequence[str], seed: int, step: int) -> tuple[str, ...]:
        """Return the captions of a step's batch as they are told."""
        generator = step_generator(seed + OFFSET, step)
        return tuple(self.one(caption, generator) for caption in captions)

    def one(self, caption: str, generator: torch.Generator) -> str:
        """Return one caption, varied; takes the same number of draws whatever comes out."""
        left_out = float(torch.rand(1, generator=generator)) < self.dropout
        tags = [tag.strip() for tag in caption.split(",")]
        head, rest = tags[: self.keep], tags[self.keep :]
        order = torch.randperm(len(rest), generator=generator).tolist()
        chances = torch.rand(len(rest), generator=generator).tolist()
        kept = [place for place in (order if self.shuffle else range(len(rest))) if chances[place] >= self.tag_dropout]
        if left_out:
            return ""
        if not self.shuffle and len(kept) == len(rest):
            return caption
        return ", ".join([*head, *(rest[place] for place in kept)])


def without_trigger(caption: str, trigger: str) -> str:
    """Return a caption as it would read had the concept never been learned."""
    plain = re.sub(rf"(?<!\w){re.escape(trigger)}(?!\w)", " ", caption, flags=re.IGNORECASE) if trigger else caption
    return " ".join(plain.split()).strip(" ,")
