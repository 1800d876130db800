"""A drill that has broken something and has not ended: on the disk of this host, until it has."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from runbook.files import record

FILE = "drill-half-done"


@dataclass(frozen=True)
class HalfDone:
    """Which scenario, begun when, by whom, where its ledgers are; and what it noted before each step."""

    scenario: str
    started: str
    run: str
    ledgers: str
    notes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def now(cls, scenario: str, ledgers: Path) -> HalfDone:
        """By this process."""
        started = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(scenario, started, f"process {os.getpid()}", str(ledgers))

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
        record.write(_path(directory), new)
        return new


def find(directory: Path) -> HalfDone | None:
    """What a drill that did not end has left.

    Raises:
        OpsError: its record is damaged.
    """
    hint = "look at the system, heal it by hand (postgres-failover, rejoin-standby, full-restore), then remove the file"
    return record.read(_path(directory), HalfDone, hint)


def forget(directory: Path) -> None:
    """It has ended."""
    _path(directory).unlink(missing_ok=True)


def _path(directory: Path) -> Path:
    # Not *.json: those are the reports of the chain.
    return directory / f".{FILE}"
