"""The time of day, for everything that judges ages or dates what it makes: one function, which a test can replace."""

from __future__ import annotations

from datetime import UTC, datetime


def now() -> datetime:
    """This moment, in UTC. Call it as `clock.now()`: a simulation advances the clock by replacing this function."""
    return datetime.now(UTC)
