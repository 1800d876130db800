"""The host: free space."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from runbook.errors import OpsError
from runbook.kinds import probe

LOCAL = ("localhost", "127.0.0.1", "::1", "")


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
        OpsError: the path is not on this host at all, or closed to this user.
    """
    there = path
    try:
        while not there.exists():
            if there == there.parent:
                raise OpsError(f"{path} is not on this host")
            there = there.parent
        found = os.statvfs(there)
        return Disk(str(path), found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize, there.stat().st_dev)
    except OSError as error:
        raise OpsError(f"the disk of {path} cannot be measured: {error.strerror}", "let this user see it") from None


def is_here(host: str) -> bool:
    """Whether a server's address, or the directory of its socket, is this host's."""
    return host in LOCAL or host.startswith("/")


def disk_on(host: str, path: Path) -> Disk | None:
    """Free space in a directory of the server at `host`; None where this host, or this user, cannot see it."""
    try:
        return disk_of(path) if is_here(host) and path.exists() else None
    except (OSError, OpsError):
        return None


@probe
def read_disk(path: Path) -> Disk:
    """See `disk_of`."""
    return disk_of(path)
