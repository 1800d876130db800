"""A check that runs every few minutes and finds the same again: it is counted, and filed once an hour.

Reports are a chain of hashes, from which nothing can be removed: so what tells nothing new does not enter it. Beside
the chain a small file tells of the last report that was filed how often it was found again since; the next one that is
filed holds that as a fact.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from runbook.files import durable
from runbook.report import Report, Status

EVERY = timedelta(hours=1)


@dataclass(frozen=True)
class FiledCount:
    """The last report of a check that is in the chain, and the runs since that found the same: how many, and when the
    last of them ended."""

    name: str
    hash: str
    previous: str
    at: datetime
    result: str
    runs: int = 0
    last: str = ""

    @property
    def told(self) -> str:
        """For people."""
        return f"{self.runs} found the same as {self.name}, the last at {self.last}"

    def holds(self, report: Report, now: datetime) -> bool:
        """Whether a report tells nothing that this one does not. Where the clock was set back nobody can say."""
        if report.status is Status.CRITICAL or report.measures:
            return False
        return timedelta() <= now - self.at < EVERY and result_of(report) == self.result


def file_or_count(directory: Path, key: str, report: Report, file: Callable[[], None]) -> None:
    """Count a report that tells nothing new (it then has the path and the hash of the one that it is like), else `file`
    it. One that is CRITICAL or measured something is filed, and once an hour any is.

    Raises:
        OSError: a file cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f".same-{socket.gethostname()}-{key}"
    # Another run of the same check may have been launched by hand.
    with durable.open_lock(path.with_name(f"{path.name}.lock")) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before, now = _find(path), datetime.now(UTC)
        if before and before.holds(report, now):
            _write(path, replace(before, runs=before.runs + 1, last=now.isoformat(timespec="seconds")))
            report.path, report.hash, report.previous = directory / before.name, before.hash, before.previous
            report.fact("filed", f"as {before.name}: it found the same, {before.runs + 1} times since")
            return
        if before and before.runs:
            report.fact("runs before it", before.told)
        file()
        assert report.path
        _write(path, FiledCount(report.path.name, report.hash, report.previous, now, result_of(report)))


def _find(path: Path) -> FiledCount | None:
    """What the small file says, where its report is still there."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        content = json.loads(path.read_text(encoding="utf-8"))
        filed = FiledCount(**{**content, "at": datetime.fromisoformat(content["at"])})
        if (path.parent / filed.name).exists():
            return filed
    return None


def result_of(report: Report) -> str:
    """What makes one report differ from another: its status, and of each finding its name, its status and what is to be
    done. Measured values are other ones each time."""
    findings = sorted((one.name, one.status.value, one.hint) for one in report.findings)
    return hashlib.sha256(json.dumps([report.status.value, findings]).encode()).hexdigest()


def _write(path: Path, filed: FiledCount) -> None:
    durable.write(path, json.dumps({**vars(filed), "at": filed.at.isoformat()}, indent=1) + "\n", mode=durable.PRIVATE)
