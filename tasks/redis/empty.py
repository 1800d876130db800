"""A data directory for a Redis that lost its own and has no backup."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

from blocks.redis import Redis
from runbook.kinds import action


@action(idempotent=True)
def prepare_empty(block: Redis) -> bool:
    """Create the data directory, owned by the server's user, where there is none; returns whether it did."""
    directory = Path(block.data_directory)
    if directory.exists():
        return False
    directory.mkdir(mode=0o750)
    if os.geteuid() == 0:
        owner = pwd.getpwnam(block.os_user)
        os.chown(directory, owner.pw_uid, owner.pw_gid)
    return True
