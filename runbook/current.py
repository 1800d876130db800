"""The report of the run that this code works for."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

from runbook.report import Report

_current: contextvars.ContextVar[Report | None] = contextvars.ContextVar("report", default=None)
_prefix: contextvars.ContextVar[str] = contextvars.ContextVar("prefix", default="")


def current_report() -> Report | None:
    """The report of the run this code works for, also inside its steps' threads."""
    return _current.get()


def artifact_key(key: str) -> str:
    """The key under which an artifact is published: `full-restore`, or `drill-control-full-restore` in a control."""
    return _prefix.get() + key


@contextlib.contextmanager
def published_under(prefix: str) -> Iterator[None]:
    """Publish artifacts under their keys with a prefix. Somebody who opens the newest report of a runbook must not see
    a failure that a drill provoked."""
    token = _prefix.set(prefix)
    try:
        yield
    finally:
        _prefix.reset(token)


def leaves(what: str, removed_by: str) -> None:
    """Note what the run is about to create or stop, and who removes it should the run end before that."""
    if report := _current.get():
        report.journal.leave(what, removed_by)


def removed(what: str) -> None:
    """Note that it is removed, or started again."""
    if report := _current.get():
        report.journal.remove(what)


@contextlib.contextmanager
def use_report(report: Report) -> Iterator[None]:
    """Make a report the current one."""
    token = _current.set(report)
    try:
        yield
    finally:
        _current.reset(token)
