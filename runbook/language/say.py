"""`say(text)`: a text of the sources in the language of the run's environment; as it is where it has no translation."""

from __future__ import annotations

import functools
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
    return text if language == "en" else catalogue(language).translate(text, words=words)


@functools.cache
def catalogue(language: Language) -> Catalogue:
    """The messages of a language, read once."""
    return Catalogue(read(language))
