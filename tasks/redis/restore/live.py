"""The live side of a restore: is it still what was judged when it is about to be replaced?

A server that was down can be started again by its supervisor, serve clients, and so have newer data than any source of
the restore.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import redis

from blocks.redis.server import Redis
from runbook import clock
from runbook.errors import LossExceeded, OpsError, Unreachable
from runbook.kinds import probe
from tasks.redis.persistence.newest import find_newest
from tasks.redis.server import GREETING_SECONDS, at_once, live_directory
from tasks.redis.settings.file import read_configuration


@dataclass(frozen=True)
class LiveRedis:
    """The server that a restore replaces, as of `at`. `run_id` "": none answers, or it hangs. `written`: the newest
    data in its files; None: there is none, or they are on another host."""

    at: datetime
    run_id: str = ""
    written: datetime | None = None


@probe
def read_live(block: Redis) -> LiveRedis:
    """The server that answers now, also while it loads, and its files.

    Raises:
        OpsError: it refuses this user.
    """
    return _read(block)


@probe
def require_judged(block: Redis, judged: LiveRedis) -> LiveRedis:
    """Check that the live side is the one that was judged, and read how far it got. A server that stopped since then is
    the same: its files are read when they are replaced.

    Raises:
        LossExceeded: another process serves, or its files were written after it was found down.
    """
    now = _read(block)
    if now.run_id and now.run_id != judged.run_id:
        what = (
            "has restarted since this run judged it" if judged.run_id else "answers, although it was down when judged"
        )
    elif not judged.run_id and now.written != judged.written:
        when = f"at {clock.text(now.written)}" if now.written else "or lost its files"
        what = f"was down when judged, and has written data since, {when}"
    else:
        return now
    raise LossExceeded(
        f"Redis at {block.address} {what}: more would be lost than was confirmed",
        "run it again: it judges the live data anew. Nothing of Redis was replaced",
    )


def _read(block: Redis) -> LiveRedis:
    at, run_id, written = datetime.now(UTC), "", None
    with contextlib.closing(at_once(block.client(answer_seconds=GREETING_SECONDS))) as client:
        try:
            run_id = str(client.info("server")["run_id"])
        except redis.RedisError as error:
            refused = block.refused(error)
            if not isinstance(refused, Unreachable):
                raise refused from None
    if not block.remote:
        with contextlib.suppress(OpsError, OSError):
            written = find_newest(read_configuration(Path(block.config_file)), live_directory(block)).written
    return LiveRedis(at, run_id, written)
