"""How a blend is written, and the one reader of it; what `str(blend)` prints comes back as the same blend.

    blend    = [ term { "+" term } [ "|" method { key "=" number } ] ]
    term     = name [ ":" weight ] { "[" option { " " option } "]" }
    name     = anything but  : + " [ ] | < >   (or anything but " in double quotes)
    option   = "blocks=" group [ ":" factor ] { "," group [ ":" factor ] }     groups: all text down mid up early late down.1
             | "steps=" start ".." end                                         fractions of the denoising
             | "ramp=" both | "ramp=" in "," out
             | "region=" place | "region=" x0 "," y0 "," x1 "," y1 | "region=@" mask
             | "soft=" width | "during=" start ".." end

A prompt may carry blends as tags, `<share:watercolor:0.8[steps=0..0.5]>`, and as people type them elsewhere,
`<lora:watercolor:0.8>` (or with two weights, text encoder first).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NoReturn

from share_diffusion.blend import GROUPS, METHODS, PLACES, Blend, Method, Region, Steps, Term, is_group

NAME = re.compile(r'\s*(?:"(?P<quoted>[^"]+)"|(?P<plain>[^\s:+"\[\]|<>](?:[^:+"\[\]|<>]*[^\s:+"\[\]|<>])?))\s*')
WEIGHT = re.compile(r":\s*(?P<weight>[+-]?(?:[^\s+:\[\]|<>]|(?<=[eE])\+(?=\d))*)\s*")
OPTION = re.compile(r"\s*(?P<key>[a-z]+)\s*=\s*(?P<value>[^\s\[\]=]*)(?=[\s\]])\s*")
SPAN = re.compile(r"(.+?)\.\.(.+)")
SETTING = re.compile(r"\s*(?P<key>[a-z]+)\s*=\s*(?P<value>[^\s=]*)\s*")
WORD = re.compile(r"\s*(?P<word>[^\s=]*)\s*")
TAG = re.compile(r"<(?P<kind>share|lora):", re.IGNORECASE)
KEYS = ("blocks", "steps", "ramp", "region", "soft", "during")
Found = dict[str, tuple[str, int]]  # option -> (value as written, where)


def read_blend(text: str) -> Blend:
    """Read a whole blend; an empty text is the untouched base."""
    return Reader(text).blend() if text.strip() else Blend()


def read_prompt(prompt: str) -> tuple[str, Blend]:
    """Return a prompt without its tags, and the blend that they make."""
    terms: list[tuple[Term, int]] = []
    clean, position = "", 0
    while match := TAG.search(prompt, position):
        reader = Reader(prompt, match.end())
        terms.append((reader.tag(match["kind"].lower()), match.end()))
        clean = joined(clean, prompt[position : match.start()])
        position = reader.position
    return (joined(clean, prompt[position:]).strip() if terms else prompt), Reader(prompt).gathered(terms)


def tags(blend: Blend) -> str:
    """Return the blend as tags for a prompt; a method has no tag."""
    return " ".join(f"<share:{term}>" for term in blend.terms)


def joined(before: str, after: str) -> str:
    """Return two parts of a prompt with the gap that a tag leaves closed."""
    if not before or not after:
        return before + after
    if after.lstrip()[:1] in (",", ".", ";"):
        return before.rstrip() + after.lstrip()
    return f"{before.rstrip()} {after.lstrip()}" if before[-1].isspace() and after[0].isspace() else before + after


def pointed(text: str, position: int, problem: str) -> str:
    """Return a message with the text and a mark under the character it is about."""
    return f"blend: {problem}\n  {text}\n  {' ' * position}^"


class Reader:
    """Reads from a position of a text onwards; whatever is wrong is a ValueError that points at its character."""

    def __init__(self, text: str, position: int = 0) -> None:
        self.text, self.position = text, position

    def fail(self, problem: str, position: int) -> NoReturn:
        """Refuse the text at a position."""
        raise ValueError(pointed(self.text, position, problem)) from None

    def next(self) -> str:
        """Return the character that comes next, or nothing at the end."""
        return self.text[self.position : self.position + 1]

    def blend(self) -> Blend:
        """Read terms and a method up to the end of the text."""
        terms, method = [self.term()], None
        while self.next() == "+":
            self.position += 1
            terms.append(self.term())
        if self.next() == "|":
            self.position += 1
            method = self.method()
        elif self.next():
            self.fail(f"expected '+' between {terms[-1][0].name!r} and the next concept", self.position)
        return self.gathered(terms, method)

    def gathered(self, terms: list[tuple[Term, int]], method: Method | None = None) -> Blend:
        """Return the blend of terms with their positions."""
        seen = set()
        for term, position in terms:
            if (term.name, term.options) in seen:
                self.fail(f"concept {term.name!r} is named twice; give it one weight", position)
            seen.add((term.name, term.options))
        return Blend([term for term, _ in terms], method)

    def term(self) -> tuple[Term, int]:
        """Read one term and return it with its position."""
        match = NAME.match(self.text, self.position)
        if match is None:
            start = len(self.text) - len(self.text[self.position :].lstrip())
            self.fail("expected a concept, as in 'watercolor:0.8 + robot:0.5'", start)
        name, start, weight = (match["quoted"] or match["plain"]).strip(), match.start(match.lastgroup or 0), 1.0
        if not name:
            self.fail("expected a concept, as in 'watercolor:0.8 + robot:0.5'", start)
        self.position = match.end()
        if found := WEIGHT.match(self.text, self.position):
            weight = self.number(found["weight"], found.start("weight"), f"weight {found['weight']!r} of {name!r}")
            self.position = found.end()
        return Term(name, weight, *self.options()), start

    def options(self) -> tuple[tuple[tuple[str, float], ...] | None, Steps | None, Region | None]:
        """Read every bracket after a term."""
        found: Found = {}
        while self.next() == "[":
            opened = self.position
            self.position += 1
            while match := OPTION.match(self.text, self.position):
                if match["key"] not in KEYS:
                    self.fail(f"unknown option {match['key']!r}; there are {', '.join(KEYS)}", match.start("key"))
                if match["key"] in found:
                    self.fail(f"option {match['key']!r} is given twice", match.start("key"))
                found[match["key"]] = match["value"], match.start("value")
                self.position = match.end()
            if self.next() != "]" or self.text[opened + 1 : self.position].strip() == "":
                self.fail("expected an option and ']', as in [blocks=down,mid], [steps=0.2..1] or [region=left]", self.position)
            self.position += 1
            self.position += len(self.text[self.position :]) - len(self.text[self.position :].lstrip())
        return self.blocks(found), self.steps(found), self.region(found)

    def blocks(self, found: Found) -> tuple[tuple[str, float], ...] | None:
        """Return the factors of the option `blocks`."""
        if "blocks" not in found:
            return None
        text, position = found["blocks"]
        factors: dict[str, float] = {}
        for part in text.split(","):
            group, colon, factor = part.partition(":")
            if not is_group(group):
                self.fail(f"unknown block group {group!r}; there are {', '.join(GROUPS)}, and down.1 and the like", position)
            if group in factors:
                self.fail(f"block group {group!r} is named twice", position)
            where = position + len(group) + 1
            factors[group] = self.number(factor, where, f"factor {factor!r} of {group!r}") if colon else 1.0
            position += len(part) + 1
        return tuple(factors.items())

    def steps(self, found: Found) -> Steps | None:
        """Return the schedule of the options `steps` and `ramp`."""
        if "steps" not in found and "ramp" not in found:
            return None
        start, end = self.span(found["steps"], "steps") if "steps" in found else (0.0, 1.0)
        ramp = self.numbers(found["ramp"], "ramp", (1, 2)) if "ramp" in found else [0.0]
        position = found.get("ramp" if "steps" not in found else "steps", ("", 0))[1]
        return self.made(lambda: Steps(start, end, ramp[0], ramp[-1]), position)

    def region(self, found: Found) -> Region | None:
        """Return the region of the options `region`, `soft` and `during`."""
        for key in ("soft", "during"):
            if key in found and "region" not in found:
                self.fail(f"option {key!r} belongs to a region; give [region=...] as well", found[key][1])
        if "region" not in found:
            return None
        text, position = found["region"]
        box = mask = None
        if text.startswith("@"):
            mask = text[1:]
        elif text in PLACES:
            box = PLACES[text]
        elif "," in text:
            box = tuple(self.numbers(found["region"], "region", (4,)))
        else:
            self.fail(f"unknown region {text!r}; it is one of {', '.join(PLACES)}, a box 0,0,0.5,1 or a mask @name", position)
        soft = self.numbers(found["soft"], "soft", (1,))[0] if "soft" in found else 0.0
        start, end = self.span(found["during"], "during") if "during" in found else (0.0, 1.0)
        return self.made(lambda: Region(box, mask, soft, start, end), position)  # type: ignore[arg-type]

    def method(self) -> Method:
        """Read a method and its options, up to the end of the text."""
        match = WORD.match(self.text, self.position)
        assert match is not None
        name, start = match["word"], match.start("word")
        if name not in METHODS:
            self.fail(f"unknown method {name!r}; there are {', '.join(METHODS)}", start)
        self.position, options = match.end(), {}
        while self.next():
            found = SETTING.match(self.text, self.position)
            if found is None or found["key"] in options:
                self.fail(
                    f"expected an option of {name}, each once: {', '.join(METHODS[name]) or 'it has none'}", self.position
                )
            key, value = found["key"], found["value"]
            options[key] = self.number(value, found.start("value"), f"{key} {value!r} of {name}")
            self.position = found.end()
        return self.made(lambda: Method(name, tuple(options.items())), start)

    def tag(self, kind: str) -> Term:
        """Read a tag's inside, up to and with its '>'."""
        term, _ = self.term()
        if kind == "lora" and (second := WEIGHT.match(self.text, self.position)):
            unet = self.number(second["weight"], second.start("weight"), f"weight {second['weight']!r} of {term.name!r}")
            self.position = second.end()
            if unet != term.weight:
                term = Term(term.name, 1.0, (("all", unet), ("text", term.weight)))
        if self.next() != ">":
            self.fail(f"expected '>' at the end of the tag of {term.name!r}", self.position)
        self.position += 1
        return term

    def span(self, option: tuple[str, int], key: str) -> tuple[float, float]:
        """Return the two numbers of `0.2..1`."""
        text, position = option
        match = SPAN.fullmatch(text)
        if match is None:
            self.fail(f"{key} is {text!r}; write a start and an end, as in {key}=0.2..1", position)
        first, second = (self.number(match[n], position + match.start(n), f"{key} {match[n]!r}") for n in (1, 2))
        return first, second

    def numbers(self, option: tuple[str, int], key: str, counts: tuple[int, ...]) -> list[float]:
        """Return numbers separated by commas."""
        text, position = option
        values = []
        for part in text.split(","):
            values.append(self.number(part, position, f"{key} {part!r}"))
            position += len(part) + 1
        if len(values) not in counts:
            self.fail(f"{key} takes {' or '.join(map(str, counts))} numbers, not {len(values)}", option[1])
        return values

    def number(self, text: str, position: int, what: str) -> float:
        """Return a finite number."""
        try:
            value = float(text)
        except ValueError:
            self.fail(f"{what} is not a number", position)
        if not math.isfinite(value):
            self.fail(f"{what} is not finite", position)
        return value

    def made(self, make: Callable[[], Any], position: int) -> Any:
        """Return what is made of values that were read; what it refuses is pointed at."""
        try:
            return make()
        except ValueError as error:
            self.fail(str(error), position)
