"""A drill that has broken something and has not ended: on the disk of this host, until it has."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from runbook.files.marker import Marker


@dataclass(frozen=True, kw_only=True)
class HalfDone(Marker):
    """Which scenario, begun when, by whom, where its ledgers are; and what it noted before each step."""

    FILE = ".drill-half-done"  # not *.json: those are the reports of the chain
    HINT = "look at the system, heal it by hand (postgres-failover, rejoin-standby, full-restore), then remove the file"

    scenario: str
    ledgers: str
    notes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def now(cls, scenario: str, ledgers: Path) -> HalfDone:
        """By this process."""
        return cls(scenario=scenario, ledgers=str(ledgers))

    @property
    def told(self) -> str:
        """For people."""
        return f"{self.scenario}, begun {self.started} by {self.run}; its last note: {self.last or 'none'}"

    @property
    def last(self) -> str:
        """The last note: `what: detail`."""
        return ": ".join(list(self.notes.items())[-1]) if self.notes else ""

    def noted(self, directory: Path, **facts: str) -> HalfDone:
        """With more notes, on disk.

        Raises:
            OpsError: it cannot be written. Nothing may be broken then.
        """
        new = replace(self, notes={**self.notes, **facts})
        new.write(directory)
        return new


def find(directory: Path) -> HalfDone | None:
    """What a drill that did not end has left.

    Raises:
        OpsError: its record is damaged.
    """
    return HalfDone.find(directory)


def forget(directory: Path) -> None:
    """It has ended."""
    HalfDone.remove(directory)
