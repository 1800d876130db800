"""When an alarm is raised, and when it clears. Pure functions, tested on any sequence.

Each change takes `Timing.samples` values in a row and `Timing.seconds`. Between the lower limit and the limit nothing
changes. A value that could not be measured counts as over the limit. The time between two values is at least 0 and at
most `Timing.most_seconds`: a clock that was set, or a watcher that was suspended, neither raises nor hides an alarm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

Change = Literal["exceeded", "recovered"]
LOWER = 0.9


@dataclass(frozen=True)
class AlarmBounds:
    """Exceeded above `limit`; recovered at `lower` or below."""

    limit: float
    lower: float

    @classmethod
    def below(cls, limit: float) -> AlarmBounds:
        """The lower limit at 90 %, so that a value at the limit does not flap."""
        return cls(limit, limit * LOWER)


@dataclass(frozen=True)
class Timing:
    """How long a value must stay on the other side of a limit until the state changes."""

    samples: int = 3
    seconds: float = 120.0
    most_seconds: float = 120.0


@dataclass(frozen=True)
class AlarmState:
    """The state of one metric: whether its alarm is active, since when, and how many values in a row (over how many
    seconds) are on the other side. `value` None: not measured, for the reason `told`."""

    exceeded: bool = False
    since: datetime | None = None
    at: datetime | None = None
    value: float | None = None
    told: str = ""
    against: int = 0
    against_seconds: float = 0.0

    @property
    def measured(self) -> bool:
        """Whether the newest value could be measured."""
        return self.value is not None


def step(
    before: AlarmState, value: float | None, told: str, now: datetime, bounds: AlarmBounds, timing: Timing
) -> tuple[AlarmState, Change | None]:
    """The state after one more value."""
    is_bad = value is None or not value <= bounds.limit  # NaN too
    is_well = value is not None and value <= bounds.lower
    seen = replace(before, at=now, value=value, told=told)
    if not (is_well if before.exceeded else is_bad):
        return replace(seen, against=0, against_seconds=0.0), None
    passed = (now - before.at).total_seconds() if before.at and before.against else 0.0
    against = before.against + 1
    seconds = before.against_seconds + min(max(passed, 0.0), timing.most_seconds)
    if against < timing.samples or seconds < timing.seconds:
        return replace(seen, against=against, against_seconds=seconds), None
    turned = replace(seen, exceeded=not before.exceeded, since=now, against=0, against_seconds=0.0)
    return turned, "exceeded" if turned.exceeded else "recovered"


def changes(
    values: Sequence[tuple[datetime, float | None]], bounds: AlarmBounds, timing: Timing
) -> list[tuple[int, Change]]:
    """The position of each change in a sequence."""
    standing, found = AlarmState(), []
    for number, (at, value) in enumerate(values):
        standing, change = step(standing, value, "", at, bounds, timing)
        if change:
            found.append((number, change))
    return found
