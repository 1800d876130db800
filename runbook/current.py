"""The report of the run that this code works for."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

from runbook.report import Report

_current: contextvars.ContextVar[Report | None] = contextvars.ContextVar("report", default=None)


def current_report() -> Report | None:
    """The report of the run this code works for, also inside its steps' threads."""
    return _current.get()


@contextlib.contextmanager
def use_report(report: Report) -> Iterator[None]:
    """Make a report the current one."""
    token = _current.set(report)
    try:
        yield
    finally:
        _current.reset(token)
