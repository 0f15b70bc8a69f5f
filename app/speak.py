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
MARKUP = re.compile(r"([\\`*_\[\]()!#|~])")
log = logging.getLogger("app")


def plain(text: str) -> str:
    """Return a message with every absolute path cut down to its last part."""
    return PATH.sub(lambda match: match[1] or "…", text)


def shown(text: str) -> str:
    """Return a message safe for a notice, which Gradio renders as HTML and Markdown."""
    return html.escape(MARKUP.sub(r"\\\1", plain(text)), quote=False).replace("\n", "<br>")


def told(error: BaseException) -> gr.Error:
    """Return what is shown for an error: its own message if a person can mend it, else a word and a line in the log."""
    if isinstance(error, ValueError):
        return gr.Error(html.escape(plain(str(error)), quote=False), title=WORDS.not_done, print_exception=False)
    log.error("unexpected error", exc_info=error)
    return gr.Error(WORDS.unexpected, title=WORDS.not_done, print_exception=False)


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
