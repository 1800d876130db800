"""The live side of a restore: is it still what was judged when it is about to be replaced?

A server that was down can be started again by its supervisor, serve clients, and so have newer data than any source of
the restore. So it is read when it is judged, just before its stop, and when it is stopped.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import redis

from blocks.redis.server import Redis
from runbook import clock
from runbook.errors import LossExceeded, OpsError, Unreachable
from runbook.kinds import probe
from tasks.redis.persistence.newest import find_newest
from tasks.redis.restore.swap import StoppedRedis
from tasks.redis.server import GREETING_SECONDS, at_once, live_directory
from tasks.redis.settings.file import read_configuration


@dataclass(frozen=True)
class LiveRedis:
    """The server that a restore replaces, as of `at`. `run_id` "": none answers, or it hangs. `written`: the newest
    data in its files; None: there is none, or they are on another host. `replid`, `offset`: its replication stream, and
    how far it is; "" and 0 without an answer. `is_master`: it follows no other server."""

    at: datetime
    run_id: str = ""
    written: datetime | None = None
    replid: str = ""
    offset: int = 0
    is_master: bool = True


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
        LossExceeded: another process or server serves, or its files were written after it was found down.
    """
    now = _read(block)
    _require_same(block, judged, now)
    if now.run_id and judged.is_master and not now.is_master:
        raise _other(block, "follows another server since this run judged it, and clients write to that one")
    return now


@probe
def require_fenced(block: Redis, judged: LiveRedis, stopped: StoppedRedis) -> LiveRedis:
    """Check, when it is stopped, that the process which was judged is the last that clients could write to, and read
    how far it got. `run_id` "": it did not answer any more at its stop.

    Raises:
        LossExceeded: another process served meanwhile, or the files were written without one that was judged.
    """
    now, last = LiveRedis(datetime.now(UTC), written=_written(block)), stopped.last
    if last:
        now = replace(now, run_id=last.run_id, replid=last.replid, offset=last.offset)
    _require_same(block, judged, now)
    return now


@probe
def require_stopped(block: Redis, fenced: LiveRedis) -> LiveRedis:
    """Check, just before the swap, that nobody wrote to the files since the server was stopped. The swap itself refuses
    a server that runs.

    Raises:
        LossExceeded: a server did.
    """
    if _written(block) != fenced.written:
        raise _other(block, "ran again after this run had stopped it, and has written data")
    return fenced


def _require_same(block: Redis, judged: LiveRedis, now: LiveRedis) -> None:
    if now.run_id and now.run_id != judged.run_id:
        raise _other(
            block,
            "has restarted since this run judged it" if judged.run_id else "answers, although it was down when judged",
        )
    if not judged.run_id and now.written != judged.written:
        when = f"at {clock.text(now.written)}" if now.written else "or lost its files"
        raise _other(block, f"was down when judged, and has written data since, {when}")


def _other(block: Redis, what: str) -> LossExceeded:
    return LossExceeded(
        f"Redis at {block.address} {what}: more would be lost than was confirmed",
        "run it again: it judges the live data anew. Nothing of Redis was replaced",
    )


def _read(block: Redis) -> LiveRedis:
    found = LiveRedis(datetime.now(UTC))
    with contextlib.closing(at_once(block.client(answer_seconds=GREETING_SECONDS))) as client:
        try:
            server, stream = client.info("server"), client.info("replication")
            found = replace(
                found,
                run_id=str(server["run_id"]),
                replid=str(stream["master_replid"]),
                offset=int(stream["master_repl_offset"]),
                is_master=stream["role"] == "master",
            )
        except redis.RedisError as error:
            refused = block.refused(error)
            if not isinstance(refused, Unreachable):
                raise refused from None
    return replace(found, written=_written(block))


def _written(block: Redis) -> datetime | None:
    if not block.remote:
        with contextlib.suppress(OpsError, OSError):
            return find_newest(read_configuration(Path(block.config_file)), live_directory(block)).written
    return None
