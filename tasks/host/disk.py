"""The host: free space."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from blocks.hosts import is_here
from runbook.errors import OpsError
from runbook.kinds import probe
from runbook.units import size

__all__ = ["Disk", "disk_of", "disk_on", "is_here", "read_disk"]
INODES_RATIO = 0.8  # fewer used inodes never limit


@dataclass(frozen=True)
class Disk:
    """The file system of a path, or of its nearest existing parent. `device` identifies it. Without free inodes it is
    full, even with free bytes. `reserved_bytes` are free for root only."""

    path: str
    total_bytes: int
    free_bytes: int
    device: int
    inodes_ratio: float = 0.0
    reserved_bytes: int = 0

    @property
    def bytes_ratio(self) -> float:
        """The used share of the space that is not reserved for root, as in df.

        https://man7.org/linux/man-pages/man1/df.1.html
        """
        usable = self.total_bytes - self.reserved_bytes
        return 1 - self.free_bytes / usable if usable > 0 else 0.0

    @property
    def used_ratio(self) -> float:
        """The used share of bytes or of inodes, the higher of the two."""
        return max(self.bytes_ratio, self.inodes_ratio)

    @property
    def told(self) -> str:
        """The free space in words."""
        inodes = f", {self.inodes_ratio:.0%} of its inodes used" if self.inodes_ratio > INODES_RATIO else ""
        return f"{size(self.free_bytes)} of {size(self.total_bytes)} free{inodes}"


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
        inodes = 1 - found.f_favail / found.f_files if found.f_files else 0.0  # btrfs counts none
        reserved = (found.f_bfree - found.f_bavail) * found.f_frsize
        return Disk(
            str(path),
            found.f_blocks * found.f_frsize,
            found.f_bavail * found.f_frsize,
            there.stat().st_dev,
            inodes,
            reserved,
        )
    except OSError as error:
        hint = "give this user read permission on its directories"
        raise OpsError(f"the disk of {path} cannot be measured: {error.strerror}", hint) from None


def disk_on(host: str, path: Path) -> Disk | None:
    """Free space in a directory of the server at `host`; None: not visible from this host, or to this user."""
    try:
        return disk_of(path) if is_here(host) and path.exists() else None
    except (OSError, OpsError):
        return None


@probe
def read_disk(path: Path) -> Disk:
    """See `disk_of`."""
    return disk_of(path)
