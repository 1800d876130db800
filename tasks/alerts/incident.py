"""Incidents as files in the report folder: what happened, who was notified, who acknowledged.

The file is written before and after each message. If a run is killed, the next one knows whom to notify: nobody is left
out, and at most one person is notified twice. Nothing here needs Prefect.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from runbook.errors import OpsError
from runbook.failpoint import failpoint
from runbook.files import durable, record
from runbook.guard.lock import taken
from runbook.wait import until

Severity = Literal["severe", "normal"]
Outcome = Literal["begun", "sent", "failed"]
LOCK_SECONDS, STEPS_SECONDS = 30.0, 300.0
_HINT = "repair it, or delete it if the incident is resolved: an unreadable incident is not escalated"
_ID = re.compile(r"\d{8}T\d{6}-[0-9a-f]{4,6}")


@dataclass(frozen=True)
class Told:
    """One message to one person of a level, by one channel. `begun`: its sender was killed."""

    level: int
    contact: str
    channel: str
    at: datetime
    outcome: Outcome
    reason: str = ""


@dataclass(frozen=True)
class Incident:
    """An incident. It is open until it is resolved; an acknowledgement stops its escalation."""

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
        """Whether it is open and not acknowledged."""
        return self.open and self.acknowledged is None

    @property
    def acknowledged_seconds(self) -> float | None:
        """From its beginning to its acknowledgement."""
        return (self.acknowledged - self.since).total_seconds() if self.acknowledged else None

    def reached(self, level: int, contact: str) -> bool:
        """Whether a channel accepted the message to a person, as a member of that level."""
        return any(one.outcome == "sent" and (one.level, one.contact) == (level, contact) for one in self.told)

    def with_told(self, told: Told) -> Incident:
        """A copy with this message instead of its earlier record."""
        of = (told.level, told.contact, told.channel)
        kept = (one for one in self.told if (one.level, one.contact, one.channel) != of)
        return replace(self, told=(*kept, told))


def incident(environment: str, what: str, severity: Severity, owner: str, run: str, key: str) -> Incident:
    """A new incident. Names sort by time, also within a second."""
    now = datetime.now(UTC)
    name = f"{now:%Y%m%dT%H%M%S}-{now.microsecond * 2**16 // 10**6:04x}{secrets.token_hex(1)}"
    return Incident(name, environment, key or name, what, severity, owner, run, now)


@dataclass(frozen=True)
class Incidents:
    """The incidents of an environment. Every change is made under a file lock, and is on disk."""

    directory: Path
    environment: str

    def all(self) -> list[Incident]:
        """All readable incidents, newest first; `damaged` has the others."""
        found = [self._read(path) for path in self._paths()]
        return [one for one in found if isinstance(one, Incident) and one.environment == self.environment]

    def damaged(self) -> list[OpsError]:
        """The errors of unreadable files."""
        return [error for path in self._paths() if isinstance(error := self._read(path), OpsError)]

    def _paths(self) -> list[Path]:
        return sorted((path for path in self.directory.glob("*.json") if _ID.fullmatch(path.stem)), reverse=True)

    def _read(self, path: Path) -> Incident | OpsError | None:
        try:
            return record.read(path, Incident, _HINT)
        except OpsError as error:
            return error

    def open(self) -> list[Incident]:
        """The open incidents, oldest first."""
        return [one for one in reversed(self.all()) if one.open]

    def get(self, name: str) -> Incident:
        """An incident by its id or, while it is open, by its key; "": the only open one.

        Raises:
            OpsError: there is none, or more than one.
        """
        found = [one for one in self.all() if name in (one.id, one.key if one.open else "")] if name else self.open()
        if len(found) != 1:
            ids = ", ".join(f"{one.id} ({one.what[:40]})" for one in self.open()) or "none"
            named = f"“{name[:60]}” is not an incident" if name else f"{len(found)} incidents are open"
            raise OpsError(f"{named} of {self.environment}", f"name one of: {ids}")
        return found[0]

    def open_or_join(self, new: Incident, reopen_seconds: float) -> tuple[Incident, Incident | None]:
        """Add a new incident, or count it as a repetition of the open one of its key. Returns it, and the incident that
        was open before; that one is resolved if it was acknowledged long ago, or if the new one is severe.

        Raises:
            OpsError: it cannot be written.
        """
        now = new.since
        with self._locked():
            found = [one for one in self.all() if one.open and one.key == new.key]
            if not found:
                return self._write(new), None
            same, *older = found  # more than one where somebody was killed in between
            if reason := _anew(same, new, reopen_seconds):
                if not same.acknowledged:  # nobody has answered: its levels do not wait again
                    new = replace(new, since=min(same.since, now))
                self._write(new)  # before the other one is over: killed in between, somebody is told
                failpoint("incident is there")
                older.append(same)
            for one in older:
                self._write(replace(one, resolved=now, resolved_by=f"{new.id}: {reason or 'it happened again'}"))
            if reason:
                return new, self.get(same.id)
            return self._write(replace(same, repeats=same.repeats + 1, last=now)), same

    def begin_now(self, incident: Incident) -> Incident:
        """Of one that began later than now: the clock was set back, and its levels would wait for that too."""
        with self._locked():
            return self._write(replace(self.get(incident.id), since=datetime.now(UTC)))

    def prune(self, kept: timedelta) -> list[Incident]:
        """Remove those that are over for longer than that; returns them."""
        now = datetime.now(UTC)
        with self._locked():
            gone = [one for one in self.all() if one.resolved and now - one.resolved > kept]
            for one in gone:
                (self.directory / f"{one.id}.json").unlink(missing_ok=True)
                (self.directory / f".steps-{one.id}.lock").unlink(missing_ok=True)
        return gone

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
        with self._flock(f".steps-{incident.id}.lock", STEPS_SECONDS):
            yield

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._flock(".lock", LOCK_SECONDS):
            yield

    @contextlib.contextmanager
    def _flock(self, name: str, seconds: float) -> Iterator[None]:
        """Not waited for without end: who holds it may be stopped, and whoever is on call is told all the same."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            file = durable.open_lock(self.directory / name)
        except OSError as error:
            raise OpsError(f"{self.directory} cannot be written: {error.strerror}", "correct its owner") from None
        with file:
            hint = f"fuser {self.directory / name} names the process that does not give it back"
            until(lambda: taken(file), what=f"the lock of {self.directory}", seconds=seconds, hint=hint)
            yield

    def _write(self, incident: Incident) -> Incident:
        record.write(self.directory / f"{incident.id}.json", incident)
        return incident


def _anew(same: Incident, new: Incident, reopen_seconds: float) -> str:
    """Why the alert is an incident of its own, "" where it is one more time of the same."""
    if new.severity == "severe" and same.severity != "severe":
        return "it has become severe"
    # Either way: a clock that was set back must not keep it acknowledged until that day has come again.
    if same.acknowledged and abs((new.since - same.acknowledged).total_seconds()) > reopen_seconds:
        return "it happened again"
    return ""
