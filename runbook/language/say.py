"""`say(text)`: a text of the sources in the language of the run's environment; as it is where it has no translation."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

from runbook.language.catalogue import Catalogue, read

Language = Literal["en", "ja"]

_language = ContextVar[Language]("language", default="en")


@contextmanager
def use_language(language: Language) -> Iterator[None]:
    """Show texts in this language: a run's report has one, the environment's."""
    token = _language.set(language)
    try:
        yield
    finally:
        _language.reset(token)


def say(text: str) -> str:
    """A finding, a hint, a clause: translated, with the values in it. A single word stays: it may be a name."""
    return _translated(text, words=False)


def label(text: str) -> str:
    """The name of a finding, a fact, a step or a column: also if it is one word."""
    return _translated(text, words=True)


def _translated(text: str, *, words: bool) -> str:
    language = _language.get()
    if language == "en":
        return text
    try:
        return catalogue(language).translate(text, words=words)
    except Exception as error:  # an English report is better than none
        _warn(language, f"{type(error).__name__}: {error}")
        return text


@functools.cache
def _warn(language: Language, problem: str) -> None:
    """Once for each problem: a report has hundreds of texts."""
    logging.getLogger("ops").warning("a text is not shown in the language %s: %s", language, problem)


@functools.cache
def catalogue(language: Language) -> Catalogue:
    """The messages of a language, read once. Without them every text stays English."""
    try:
        return Catalogue(read(language))
    except Exception as error:
        _warn(language, f"{type(error).__name__}: {error}")
        return Catalogue({})
