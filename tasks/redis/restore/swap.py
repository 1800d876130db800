"""The swap of two data directories, the service around it, and the proof on the live server."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import redis

from blocks.redis.server import Redis
from blocks.services.service import Services
from runbook import shell
from runbook.errors import OpsError, Unreachable, VerificationFailed
from runbook.failpoint import failpoint
from runbook.files import durable
from runbook.guard.permit import Permit
from runbook.kinds import action, probe
from runbook.wait import until
from tasks.host.services import Stopped, refuse_ended, start_one
from tasks.redis.restore.copy import ACT, RedisCopy
from tasks.redis.server import (
    LOAD_SECONDS,
    answers,
    at_once,
    call,
    connected,
    holders,
    key_counts,
    live_directory,
    loaded_keys,
)

SUPERSEDED = ".superseded_"
STAMP = "%Y%m%d_%H%M%S"
ROLE = "redis"
STOP_SECONDS = 60.0
SERVE_SECONDS = 60.0
MOST_LIVES = 3
LOG = "check the log of the service redis"


@dataclass(frozen=True)
class SwappedRedis:
    """The directory that is live now, and where the old one is kept (None where there was none)."""

    live: Path
    kept: Path | None


@action(idempotent=True)
def stop_redis(block: Redis, services: Services) -> Stopped:
    """Stop the service and prove that it exited.

    Raises:
        OpsError: somebody still answers on its port, or a server still works in its directory.
    """
    was_running = services.is_running(ROLE)
    live = live_directory(block)
    if not live.is_dir():
        # A server that cannot save refuses to end (https://valkey.io/commands/shutdown/): its directory is gone.
        with contextlib.suppress(OpsError), connected(block) as client:
            client.config_set("save", "")
    services.stop(ROLE)
    _prove_exit(block, live, STOP_SECONDS)
    return Stopped((ROLE,), (ROLE,) if was_running else ())


@action(idempotent=True)
def start_redis(block: Redis, services: Services) -> float:
    """Start the service and wait until it has loaded its data; returns the seconds.

    Raises:
        Unreachable: it does not serve in time.
        OpsError: it does not start, ends while it loads, or refuses the password.
    """
    started, start = time.monotonic(), _Start(block, services)
    start_one(services, ROLE)
    until(start.is_done, what="loading", seconds=LOAD_SECONDS, hint=LOG)
    return time.monotonic() - started


class _Start:
    """A server that comes up: it loads for as long as it takes, but does not die again and again meanwhile."""

    def __init__(self, block: Redis, services: Services) -> None:
        self._block, self._services = block, services
        self._lives = set[str]()
        self._silent_since = time.monotonic()

    def is_done(self) -> bool:
        """Whether it serves.

        Raises:
            OpsError: it does not answer for a minute, ends while it loads or for good, or refuses the password.
        """
        with contextlib.closing(at_once(self._block.client())) as client:
            try:
                info = client.info()  # also while it loads
            except redis.RedisError as error:
                refused = self._block.refused(error)
                if isinstance(refused, Unreachable):
                    refuse_ended(self._services, ROLE)
                    if time.monotonic() - self._silent_since > SERVE_SECONDS:
                        raise OpsError(
                            f"Redis does not answer for {SERVE_SECONDS:.0f} s after its start", LOG
                        ) from None
                raise refused from None
        self._silent_since = time.monotonic()
        self._lives.add(str(info["run_id"]))
        if len(self._lives) > MOST_LIVES:
            raise OpsError("Redis stops repeatedly while it loads its data", LOG)
        return not info["loading"]


@action
def swap_redis(permit: Permit, block: Redis, copy: RedisCopy) -> SwappedRedis:
    """Give the copy the live directory's name; the old directory is kept as `<name>.superseded_<time, UTC>`.

    Killed between its two renames, nothing is lost: the service does not start without its directory, and the next
    restore builds anew.

    Raises:
        NotConfirmed: the permit does not cover this directory.
        VerificationFailed: the copy differs from the backup.
        OpsError: the server has not exited, or a rename failed (then the old directory is back).
    """
    permit.require(ACT, block.data_directory)
    if not copy.comparison.is_equal:
        raise VerificationFailed("the copy differs from the backup", copy.comparison.differences[0])
    live = live_directory(block)
    return exchange(block, copy.directory, free_name(live) if live.exists() else None)


def exchange(block: Redis, incoming: Path, kept: Path | None) -> SwappedRedis:
    """Give a directory the live name; the one that has it is kept as `kept`, where there is one.

    Raises:
        OpsError: the server has not exited, or a rename failed (then the live directory is back).
    """
    live = live_directory(block)
    _prove_exit(block, live, 0.0)
    failpoint("redis: before first rename")
    if kept and live.exists():
        live.rename(kept)
        failpoint("redis: between renames")
    try:
        incoming.rename(live)
    except OSError as error:
        if kept and not live.exists():
            kept.rename(live)
        raise OpsError(f"{incoming} cannot be renamed: {error.strerror}", "the old data is in place") from None
    durable.sync(live.parent)
    failpoint("redis: after second rename")
    return SwappedRedis(live, kept)


@probe
def verify_live_redis(block: Redis, copy: RedisCopy) -> tuple[str, ...]:
    """Whether the live server serves the copy; differences as sentences.

    How many keys it loaded at its start must be the very number of the file that was proven: no client changes that
    number. Keys that are there now are counted too, those without a TTL only, and only while no client has written:
    a client may delete what it likes.

    Raises:
        Unreachable: it does not answer.
    """
    with connected(block) as client:
        info = client.info("persistence")
        if info["loading"]:
            raise Unreachable("Redis is still loading its data")
        return (*_persistence(info, copy), *_loaded(client, copy), *missing_keys(client, copy.persistent))


def superseded_redis(block: Redis) -> list[Path]:
    """Data directories that a restore set aside, oldest first."""
    live = live_directory(block)
    return sorted(path for path in live.parent.glob(f"{live.name}{SUPERSEDED}*") if path.is_dir())


def _prove_exit(block: Redis, live: Path, seconds: float) -> None:
    try:
        until(lambda: not answers(block) and not holders(block, live), what="the stop of Redis", seconds=seconds)
    except Unreachable:
        by = f"process {holders(block, live)} works in {live}" if holders(block, live) else "its port answers"
        raise OpsError(f"Redis did not stop: {by}", "stop it by hand, then run this again") from None


def free_name(live: Path) -> Path:
    """The name under which a live directory is kept: `<name>.superseded_<time, UTC>`."""

    def free() -> Path | None:
        kept = live.with_name(f"{live.name}{SUPERSEDED}{datetime.now(UTC):{STAMP}}")
        return None if kept.exists() else kept

    kept = until(free, what="an unused name for the old data", seconds=5)
    assert kept
    return kept


def _persistence(info: dict[str, Any], copy: RedisCopy) -> list[str]:
    wrong = []
    if bool(info["aof_enabled"]) != copy.appendonly:
        states = ("off", "on")
        wrong.append(f"the AOF is {states[info['aof_enabled']]}, the configuration says {states[copy.appendonly]}")
    for name in ("aof_last_bgrewrite_status", "aof_last_write_status", "rdb_last_bgsave_status"):
        if info.get(name, "ok") != "ok":
            wrong.append(f"{name} is {info[name]}")
    return wrong


def _loaded(client: redis.Redis, copy: RedisCopy) -> list[str]:
    loaded, expected = loaded_keys(client), copy.base_keys if copy.appendonly else copy.rdb_keys
    if loaded == -1 or expected - copy.may_vanish <= loaded <= expected:
        return []
    return [f"the server loaded {loaded:,} keys at its start, the proven copy has {expected:,}"]


def missing_keys(client: redis.Redis, persistent: Mapping[int, int]) -> list[str]:
    """Databases with fewer keys without a TTL than there should be, as sentences; none once a client has written."""
    counts = key_counts(client)
    # Read after the counts: a deletion that they miss has been counted as a write by now.
    if _client_writes(client):
        return []
    short = []
    for number, expected in persistent.items():
        keys, expires = counts.get(number, (0, 0))
        if keys - expires < expected:
            short.append(f"database {number} has {keys - expires:,} keys without a TTL instead of {expected:,}")
    if evicted := int(client.info("stats")["evicted_keys"]):
        short.append(f"{evicted:,} keys were evicted: maxmemory is too low for them")
    return short


def _client_writes(client: redis.Redis) -> int:
    """Calls of commands that may write, since the server started (what it replays from its AOF does not count)."""
    writing = {name.decode() for name in call(client, "COMMAND LIST", "FILTERBY", "ACLCAT", "write")}
    writing |= {"eval", "evalsha", "fcall", "exec"}
    stats = client.info("commandstats")
    return sum(
        int(found["calls"]) for name, found in stats.items() if name.removeprefix("cmdstat_").split("|")[0] in writing
    )


@action(idempotent=True)
def prepare_empty(block: Redis) -> str:
    """Give a Redis without its data directory one: the newest that a restore set aside (a run killed between its two
    renames leaves that), else an empty one owned by the server's user. Returns what was done, "" where one is there."""
    directory = live_directory(block)
    if directory.exists():
        return ""
    if aside := superseded_redis(block):
        aside[-1].rename(directory)
        return f"{aside[-1].name} was restored"
    directory.mkdir(mode=0o750)
    if os.geteuid() == 0:
        os.chown(directory, *shell.owner_of(block.os_user))
    return "an empty one was created: its data is lost, and there is no backup of it"
