"""What the subspace knows of one concept: its name, how it is called, what is kept of it, and its coefficients."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from share_diffusion.basis import Coefficients

KINDS = ("style", "subject")
NAME_LIMIT = 100
NAME_BYTES = 200  # file systems take names of 255, and ".patch.safetensors" is added
SHOWN = 12  # concepts that a message lists
FORBIDDEN = set("/\\:+*<>[]{}()|\"'`,;=#%\n\r\t\0")


def check_name(name: str) -> str:
    """Return the name, NFC-normalised, or raise ValueError with everything that is wrong with it."""
    name = unicodedata.normalize("NFC", name)
    problems = []
    if not name.strip() or name != name.strip():
        problems.append("it is empty or has spaces at an end")
    if name in (".", ".."):
        problems.append("it is a folder's name")
    if len(name) > NAME_LIMIT:
        problems.append(f"it has {len(name)} characters (at most {NAME_LIMIT})")
    elif (size := len(name.encode("utf-8", "surrogatepass"))) > NAME_BYTES:
        problems.append(f"it has {size} bytes in UTF-8 (at most {NAME_BYTES})")
    if bad := sorted({character for character in name if character in FORBIDDEN}):
        problems.append("it holds " + " ".join(repr(character) for character in bad))
    if hidden := [
        f"U+{ord(c):04X}" for c in name if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co") and c not in FORBIDDEN
    ]:
        problems.append("it holds invisible characters " + " ".join(hidden))
    if problems:
        raise ValueError(
            f"concept name {name!r}: {'; '.join(problems)}; use letters, digits, '-', '_' and spaces, for example 'my-cat'"
        )
    return name


def unknown_concept(name: str, known: Iterable[str], holder: str = "the subspace") -> str:
    """Return the message for a name that is not held: the nearest one, and some of those that are."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    listed = f"{', '.join(names[:SHOWN]) or 'none yet'}{more}"
    return f"unknown concept {name!r}{f', did you mean {close[0]!r}?' if close else ''}; {holder} holds: {listed}"


@dataclass(frozen=True, eq=False)
class Concept:
    """One thing learned.

    `norm` is ||dW||_F of the whole original update, `retention` the share of its energy that is certainly still held,
    `coefficients` the layers it changes; `details` are further facts (preview prompts, steps, ...) that travel with it.
    """

    name: str
    coefficients: Mapping[str, Coefficients]
    norm: float
    retention: float = 1.0
    kind: str = "style"
    trigger: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", check_name(self.name))
        if self.kind not in KINDS:
            raise ValueError(f"concept {self.name!r}: kind is {self.kind!r}; it is one of {', '.join(KINDS)}")

    @property
    def pseudo_rank(self) -> int:
        """The largest rank among the concept's layers."""
        return max((entry.pseudo_rank for entry in self.coefficients.values()), default=0)

    @property
    def half_weight(self) -> float | None:
        """The weight at which the concept has half of its effect, where that was measured (see `loudness.py`)."""
        value = self.details.get("half_weight")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
            return None
        return float(value)

    @property
    def numbers(self) -> int:
        """How many coefficients the concept costs."""
        return sum(entry.alpha.numel() + entry.beta.numel() for entry in self.coefficients.values())
