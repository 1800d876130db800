"""A record on this host's disk of a drill that has begun and not ended."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from runbook.files.marker import Marker


@dataclass(frozen=True, kw_only=True)
class UnfinishedDrill(Marker):
    """The scenario, its begin, its process, the directory of its ledgers, and a note before each step."""

    FILE = ".drill-half-done"  # not *.json: those are the reports of the chain
    HINT = "heal the system by hand (postgres-failover, rejoin-standby, full-restore), then delete the file"

    scenario: str
    ledgers: str
    notes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def now(cls, scenario: str, ledgers: Path) -> UnfinishedDrill:
        """A drill of this process that begins now."""
        return cls(scenario=scenario, ledgers=str(ledgers))

    @property
    def text(self) -> str:
        """`SCENARIO, begun TIME by PROCESS; its last note: …`."""
        return f"{self.scenario}, begun {self.started} by {self.run}; its last note: {self.last or 'none'}"

    @property
    def broken(self) -> list[str]:
        """The targets of its faults."""
        return list(filter(None, self.notes.get("breaks", "").split(" | ")))

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
        new.write(directory)
        return new


def find(directory: Path) -> UnfinishedDrill | None:
    """The drill that did not end, if there is one.

    Raises:
        OpsError: the record is damaged.
    """
    return UnfinishedDrill.find(directory)


def forget(directory: Path) -> None:
    """Delete the record: the drill has ended."""
    UnfinishedDrill.remove(directory)
