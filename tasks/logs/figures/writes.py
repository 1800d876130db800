"""Acknowledged writes in the application's log: the writes that a restore would lose."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import lzma
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, NamedTuple

from blocks.places import Logs
from runbook.kinds import probe
from tasks.logs.reading.files import siblings

MOST_ITEMS = 1000
ROTATIONS = 3
READ = ("timestamp", "status", "method", "path", "message", "resource")
METHODS = ("POST", "PUT", "PATCH", "DELETE")
_ID = re.compile(r"/(?:\d+|[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12})(?=/|$)")
_OPEN = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


class Write(NamedTuple):
    """One acknowledged write."""

    time: datetime
    method: str
    path: str
    resource: str


@dataclass(frozen=True)
class LoggedWrites:
    """Acknowledged writes after a moment. If `complete` is false, the count is a lower bound for the reason `note`."""

    since: datetime
    count: int
    by_kind: tuple[tuple[str, int], ...]
    first: datetime | None
    last: datetime | None
    items: tuple[Write, ...]
    complete: bool
    note: str

    def without(self, resources: Collection[str]) -> LoggedWrites:
        """The same without the writes of these resources."""
        left = tuple(item for item in self.items if item.resource not in resources)
        gone = len(self.items) - len(left)
        return replace(self, count=self.count - gone, by_kind=kinds_of(left), items=left)

    @property
    def sentence(self) -> str:
        """The count in words: never "0" if nothing could be counted."""
        if self.complete:
            return f"{self.count} acknowledged writes after {self.since:%Y-%m-%d %H:%M:%S %Z}"
        return f"at least {self.count} acknowledged writes after {self.since:%Y-%m-%d %H:%M:%S %Z}: {self.note}"


def kinds_of(items: Sequence[Write]) -> tuple[tuple[str, int], ...]:
    """Requests by kind, the most frequent first."""
    return tuple(Counter(f"{item.method} {_ID.sub('/{id}', item.path)}" for item in items).most_common())


@probe
def read_writes_since(logs: Logs, moment: datetime, before: datetime | None = None) -> LoggedWrites:
    """Count the writes that `app.log` and its rotated siblings show as acknowledged later than `moment` (and not later
    than `before`).

    A write is a request line with a writing method and a 2xx status, except paths in `[logs] not_data`. The application
    logs a request after its commit and before its answer, so a line later than a snapshot may tell of a write that the
    snapshot still holds: the count errs to more. Times without a zone are UTC.
    """
    since, end = _utc(moment), _utc(before or datetime.max)
    log = Path(logs.need("app"))
    for _ in range(ROTATIONS):
        found, files = _Found(logs, since, end), _files(log)
        for path in files.values():
            found.read(path)
        if _files(log) == files:
            return found.writes(log)
    return replace(found.writes(log), complete=False, note="the log was rotated while it was read, again and again")


def _files(log: Path) -> dict[int, Path]:
    """The log and its rotated files, by inode."""
    files = {}
    for path in siblings(log):
        with contextlib.suppress(FileNotFoundError):
            files[path.stat().st_ino] = path
    return files


class _Found:
    """Collects over several files."""

    def __init__(self, logs: Logs, since: datetime, until: datetime) -> None:
        self.logs = logs
        stamp, method = (re.escape(logs.field(name).encode()) for name in ("timestamp", "method"))
        self.stamp = re.compile(rb'"%s": ?"([^"]+)"' % stamp)
        self.method = re.compile(rb'"%s": ?"(?:POST|PUT|PATCH|DELETE)"' % method)
        self.needle = json.dumps(logs.access_message).encode() if logs.access_message else b""
        self.since = since
        self.until = until
        self.text = since.isoformat(timespec="microseconds").encode()
        self.items: list[Write] = []
        self.seen: set[int] = set()
        self.covered = False
        self.earliest: datetime | None = None
        self.broken = 0
        self.unreadable: list[str] = []

    def read(self, path: Path) -> None:
        """Read one file; an older one only proves that the log reaches back far enough."""
        try:
            if path.stat().st_mtime < self.since.timestamp():
                self.covered = self.covered or path.stat().st_size > 0
                return
            with _open(path) as file:
                self._lines(file)
        except (OSError, EOFError, lzma.LZMAError) as error:
            self.unreadable.append(f"{path.name} ({type(error).__name__})")

    def _lines(self, file: IO[bytes]) -> None:
        undated = True
        for line in file:
            if undated and (stamp := self.stamp.search(line)) and (time := _time(stamp[1].decode(errors="replace"))):
                undated = False
                self.earliest = min(time, self.earliest or time)
            if self.needle in line and self.method.search(line):
                if not self._is_before(line):
                    self._take(line)
            elif line.startswith(b"{") and not line.rstrip().endswith(b"}"):
                self.broken += 1

    def _is_before(self, line: bytes) -> bool:
        """A fast comparison as text, if times are written in UTC with microseconds."""
        stamp = self.stamp.search(line)
        return bool(
            stamp and len(stamp[1]) == len(self.text) and stamp[1].endswith(b"+00:00") and stamp[1] <= self.text
        )

    def _take(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            read = {name: entry.get(self.logs.field(name)) for name in READ}
            if self.logs.access_logger and self.logs.access_logger != entry.get(self.logs.field("logger")):
                return
            if read["status"] is None and not (self.logs.access_logger or self.logs.access_message):
                return  # not every line about a request is one of the access log
            time, status = _time(str(read["timestamp"])), int(read["status"])
            method, path, message = str(read["method"]), str(read["path"]), read["message"]
        except (ValueError, KeyError, TypeError):
            self.broken += 1
            return
        if time is None:
            self.broken += 1
            return
        is_write = message == (self.logs.access_message or message) and method in METHODS and 200 <= status < 300
        if not is_write or path.startswith(tuple(self.logs.not_data)) or not self.since < time <= self.until:
            return
        key = hash(line.rstrip())
        if key not in self.seen:  # a file that is being compressed is there twice
            self.seen.add(key)
            self.items.append(Write(time, method, path, str(read["resource"] or "")))

    def writes(self, log: Path) -> LoggedWrites:
        """The answer."""
        items = sorted(self.items)
        note = self._note(log)
        return LoggedWrites(
            since=self.since,
            count=len(items),
            by_kind=kinds_of(items),
            first=items[0].time if items else None,
            last=items[-1].time if items else None,
            items=tuple(items[:MOST_ITEMS]),
            complete=not note,
            note=note,
        )

    def _note(self, log: Path) -> str:
        if not log.exists():
            return f"{log} is not there, so what was written cannot be counted"
        notes = [f"{name} cannot be read" for name in self.unreadable]
        if not self.covered and (self.earliest is None or self.earliest > self.since):
            begins = f"begins at {self.earliest:%Y-%m-%d %H:%M:%S %Z}" if self.earliest else "has no line with a time"
            notes.append(f"the log {begins}: what was written before is not counted")
        if self.broken:
            notes.append(f"{self.broken} lines are not whole JSON objects")
        return "; ".join(notes)


def _open(path: Path) -> IO[bytes]:
    opener = _OPEN.get(path.suffix)
    return opener(path, "rb") if opener else path.open("rb")  # type: ignore[operator]


def _time(text: str) -> datetime | None:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    return _utc(time)


def _utc(time: datetime) -> datetime:
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
