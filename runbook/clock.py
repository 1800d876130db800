"""The time of day, for everything that judges ages or dates what it makes: one function, which a test can replace."""

from __future__ import annotations

from datetime import UTC, datetime

MOST_SKEW_SECONDS = 60.0
"""By more than this no clock may differ from this host's where something is deleted by its age."""


def now() -> datetime:
    """This moment, in UTC. Call it as `clock.now()`: a simulation advances the clock by replacing this function."""
    return datetime.now(UTC)


def of_host() -> datetime:
    """This host's own clock, also in a simulation: for comparing it with another host's."""
    return datetime.now(UTC)
