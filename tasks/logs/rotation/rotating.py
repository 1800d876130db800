"""A rotation for real, and whether the application went along (§6.2)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from runbook.errors import OpsError, Unreachable
from runbook.guard.permit import Permit
from runbook.kinds import action, probe
from runbook.shell import run
from runbook.wait import until
from tasks.logs.reading.files import LogFile, find_logs
from tasks.logs.rotation.cleaning import read_holders
from tasks.logs.rotation.rotation import program

ROTATE = "rotate logs by"
TIMEOUT_SECONDS, REOPEN_SECONDS = 120, 20.0


@action(idempotent=False)
def rotate(permit: Permit, configuration: Path) -> str:
    """`logrotate --force`, with a state of its own: the daily run's stays as it is. Returns what it says.

    Raises:
        CommandFailed: it failed; hint: what it did until then stays.
    """
    permit.require(ROTATE, str(configuration))
    with tempfile.TemporaryDirectory(prefix="ops-logrotate-") as state:
        argv = [program(), "--force", "--verbose", "--state", f"{state}/state", str(configuration)]
        return run(argv, timeout_seconds=TIMEOUT_SECONDS, hint="look at the directory of the logs").stderr


@dataclass(frozen=True)
class Rotated:
    """What became of a log: where its lines of before are, and who still writes there ("" where nobody)."""

    kept: str
    new_bytes: int
    stuck: str


@probe
def verify_rotated(log: Path, before: LogFile, provoke: Callable[[], object]) -> Rotated:
    """Whether the old file was kept under another name, a new one is written to, and nobody writes to the old one;
    `provoke` makes the application log something.

    Raises:
        OpsError: the file is the one of before: nothing was rotated.
    """
    files = find_logs.work(log)
    if any(file.path == log and file.inode == before.inode for file in files):
        raise OpsError(f"{log} was not rotated", "look at what logrotate said in the report (notifempty: it is empty)")
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
