"""A rotation now, and its effect on the application (§6.2)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from runbook.errors import OpsError, Unreachable
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from runbook.shell import run
from runbook.wait import until
from tasks.logs.reading.files import LogFile, find_logs
from tasks.logs.rotation.cleaning import read_holders
from tasks.logs.rotation.rotation import program

ROTATE = "rotate logs by"
TIMEOUT_SECONDS, REOPEN_SECONDS = 120, 20.0


@action(of=lambda configuration: Act(ROTATE, str(configuration)))
def rotate(configuration: Path) -> str:
    """Run `logrotate --force` with a separate state file, so that the daily run's does not change. Returns its output.

    Raises:
        CommandFailed: it failed; files that it has rotated stay rotated.
    """
    with tempfile.TemporaryDirectory(prefix="ops-logrotate-") as state:
        argv = [program(), "--force", "--verbose", "--state", f"{state}/state", str(configuration)]
        return run(argv, timeout_seconds=TIMEOUT_SECONDS, hint="check the directory of the logs").stderr


@dataclass(frozen=True)
class Rotated:
    """The result of a rotation: the file with the old lines, and the process that still writes to it ("": none)."""

    kept: str
    new_bytes: int
    stuck: str


@probe
def verify_rotated(log: Path, before: LogFile, provoke: Callable[[], object]) -> Rotated:
    """Check that the old file has another name, the application writes to a new one, and no process writes to the old
    one. `provoke` makes the application log something.

    Raises:
        OpsError: the log is still the old file.
    """
    files = find_logs.work(log)
    if any(file.path == log and file.inode == before.inode for file in files):
        raise OpsError(
            f"{log} was not rotated", "check logrotate's output in the report (notifempty: the log is empty)"
        )
    kept = next((file for file in files if file.inode == before.inode), None)

    def written() -> int:
        provoke()
        return log.stat().st_size if log.exists() else 0

    try:
        new = until(written, what="a line in the new file", seconds=REOPEN_SECONDS)
    except Unreachable:
        new = 0
    holders = read_holders.work([kept] if kept else [])
    stuck = holders.by_inode[before.inode] if before.inode in holders.writing else ""
    return Rotated(kept.path.name if kept else "", new, stuck)
