"""The loss of a change that replaces live data: one value, and the only place that puts it into words.

A loss is known only where everything that took writes was read. What could not be read makes it unknown, never zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from runbook import clock
from runbook.units import counted, rounded


@dataclass(frozen=True)
class Loss:
    """What one part loses.

    `part`: its name ("app_db", "Redis", "the files"). `count`: lost `unit`s; None: not counted. `since`: everything
    written after it is lost; `at_most`: not all of that need be. `unknown`: why neither is known. Without these three,
    nothing can be restored. `first`, `last`: the times of the first and the last lost one; `by`: how many, by database.
    `as_of`: when a plan counted, by the WAL up to the LSN `read_to`; what is written later is lost too. `later`: how
    many of them were written after the plan.
    """

    part: str = "the data"
    count: int | None = 0
    unit: str = "commit"
    since: datetime | None = None
    unknown: str = ""
    first: datetime | None = None
    last: datetime | None = None
    by: Mapping[str, int] = field(default_factory=dict)
    as_of: datetime | None = None
    read_to: int = 0
    later: int = 0
    at_most: bool = False

    @classmethod
    def at_most_since(cls, part: str, moment: datetime) -> Loss:
        """No write of before `moment`, and perhaps not all later ones either."""
        return cls(part, None, since=moment, at_most=True)

    @classmethod
    def everything_since(cls, part: str, moment: datetime, count: int | None = None, unit: str = "commit") -> Loss:
        """All writes after `moment`, the time of a backup; `count`: how many that are, if they were counted."""
        return cls(part, count, unit, since=moment)

    @classmethod
    def not_known(cls, part: str, why: str) -> Loss:
        """A loss that nobody could measure, and why."""
        return cls(part, None, unknown=why)

    @classmethod
    def everything(cls, part: str) -> Loss:
        """Nothing of a part can be restored."""
        return cls(part, None)

    @classmethod
    def from_json(cls, filed: Mapping[str, Any]) -> Loss:
        """A loss of an earlier JSON report.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        since = datetime.fromisoformat(filed["since"]) if filed["since"] else None
        at_most = bool(filed.get("at_most"))
        return cls(filed["part"], filed["count"], filed["unit"], since, filed["unknown"], at_most=at_most)

    @property
    def is_none(self) -> bool:
        """Whether nothing is lost, and that is known."""
        return not self.unknown and self.since is None and self.count == 0 and self.as_of is None

    @property
    def is_everything(self) -> bool:
        """Whether nothing can be restored."""
        return not self.unknown and self.since is None and self.count is None

    @property
    def text(self) -> str:
        """The loss as a clause."""
        if self.unknown:
            return f"the loss of {self.part} is unknown, because {self.unknown}"
        if self.since is not None:
            age = rounded(max((clock.now() - self.since).total_seconds(), 0))
            if self.at_most:
                return f"at most the writes of {self.part} of the last {age} are lost"
            if self.count is not None and self.as_of:
                number, now = counted(self.count, self.unit), clock.text(self.as_of)
                return f"writes of {self.part} of the last {age} are lost: {number} as of {now}; later writes are added"
            if self.count is not None:
                return f"writes of {self.part} of the last {age} are lost: {counted(self.count, self.unit)}"
            return f"writes of {self.part} of the last {age} are lost"
        if self.is_everything:
            return f"everything of {self.part} is lost"
        if not self.count and self.as_of is None:
            return f"nothing of {self.part} is lost"
        return (
            f"{self._counted} as of {clock.text(self.as_of)}; later writes are added" if self.as_of else self._counted
        )

    @property
    def detail(self) -> str:
        """The loss as a clause of a report that says when: `every write of app_db after 2026-11-29 01:14:51 +09:00`."""
        if self.unknown or self.since is None:
            return self.text
        if self.at_most:
            return f"at most the writes of {self.part} after {clock.text(self.since)} are lost"
        if self.count is not None:
            number = counted(self.count, self.unit)
            return f"every write of {self.part} after {clock.text(self.since)} is lost: {number}"
        return f"every write of {self.part} after {clock.text(self.since)} is lost"

    @property
    def _counted(self) -> str:
        number, s = counted(self.count or 0, self.unit), "is" if self.count == 1 else "are"
        if not (self.first and self.last):
            return f"{number} of {self.part} {s} lost"
        first, last = clock.text(self.first), clock.text(self.last)
        if len(self.by) < 2:
            return f"{number} of {self.part} {s} lost ({first} to {last})"
        databases = ", ".join(f"{name} {times:,}" for name, times in self.by.items())
        return f"{number} of {self.part} {s} lost ({first} to {last}; {databases})"

    def as_json(self) -> dict[str, object]:
        """The loss in a JSON report. `count` null: not counted."""
        since = self.since.isoformat() if self.since else None
        known = {"part": self.part, "count": self.count, "unit": self.unit, "since": since, "unknown": self.unknown}
        return {**known, "at_most": self.at_most, "text": self.text}

    def is_within(self, confirmed: Loss) -> bool:
        """Whether a person who confirmed that loss has confirmed this one too."""
        if confirmed.unknown or confirmed.is_everything:
            return True
        if self.unknown or self.is_everything:
            return False
        if confirmed.since is not None:
            return self.since is None or self.since >= confirmed.since
        if self.since is not None or self.count is None:
            return False
        added = self.later if confirmed.as_of is not None else 0
        return self.count - added <= (confirmed.count or 0)


def losses_text(losses: Sequence[Loss], *, detailed: bool = False) -> str:
    """The losses of all parts as a clause: those that lose nothing are left out."""
    found = [loss for loss in losses if not loss.is_none]
    return "; ".join(loss.detail if detailed else loss.text for loss in found) or "nothing is lost"


def exceeded(confirmed: Sequence[Loss], found: Sequence[Loss]) -> list[Loss]:
    """Those of the measured losses that go beyond what was confirmed for their part."""
    planned = {loss.part: loss for loss in confirmed}
    return [loss for loss in found if not loss.is_within(planned.get(loss.part, Loss(loss.part)))]
