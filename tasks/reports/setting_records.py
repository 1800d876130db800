"""What a change of settings replaced: one JSON file per change, written before it, so that it can be undone exactly.

They stand in `settings/` of the environment's reports directory, beside the chain of reports; PostgreSQL's and Redis's
alike, told apart by the server's identity. A record with `until` is a temporary override: it holds until then, and as
long as its value is what the server has, from no newer record. Once that value was seen replaced it is closed: the same
value, years later, is somebody's decision and no override.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Protocol

from pydantic import AliasChoices, Field

from runbook.errors import OpsError
from runbook.failpoint import failpoint
from runbook.files.record import read as read_record
from runbook.files.record import write as write_record

FOLDER = "settings"
# A run sets what it has recorded within minutes: until then a value that is not there yet was not replaced.
SETTLED = timedelta(hours=1)


class ServerSettings(Protocol):
    """A server's settings, as records of changes need them: of PostgreSQL and of Redis."""

    @property
    def identity(self) -> str:
        """Which server it is, also after a restart."""

    def is_written(self, name: str, value: str | None) -> bool:
        """Whether this value (None: nothing) is there now, where a change writes it (PostgreSQL: ALTER SYSTEM's
        file)."""

    def shown(self, name: str, value: str | None = None) -> str:
        """A value as a reader knows it; by default the one that is there now."""


@dataclass(frozen=True)
class Changed:
    """One setting: what was written before (None: nothing), and what was to be written. `ended` are the overrides whose
    records this closes by going back to what was there before them: undone, they are open again."""

    name: str
    old: str | None
    new: str
    ended: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """One change of settings. The times are empty, or in ISO 8601: `until` it holds, where it is an override; `undone`
    by a run; `replaced` by another value, as it was seen; `reopened` because what had ended it was undone."""

    name: str
    taken: str
    # PostgreSQL's own records had another name for it, before Redis had any.
    server: Annotated[str, Field(validation_alias=AliasChoices("server", "system_identifier"))]
    changes: tuple[Changed, ...]
    until: str = ""
    reason: str = ""
    undone: str = ""
    replaced: str = ""
    reopened: str = ""

    @property
    def is_open(self) -> bool:
        """Whether it can still be undone."""
        return not self.undone and not self.replaced

    @property
    def is_expired(self) -> bool:
        """Whether an override's time is over."""
        return bool(self.until) and datetime.fromisoformat(self.until) <= datetime.now(UTC)

    @property
    def is_settled(self) -> bool:
        """Whether its run has long set its values, or never will."""
        return datetime.fromisoformat(self.reopened or self.taken) <= datetime.now(UTC) - SETTLED

    def change(self, name: str) -> Changed | None:
        """What it was to write for a setting; None where it has none of that name."""
        return next((change for change in self.changes if change.name == name), None)


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
    write_record(_path(reports, record.name), replace(record, undone=_now()))


def reopen(reports: Path, names: Collection[str]) -> None:
    """Have overrides count again: what had ended them is being undone."""
    for record in read_all(reports):
        if record.name in names:
            write_record(_path(reports, record.name), replace(record, undone="", replaced="", reopened=_now()))


def close_replaced(reports: Path, found: ServerSettings, *, at_once: bool = False) -> None:
    """Close a server's overrides whose value is not there any more, nor under another's that is.

    `at_once` is for a run that holds the environment's lock: no other can be about to set what it has recorded.
    """
    known = read_all(reports)
    for record in open_records(known, found.identity):
        beneath = any(record in led_to(known, found, change.name) for change in record.changes)
        if record.until and not beneath and (at_once or record.is_settled):
            write_record(_path(reports, record.name), replace(record, replaced=_now()))


def read_all(reports: Path) -> list[Record]:
    """All records, oldest first.

    Raises:
        OpsError: one cannot be read.
    """
    hint = "check it; move it away if it is no longer needed"
    found = (read_record(path, Record, hint) for path in sorted((reports / FOLDER).glob("*.json")))
    return [record for record in found if record]


def open_records(records: Sequence[Record], server: str) -> list[Record]:
    """Those of one server that can still be undone, oldest first."""
    return [record for record in records if record.is_open and record.server == server]


def find_record(records: Sequence[Record], server: str, name: str = "") -> Record:
    """The record of that name, or the newest of this server that can still be undone.

    Raises:
        OpsError: there is none.
    """
    ours = open_records(records, server)
    chosen = [record for record in ours if record.name == name] if name else ours[-1:]
    if not chosen:
        names = ", ".join(record.name for record in ours[-5:]) or "none"
        raise OpsError(f"there is no record {name or 'that can be undone'} of this server", f"there are: {names}")
    return chosen[0]


def led_to(records: Sequence[Record], found: ServerSettings, name: str) -> list[Record]:
    """The open records that led to the value that a server has now, newest first: each wrote what the next newer one
    replaced. One that was recorded and never set is none of them, nor one that put an end to overrides.
    """
    chain: list[Record] = []
    value: str | None = None
    for record in reversed(open_records(records, found.identity)):
        change = record.change(name)
        if change is None or change.ended:
            continue
        if change.new == value if chain else found.is_written(name, change.new):
            chain.append(record)
            value = change.old
    return chain


def overrides_in_force(records: Sequence[Record], found: ServerSettings) -> Mapping[str, tuple[Record, str]]:
    """The overrides (expired or not) by setting, with their value.

    A record is written before its change: it counts only where the server has that very value. A run that was killed in
    between leaves the record before it in force.
    """
    told: dict[str, tuple[Record, str]] = {}
    changes = [change for record in open_records(records, found.identity) for change in record.changes]
    for name in dict.fromkeys(change.name for change in changes):
        for newest in led_to(records, found, name)[:1]:
            if newest.until and (change := newest.change(name)):
                told[name] = newest, change.new
    return told


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _path(reports: Path, name: str) -> Path:
    return reports / FOLDER / f"{name}.json"
