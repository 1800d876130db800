"""A record on this host's disk of a drill that has begun and not ended."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from runbook.files import record

FILE = "drill-half-done"


@dataclass(frozen=True)
class UnfinishedDrill:
    """The scenario, its begin, its process, the directory of its ledgers, and a note before each step."""

    scenario: str
    started: str
    run: str
    ledgers: str
    notes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def now(cls, scenario: str, ledgers: Path) -> UnfinishedDrill:
        """A drill of this process that begins now."""
        started = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(scenario, started, f"process {os.getpid()}", str(ledgers))

    @property
    def text(self) -> str:
        """`SCENARIO, begun TIME by PROCESS; its last note: …`."""
        return f"{self.scenario}, begun {self.started} by {self.run}; its last note: {self.last or 'none'}"

    @property
    def last(self) -> str:
        """The last note: `what: detail`."""
        return ": ".join(list(self.notes.items())[-1]) if self.notes else ""

    def noted(self, directory: Path, **facts: str) -> UnfinishedDrill:
        """Add notes, and write them to disk.

        Raises:
            OpsError: they cannot be written. Nothing may be broken then.
        """
        new = replace(self, notes={**self.notes, **facts})
        record.write(_path(directory), new)
        return new


def find(directory: Path) -> UnfinishedDrill | None:
    """The drill that did not end, if there is one.

    Raises:
        OpsError: the record is damaged.
    """
    hint = "heal the system by hand (postgres-failover, rejoin-standby, full-restore), then delete the file"
    return record.read(_path(directory), UnfinishedDrill, hint)


def forget(directory: Path) -> None:
    """Delete the record: the drill has ended."""
    _path(directory).unlink(missing_ok=True)


def _path(directory: Path) -> Path:
    # Not *.json: those are the reports of the chain.
    return directory / f".{FILE}"
