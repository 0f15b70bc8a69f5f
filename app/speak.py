"""Errors as people should see them: one plain message, no path of this machine, no trace, no markup."""

from __future__ import annotations

import functools
import html
import inspect
import logging
import re
from collections.abc import Callable
from typing import Any

import gradio as gr

from app.words import WORDS

PATH = re.compile(r"(?<![\w.])(?:[A-Za-z]:)?[/\\](?:[^\s/\\'\":;,()]+[/\\])+([^\s/\\'\":;,()]*)")
POINTED = re.compile(r"\n  (?P<text>.*)\n  (?P<gap> *)\^", re.DOTALL)  # as the blend's reader writes it
WIDTH = 48  # characters that a notice holds in one line
log = logging.getLogger("app")


def plain(text: str) -> str:
    """Return a message with every absolute path cut down to its last part, and what it points at in sight."""
    return PATH.sub(lambda match: match[1] or "…", POINTED.sub(narrowed, text))


def narrowed(match: re.Match[str]) -> str:
    """Return a text and the mark under its character, in one line of at most WIDTH characters."""
    text, place = re.sub(r"\s", " ", match["text"]), len(match["gap"])
    start = max(0, min(place - WIDTH // 2, len(text) - WIDTH + 1)) if len(text) >= WIDTH else 0
    before, after = "…" if start else "", "…" if start + WIDTH - 1 < len(text) else ""
    return f"\n  {before}{text[start : start + WIDTH - 1]}{after}\n  {' ' * (place - start + len(before))}^"


def said(error: BaseException) -> str:
    """Return what is said of an error: its own message if a person can mend it, else a word."""
    return plain(str(error)) if isinstance(error, ValueError) else WORDS.unexpected


def told(error: BaseException) -> gr.Error:
    """Return what is shown for an error; one that nobody at the page can mend goes into the log."""
    if not isinstance(error, ValueError):
        log.error("unexpected error", exc_info=error)
    return gr.Error(html.escape(said(error), quote=False), title=WORDS.not_done, print_exception=False)


def spoken(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return an event's function that shows errors instead of leaking them."""
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def generate(*arguments: Any, **named: Any) -> Any:
            try:
                yield from function(*arguments, **named)
            except gr.Error:
                raise
            except Exception as error:
                raise told(error) from None

        return generate

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except gr.Error:
            raise
        except Exception as error:
            raise told(error) from None

    return call
