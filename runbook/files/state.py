"""The directory of this tool's own state, which all environments of a host share."""

from __future__ import annotations

import os
import stat
from pathlib import Path

SYSTEM = Path("/var/lib/interview-ops")
"""The worker unit's StateDirectory (systemd.exec(5)); in a container a volume."""
OWN = Path.home() / ".local" / "state" / "interview-ops"
VARIABLE = "XDG_STATE_HOME"


def state_directory() -> Path:
    """Return the host's state directory if this account can write it, otherwise the account's own."""
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen) / "interview-ops"
    nearest = next(one for one in (SYSTEM, *SYSTEM.parents) if one.exists())
    return SYSTEM if os.access(nearest, os.W_OK) else OWN


def private_directory(name: str) -> Path:
    """Create a directory in it that no other account can enter.

    Raises:
        OSError: it cannot be created, or another account owns it.
    """
    path = state_directory() / name
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise PermissionError(1, "it is a link or belongs to another account", str(path))
    if found.st_mode & 0o077:
        path.chmod(0o700)
    return path
