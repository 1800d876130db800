"""A log and its rotated siblings: `app.log`, `app.log.1`, `app.log.2.gz`, `app.log-20261125.xz`."""

from __future__ import annotations

import contextlib
import glob
import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from runbook.errors import OpsError
from runbook.kinds import probe

_ROTATED = re.compile(r"[.-][0-9][0-9.-]*(?:\.(?:gz|bz2|xz|zst))?")


@dataclass(frozen=True)
class LogFile:
    """One file. `bytes`: as stored; `modified`: no line in it is later."""

    path: Path
    inode: int
    bytes: int
    modified: datetime

    @property
    def packed(self) -> str:
        """Its compression: `gz`, `bz2`, `xz`, `zst` or ""."""
        ending = self.path.suffix.removeprefix(".")
        return ending if ending in ("gz", "bz2", "xz", "zst") else ""


@probe
def find_logs(log: Path) -> tuple[LogFile, ...]:
    """The log and its rotated files, oldest first.

    Raises:
        OpsError: there is none of them, or their directory cannot be listed.
    """
    if not os.access(log.parent, os.R_OK | os.X_OK):
        there = "may not be listed by this user" if log.parent.exists() else "is not there"
        raise OpsError(
            f"the directory of the logs {log.parent} {there}", "correct [logs], or the permissions of the directory"
        )
    found = {file.inode: file for path in siblings(log) if (file := _looked_at(path))}  # a renamed one is there once
    if not found:
        raise OpsError(f"there is no log {log}", "correct [logs], or find out why the application does not write it")
    return tuple(sorted(found.values(), key=lambda file: (file.modified, file.path != log, file.path.name)))


def siblings(log: Path) -> list[Path]:
    """The log, if it exists, and its rotated files, by name."""
    around = sorted(log.parent.glob(f"{glob.escape(log.name)}*"))
    return [path for path in around if path == log or _ROTATED.fullmatch(path.name.removeprefix(log.name))]


def _looked_at(path: Path) -> LogFile | None:
    with contextlib.suppress(FileNotFoundError):
        stat = path.stat()
        return LogFile(path, stat.st_ino, stat.st_size, datetime.fromtimestamp(stat.st_mtime, UTC))
    return None
