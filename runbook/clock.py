"""The time of day, for everything that judges ages or dates what it makes: one function, which a test can replace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime, tzinfo
from typing import Literal

MOST_SKEW_SECONDS = 60.0
"""By more than this no clock may differ from this host's where something is deleted by its age."""


def now() -> datetime:
    """This moment, in UTC. Call it as `clock.now()`: a simulation advances the clock by replacing this function."""
    return datetime.now(UTC)


def of_host() -> datetime:
    """This host's own clock, also in a simulation: for comparing it with another host's."""
    return datetime.now(UTC)


Precision = Literal["minutes", "seconds", "milliseconds", "microseconds"]
_zone = ContextVar[tzinfo]("zone", default=UTC)


@contextmanager
def use_zone(zone: tzinfo) -> Iterator[None]:
    """Show times in this zone: a run's report has one zone, the environment's."""
    token = _zone.set(zone)
    try:
        yield
    finally:
        _zone.reset(token)


def text(at: datetime, precision: Precision = "seconds") -> str:
    """A moment with its offset, in the zone of the run: `2026-11-29 01:14:51 +09:00`."""
    shown = at.astimezone(_zone.get())
    offset = shown.isoformat()[-6:]
    return f"{shown.replace(tzinfo=None).isoformat(' ', precision)} {offset}"


def short(at: datetime) -> str:
    """A moment in a headline, to the minute: `01:59 (+09:00)`, with its date if that is not today."""
    shown, today = at.astimezone(_zone.get()), now().astimezone(_zone.get()).date()
    date = "" if shown.date() == today else f"{shown:%Y-%m-%d} "
    return f"{date}{shown:%H:%M} ({shown.isoformat()[-6:]})"


def time_of_day(at: datetime, precision: Precision = "seconds") -> str:
    """`01:14:51`, in the zone of the run: for a column with `heading`."""
    return at.astimezone(_zone.get()).time().isoformat(precision)


def heading(what: str) -> str:
    """A column of times of day, with the zone's offset now: `started (+09:00)`."""
    return f"{what} ({now().astimezone(_zone.get()).isoformat()[-6:]})"
