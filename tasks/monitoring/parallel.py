"""Queries in parallel, with a deadline: a hanging server delays none of the others."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from runbook.errors import OpsError

T = TypeVar("T")
_asking: dict[str, threading.Thread] = {}


class _Answer(Generic[T]):
    def __init__(self, ask: Callable[[], T]) -> None:
        self._ask, self.found = ask, OpsError("it does not answer", "check whether its process hangs")
        self.value: list[T] = []

    def __call__(self) -> None:
        try:
            self.value.append(self._ask())
        except OpsError as error:
            self.found = error
        except Exception as error:  # any error is reported, and stops no other query
            self.found = OpsError(f"it cannot be read: {type(error).__name__}: {error}"[:300], "fix this error")


def query_in_parallel(questions: Mapping[str, Callable[[], T]], seconds: float) -> dict[str, T | OpsError]:
    """The answer to each query, or its error. A query that still runs is not sent again."""
    answers = {name: _Answer(ask) for name, ask in questions.items()}
    for name, answer in answers.items():
        if name in _asking and _asking[name].is_alive():
            continue
        thread = threading.Thread(target=contextvars.copy_context().run, args=(answer,), name=name, daemon=True)
        _asking[name] = thread
        thread.start()
    end = time.monotonic() + seconds
    for name in answers:
        _asking[name].join(max(end - time.monotonic(), 0.0))
    return {name: answer.value[0] if answer.value else answer.found for name, answer in answers.items()}
