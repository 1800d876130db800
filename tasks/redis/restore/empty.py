"""A data directory for a Redis that lost its own and has no backup."""

from __future__ import annotations

import os

from blocks.redis import Redis
from runbook import shell
from runbook.kinds import action
from tasks.redis.restore.swap import superseded_redis
from tasks.redis.server import live_directory


@action(idempotent=True)
def prepare_empty(block: Redis) -> str:
    """Give a Redis without its data directory one: the newest that a restore set aside (a run killed between its two
    renames leaves that), else an empty one owned by the server's user. Returns what was done, "" where one is there."""
    directory = live_directory(block)
    if directory.exists():
        return ""
    if aside := superseded_redis(block):
        aside[-1].rename(directory)
        return f"{aside[-1].name} was put back"
    directory.mkdir(mode=0o750)
    if os.geteuid() == 0:
        os.chown(directory, *shell.owner_of(block.os_user))
    return "an empty one was made: its data is gone, and there is no backup of it"
