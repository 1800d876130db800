"""The host: free space."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from runbook.errors import OpsError
from runbook.kinds import probe


@dataclass(frozen=True)
class Disk:
    """The file system that a path is on (or its nearest parent that exists). `device` tells two apart."""

    path: str
    total_bytes: int
    free_bytes: int
    device: int


def disk_of(path: Path) -> Disk:
    """Free space for this user where `path` is or will be.

    Raises:
        OpsError: the path is not on this host at all.
    """
    there = path
    while not there.exists():
        if there == there.parent:
            raise OpsError(f"{path} is not on this host")
        there = there.parent
    found = os.statvfs(there)
    return Disk(str(path), found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize, there.stat().st_dev)


@probe
def read_disk(path: Path) -> Disk:
    """See `disk_of`."""
    return disk_of(path)
