"""Incidents as files beside the reports: what is known, who was told, who has acknowledged.

A file is written before a message is sent and after it, so that whoever goes on after a kill knows whom to tell again:
nobody is missed, and one person at most is told twice. Nothing here needs Prefect.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from runbook import record
from runbook.errors import OpsError

Severity = Literal["severe", "normal"]
Outcome = Literal["begun", "sent", "failed"]
_HINT = "look at it: an incident that nobody can read escalates to nobody; remove it when it is over"
_ID = re.compile(r"\d{8}T\d{6}-[0-9a-f]{4}")


@dataclass(frozen=True)
class Told:
    """One message to one person of a level, by one channel. `begun`: whoever sent it was killed meanwhile."""

    level: int
    contact: str
    channel: str
    at: datetime
    outcome: Outcome
    reason: str = ""


@dataclass(frozen=True)
class Incident:
    """What happened once. It is open until it is resolved; acknowledged, it is told to nobody more."""

    id: str
    environment: str
    key: str
    what: str
    severity: Severity
    owner: str
    run: str
    since: datetime
    told: tuple[Told, ...] = ()
    repeats: int = 0
    last: datetime | None = None
    acknowledged_by: str = ""
    acknowledged: datetime | None = None
    note: str = ""
    declared_by: str = ""
    declared: datetime | None = None
    resolved_by: str = ""
    resolved: datetime | None = None

    @property
    def open(self) -> bool:
        return self.resolved is None

    @property
    def waiting(self) -> bool:
        """Nobody has acknowledged it."""
        return self.open and self.acknowledged is None

    @property
    def acknowledged_seconds(self) -> float | None:
        """From its beginning to its acknowledgement."""
        return (self.acknowledged - self.since).total_seconds() if self.acknowledged else None

    def reached(self, level: int, contact: str) -> bool:
        """Whether a channel took the message to somebody, as a member of that level."""
        return any(one.outcome == "sent" and (one.level, one.contact) == (level, contact) for one in self.told)

    def with_told(self, told: Told) -> Incident:
        """With a message more, in the place of what was noted of the same one before."""
        of = (told.level, told.contact, told.channel)
        kept = (one for one in self.told if (one.level, one.contact, one.channel) != of)
        return replace(self, told=(*kept, told))


def incident(environment: str, what: str, severity: Severity, owner: str, run: str, key: str) -> Incident:
    """A new one, of now."""
    now = datetime.now(UTC)
    name = f"{now:%Y%m%dT%H%M%S}-{secrets.token_hex(2)}"
    return Incident(name, environment, key or name, what, severity, owner, run, now)


@dataclass(frozen=True)
class Incidents:
    """Those of an environment. Every change is one under a file lock: read, changed, on disk."""

    directory: Path
    environment: str

    def all(self) -> list[Incident]:
        """Newest first. One whose file is damaged keeps no other from being told: `damaged` names it."""
        found = [self._read(path) for path in self._paths()]
        return [one for one in found if isinstance(one, Incident) and one.environment == self.environment]

    def damaged(self) -> list[OpsError]:
        """What is wrong with files that cannot be read."""
        return [error for path in self._paths() if isinstance(error := self._read(path), OpsError)]

    def _paths(self) -> list[Path]:
        return sorted((path for path in self.directory.glob("*.json") if _ID.fullmatch(path.stem)), reverse=True)

    def _read(self, path: Path) -> Incident | OpsError | None:
        try:
            return record.read(path, Incident, _HINT)
        except OpsError as error:
            return error

    def open(self) -> list[Incident]:
        """Those that are not resolved, oldest first."""
        return [one for one in reversed(self.all()) if one.open]

    def get(self, name: str) -> Incident:
        """One by its id or, while it is open, by its key; "" is the only one that is open.

        Raises:
            OpsError: there is none, or more than one.
        """
        found = [one for one in self.all() if name in (one.id, one.key if one.open else "")] if name else self.open()
        if len(found) != 1:
            ids = ", ".join(f"{one.id} ({one.what[:40]})" for one in self.open()) or "none"
            named = f"“{name[:60]}” is no incident" if name else f"{len(found)} incidents are open"
            raise OpsError(f"{named} of {self.environment}", f"name one of: {ids}")
        return found[0]

    def open_or_join(self, new: Incident, reopen_seconds: float) -> tuple[Incident, bool]:
        """Keep a new one, or count it as one more time of the open incident of its key; and whether it is new. One that
        was acknowledged long ago is over: it happens anew.

        Raises:
            OpsError: it cannot be written.
        """
        now = new.since
        with self._locked():
            same = next((one for one in self.open() if one.key == new.key), None)
            if same and same.acknowledged and (now - same.acknowledged).total_seconds() > reopen_seconds:
                self._write(replace(same, resolved=now, resolved_by="it happened again"))
                same = None
            if same is None:
                return self._write(new), True
            worse: Severity = "severe" if "severe" in (same.severity, new.severity) else "normal"
            return self._write(replace(same, repeats=same.repeats + 1, last=now, severity=worse)), False

    def tell(self, incident: Incident, told: Told) -> Incident:
        """Note a message: its beginning, then its outcome."""
        with self._locked():
            now = self.get(incident.id)
            return self._write(now.with_told(told))

    def acknowledge(self, name: str, by: str, note: str) -> tuple[Incident, bool]:
        """Note who takes it; and whether that is new: who was first stays."""
        with self._locked():
            now = self.get(name)
            if now.acknowledged or not now.open:
                return now, False
            return self._write(replace(now, acknowledged_by=by, acknowledged=datetime.now(UTC), note=note)), True

    def declare(self, name: str, by: str) -> Incident:
        """Note that it is an incident that stakeholders are told of."""
        with self._locked():
            now = self.get(name)
            return now if now.declared else self._write(replace(now, declared_by=by, declared=datetime.now(UTC)))

    def resolve(self, name: str, by: str, note: str) -> tuple[Incident, bool]:
        """Note that it is over; and whether that is new."""
        with self._locked():
            now = self.get(name)
            if not now.open:
                return now, False
            notes = " / ".join(one for one in (now.note, note) if one)
            return self._write(replace(now, resolved_by=by, resolved=datetime.now(UTC), note=notes)), True

    @contextlib.contextmanager
    def stepping(self, incident: Incident) -> Iterator[None]:
        """One at a time goes through the levels of an incident; acknowledging does not wait for it."""
        with self._flock(f".steps-{incident.id}.lock"):
            yield

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._flock(".lock"):
            yield

    @contextlib.contextmanager
    def _flock(self, name: str) -> Iterator[None]:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            file = (self.directory / name).open("a")
        except OSError as error:
            raise OpsError(f"{self.directory} cannot be written: {error.strerror}", "correct its owner") from None
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _write(self, incident: Incident) -> Incident:
        record.write(self.directory / f"{incident.id}.json", incident)
        return incident
