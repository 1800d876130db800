"""Deletion of old rotated logs: never the log itself, never an open file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from runbook.guard.permit import Act
from runbook.kinds import action, probe
from tasks.logs.reading.files import LogFile

REMOVE = "remove rotated log"


@dataclass(frozen=True)
class Holders:
    """Which files processes of this host have open: inode → what holds it; `writing`: those that are written to.
    `whole`: all processes could be asked."""

    by_inode: dict[int, str]
    writing: frozenset[int]
    whole: bool


@probe
def read_holders(files: Sequence[LogFile]) -> Holders:
    """The processes that have files open, by /proc: a renamed log may still be written."""
    wanted = {file.inode: (file.path.stat().st_dev if file.path.exists() else -1) for file in files}
    found, writing, whole = dict[int, str](), set[int](), True
    for process in (path for path in Path("/proc").iterdir() if path.name.isdecimal()):
        if process.name == str(os.getpid()):
            continue
        try:
            handles = list((process / "fd").iterdir())
        except PermissionError:
            whole = False
            continue
        except OSError:  # it has ended
            continue
        for handle in handles:
            try:
                stat = handle.stat()
            except OSError:
                continue
            if wanted.get(stat.st_ino) == stat.st_dev:
                found[stat.st_ino] = f"{_name(process)} (pid {process.name})"
                if _writes(process / "fdinfo" / handle.name):
                    writing.add(stat.st_ino)
    return Holders(found, frozenset(writing), whole)


def _writes(info: Path) -> bool:
    """https://man7.org/linux/man-pages/man5/proc_pid_fdinfo.5.html"""
    try:
        (flags,) = (line.split()[1] for line in info.read_text().splitlines() if line.startswith("flags:"))
    except (OSError, ValueError):
        return False
    return int(flags, 8) & os.O_ACCMODE != os.O_RDONLY


def _name(process: Path) -> str:
    try:
        return (process / "comm").read_text(errors="replace").strip()
    except OSError:
        return "a process"


@action(of=lambda file: Act(REMOVE, str(file.path)), idempotent=True)
def remove_log(file: LogFile, before: datetime) -> bool:
    """Delete a rotated file after another check: the same file, still old, not open. Returns True if it is deleted."""
    try:
        stat = file.path.stat()
        same = stat.st_ino == file.inode and stat.st_mtime < before.timestamp()
        if same and file.inode not in read_holders.work([file]).by_inode:
            file.path.unlink()
            return True
    except FileNotFoundError:  # logrotate was quicker, or a run that was killed
        return True
    return False
