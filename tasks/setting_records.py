"""What a change of settings replaced: one JSON file per change, written before it, so that it can be undone exactly.

They stand in `settings/` of the environment's reports directory, beside the chain of reports; PostgreSQL's and Redis's
alike, told apart by the server's identity. A record with `until` is a temporary override: it holds until then, and as
long as its value is what the server has, from no newer record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Protocol

from pydantic import AliasChoices, Field

from runbook.errors import OpsError
from runbook.failpoint import failpoint
from runbook.record import read as read_record
from runbook.record import write as write_record

FOLDER = "settings"


class Written(Protocol):
    """A server's settings, as its records need them."""

    @property
    def identity(self) -> str:
        """Which server it is, also after a restart."""

    def is_written(self, name: str, value: str) -> bool:
        """Whether this value is there now, where a change writes it (PostgreSQL: ALTER SYSTEM's file)."""


@dataclass(frozen=True)
class Changed:
    """One setting: what was written before (None: nothing), and what was to be written."""

    name: str
    old: str | None
    new: str


@dataclass(frozen=True)
class Record:
    """One change of settings. `until` and `undone` are empty, or times in ISO 8601."""

    name: str
    taken: str
    # PostgreSQL's own records had another name for it, before Redis had any.
    server: Annotated[str, Field(validation_alias=AliasChoices("server", "system_identifier"))]
    changes: tuple[Changed, ...]
    until: str = ""
    reason: str = ""
    undone: str = ""

    @property
    def is_expired(self) -> bool:
        """Whether an override's time is over."""
        return bool(self.until) and datetime.fromisoformat(self.until) <= datetime.now(UTC)

    def new(self, name: str) -> str | None:
        """What it was to write for a setting; None where it has none of that name."""
        return next((change.new for change in self.changes if change.name == name), None)


def keep(reports: Path, server: str, changes: Sequence[Changed], *, hours: float = 0, reason: str = "") -> Record:
    """Write a record of a server (its identity); with `hours`, of an override.

    Raises:
        OpsError: it cannot be written. Nothing may be changed then.
    """
    now = datetime.now(UTC)
    until = (now + timedelta(hours=hours)).isoformat(timespec="seconds") if hours else ""
    name = f"{now:%Y%m%dT%H%M%S%fZ}"
    record = Record(name, now.isoformat(timespec="seconds"), server, tuple(changes), until, reason)
    write_record(_path(reports, record.name), record)
    failpoint("settings: recorded")
    return record


def mark_undone(reports: Path, record: Record) -> None:
    """Note that its old values are back."""
    undone = replace(record, undone=datetime.now(UTC).isoformat(timespec="seconds"))
    write_record(_path(reports, record.name), undone)


def read_all(reports: Path) -> list[Record]:
    """All records, oldest first.

    Raises:
        OpsError: one cannot be read.
    """
    hint = "look at it; move it away if it says nothing any more"
    found = (read_record(path, Record, hint) for path in sorted((reports / FOLDER).glob("*.json")))
    return [record for record in found if record]


def open_records(records: Sequence[Record], server: str) -> list[Record]:
    """Those of one server that are not undone, oldest first."""
    return [record for record in records if not record.undone and record.server == server]


def find_record(records: Sequence[Record], server: str, name: str = "") -> Record:
    """The record of that name, or the newest of this server that is not undone.

    Raises:
        OpsError: there is none.
    """
    ours = open_records(records, server)
    chosen = [record for record in ours if record.name == name] if name else ours[-1:]
    if not chosen:
        names = ", ".join(record.name for record in ours[-5:]) or "none"
        raise OpsError(f"there is no record {name or 'that could be undone'} of this server", f"there are: {names}")
    return chosen[0]


def overrides_in_force(records: Sequence[Record], found: Written) -> Mapping[str, tuple[Record, str]]:
    """The overrides (expired or not) by setting, with their value.

    A record is written before its change: it counts only where the server has that very value. A run that was killed in
    between leaves the record before it in force.
    """
    told: dict[str, tuple[Record, str]] = {}
    for record in open_records(records, found.identity):
        for change in record.changes:
            if found.is_written(change.name, change.new):
                told[change.name] = (record, change.new)
    return {name: pair for name, pair in told.items() if pair[0].until}


def _path(reports: Path, name: str) -> Path:
    return reports / FOLDER / f"{name}.json"
