"""What ALTER SYSTEM replaced: one JSON file per change, written before it, so that it can be undone exactly.

They stand in `settings/` of the environment's reports directory, beside the chain of reports. A record with `until` is
a temporary override: it holds until then, and as long as ALTER SYSTEM's file has its value from no newer record.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from runbook.errors import OpsError
from runbook.failpoint import failpoint
from tasks.postgres.settings import ServerSettings

FOLDER = "settings"


@dataclass(frozen=True)
class Changed:
    """One setting: what ALTER SYSTEM had written before (None: nothing), and what it was to write."""

    name: str
    old: str | None
    new: str


@dataclass(frozen=True)
class Record:
    """One run of apply_postgres_settings. `until` and `undone` are empty, or times in ISO 8601."""

    name: str
    taken: str
    system_identifier: str
    changes: tuple[Changed, ...]
    until: str = ""
    reason: str = ""
    undone: str = ""

    @property
    def is_expired(self) -> bool:
        """Whether an override's time is over."""
        return bool(self.until) and datetime.fromisoformat(self.until) <= datetime.now(UTC)


def keep(
    reports: Path, system_identifier: str, changes: Sequence[Changed], *, hours: float = 0, reason: str = ""
) -> Record:
    """Write a record; with `hours`, of an override.

    Raises:
        OpsError: it cannot be written. Nothing may be changed then.
    """
    now = datetime.now(UTC)
    until = (now + timedelta(hours=hours)).isoformat(timespec="seconds") if hours else ""
    name = f"{now:%Y%m%dT%H%M%S%fZ}"
    record = Record(name, now.isoformat(timespec="seconds"), system_identifier, tuple(changes), until, reason)
    _write(reports, record)
    failpoint("settings: recorded")
    return record


def mark_undone(reports: Path, record: Record) -> None:
    """Note that its old values are back."""
    _write(reports, replace(record, undone=datetime.now(UTC).isoformat(timespec="seconds")))


def read_all(reports: Path) -> list[Record]:
    """All records, oldest first.

    Raises:
        OpsError: one cannot be read.
    """
    return [_read(path) for path in sorted((reports / FOLDER).glob("*.json"))]


def overrides_in_force(records: Sequence[Record], found: ServerSettings) -> Mapping[str, tuple[Record, str]]:
    """The overrides (expired or not) by setting, with their value.

    A record is written before its change: it counts only where ALTER SYSTEM has that very value in its file. A run that
    was killed in between leaves the record before it in force.
    """
    told: dict[str, tuple[Record, str]] = {}
    for record in records:
        if record.system_identifier != found.system_identifier or record.undone:
            continue
        for change in record.changes:
            setting = found.by_name.get(change.name)
            if setting and setting.is_filed(change.new):
                told[change.name] = (record, change.new)
    return {name: pair for name, pair in told.items() if pair[0].until}


def _read(path: Path) -> Record:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return Record(**{**told, "changes": tuple(Changed(**change) for change in told["changes"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        what = f"{path} cannot be read: {type(error).__name__}"
        raise OpsError(what, "look at it; move it away if it says nothing any more") from None


def _write(reports: Path, record: Record) -> None:
    path = reports / FOLDER / f"{record.name}.json"
    partial = path.with_suffix(".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            json.dump(asdict(record), file, ensure_ascii=False, indent=1)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise OpsError(f"{path} cannot be written: {error.strerror}", "make room there or correct its owner") from None
