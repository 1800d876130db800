"""Requests of the last minutes, read from the end of the application's log (§6.1)."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from blocks.places import Logs
from runbook.errors import OpsError
from runbook.kinds import probe
from tasks.logs.reading.files import LogFile, find_logs

BLOCK_BYTES, MOST_BYTES = 1 << 18, 16 << 20
SLOWEST_SHARE = 0.05


@dataclass(frozen=True)
class AccessLine:
    """`errors`: answers of 500 and more. `slow_seconds`: 95 of 100 requests took no longer. `whole`: every line of that
    time was read, and told its time."""

    requests: int
    errors: int
    slow_seconds: float
    whole: bool


@probe
def read_access(logs: Logs, since: datetime) -> AccessLine:
    """Of the request lines from `since` on, also where the log was rotated meanwhile.

    Raises:
        OpsError: there is no log, or it may not be read.
    """
    seconds, errors, left, whole = [], 0, MOST_BYTES, True
    status_field, duration_field = logs.field("status"), logs.field("duration_ms")
    for file in _recent(Path(logs.need("app")), since):
        if file.packed:
            whole = False
            continue
        tail = _Tail(file, since, left, logs.access_logger.encode(), logs.field("timestamp"))
        for entry in tail.entries():
            status, took = entry.get(status_field), entry.get(duration_field)
            if isinstance(status, int) and isinstance(took, int | float):
                seconds.append(took / 1000)
                errors += status >= 500
        left -= tail.read
        whole = whole and tail.reached and not tail.undated
    seconds.sort()
    slow = seconds[min(int(len(seconds) * (1 - SLOWEST_SHARE)), len(seconds) - 1)] if seconds else 0.0
    return AccessLine(len(seconds), errors, slow, whole)


@probe
def read_ai_calls(logs: Logs, since: datetime) -> dict[str, int]:
    """Provider → how many AI calls it answered from `since` on, by the lines of `[logs] ai_message`.

    Raises:
        OpsError: there is no log, or it may not be read; or [logs] ai_message is not set: AI calls cannot be found.
    """
    if not logs.ai_message:
        raise OpsError("[logs] ai_message is not set: AI calls cannot be found", "set [logs] ai_message")
    found, message, provider = Counter[str](), logs.field("message"), logs.field("provider")
    for file in _recent(Path(logs.need("app")), since):
        if not file.packed:
            tail = _Tail(file, since, MOST_BYTES, logs.ai_message.encode(), logs.field("timestamp"))
            found.update(str(entry.get(provider)) for entry in tail.entries() if entry.get(message) == logs.ai_message)
    return dict(found)


def _recent(log: Path, since: datetime) -> Iterator[LogFile]:
    """The log and its last rotated file, newest first; read twice, as it may be renamed meanwhile."""
    seen = set[int]()
    for _ in range(2):
        for file in reversed(find_logs.work(log)):
            if file.inode not in seen and file.modified >= since:
                seen.add(file.inode)
                yield file


class _Tail:
    """The lines of a file from its end, until they are too old. `reached`: the old lines, or the file's beginning."""

    def __init__(self, file: LogFile, since: datetime, most: int, logger: bytes, stamp: str) -> None:
        self.file, self.since, self.most, self.logger, self.stamp = file, since, most, logger, stamp
        self.read, self.reached, self.undated = 0, False, 0

    def entries(self) -> Iterator[dict[str, Any]]:
        try:
            with self.file.path.open("rb") as content:
                if os.fstat(content.fileno()).st_ino == self.file.inode:  # else the next look has it by its new name
                    yield from self._entries(content)
        except FileNotFoundError:
            return
        except OSError as error:
            why = error.strerror or type(error).__name__
            raise OpsError(
                f"{self.file.path.name} cannot be read: {why}", "run the monitoring as a user that may read the logs"
            ) from None

    def _entries(self, content: IO[bytes]) -> Iterator[dict[str, Any]]:
        place, rest = content.seek(0, os.SEEK_END), b""
        while place > 0 and self.read < self.most:
            size = min(BLOCK_BYTES, place)
            place = content.seek(place - size)
            self.read += size
            lines = (content.read(size) + rest).split(b"\n")
            rest = lines.pop(0) if place else b""
            for line in lines:
                if self.logger not in line:
                    continue
                entry = _entry(line, self.stamp)
                self.undated += entry is None and line.endswith(b"}")  # whole, and no time in it that could be read
                if entry and entry["at"] >= self.since:
                    yield entry
            first = next((entry for line in lines if (entry := _entry(line, self.stamp))), None)
            if first and first["at"] < self.since:
                self.reached = True
                return
        self.reached = place == 0


def _entry(line: bytes, stamp: str) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
        entry: dict[str, Any] = json.loads(line)
        at = datetime.fromisoformat(entry[stamp].replace(",", "."))
        entry["at"] = at if at.tzinfo else at.replace(tzinfo=UTC)
        return entry
    return None
