"""The swap of two data directories, the service around it, and the proof on the live server."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import redis

from blocks.redis.server import Redis
from blocks.services.service import Services
from runbook.current import leaves, removed
from runbook.errors import OpsError, Unreachable, VerificationFailed
from runbook.failpoint import failpoint
from runbook.files import durable, inside
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from runbook.wait import until
from tasks.host.services import refuse_ended, start_one, stopped
from tasks.redis.restore.copy import ACT, MODE, RedisCopy, own
from tasks.redis.restore.final_save import LastState, client_writes, final_save, has_lost_directory
from tasks.redis.server import (
    LOAD_SECONDS,
    answers,
    at_once,
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
    """The directory that is now live, and the path of the old one (None: there was none)."""

    live: Path
    kept: Path | None


@dataclass(frozen=True)
class StoppedRedis:
    """Whether the service ran, and the last state of the server that was stopped (None: none answered)."""

    was_running: bool
    last: LastState | None


@action(idempotent=True)
def stop_redis(block: Redis, services: Services) -> StoppedRedis:
    """Save what only the server's memory has, stop the service, and prove that it exited.

    Raises:
        OpsError: its data cannot be saved; its port still answers, or a server still works in its directory.
    """
    was_running = services.state(ROLE).comes_back
    live = live_directory(block)
    with _last_save(block, live) as last:
        if was_running:
            leaves(stopped(ROLE), f"start {services.names[ROLE]}, or run the runbook again")
        services.stop(ROLE)
        _prove_exit(block, live, STOP_SECONDS)
    return StoppedRedis(was_running, last)


@contextlib.contextmanager
def _last_save(block: Redis, live: Path) -> Iterator[LastState | None]:
    if not has_lost_directory(block):
        with final_save(block, live) as last:
            yield last
        return
    # Without its directory a server cannot save and refuses to stop (https://valkey.io/commands/shutdown/). What it had
    # is a backup by now (`flows.redis.backup.keep_live`).
    with connected(block) as client:
        client.config_set("save", "")
    yield None


@action(idempotent=True)
def start_redis(block: Redis, services: Services) -> float:
    """Start the service and wait until it has loaded its data; returns the seconds.

    Raises:
        Unreachable: it does not serve in time.
        OpsError: it does not start, stops while it loads, or refuses the password.
    """
    started, start = time.monotonic(), _Start(block, services)
    start_one(services, ROLE)
    until(start.is_done, what="loading", seconds=LOAD_SECONDS, hint=LOG)
    return time.monotonic() - started


class _Start:
    """A starting server: it can load for any time, but must not stop repeatedly meanwhile."""

    def __init__(self, block: Redis, services: Services) -> None:
        self._block, self._services = block, services
        self._lives = set[str]()
        self._silent_since = time.monotonic()

    def is_done(self) -> bool:
        """Whether it serves.

        Raises:
            OpsError: it does not answer for a minute, stops, or refuses the password.
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


@action(of=lambda block: Act(ACT, block.data_directory))
def swap_redis(block: Redis, copy: RedisCopy) -> SwappedRedis:
    """Rename the copy to the live directory's name; the old directory is kept as `<name>.superseded_<time, UTC>`.

    A kill between the two renames loses nothing: the service does not start without its directory, and the next restore
    builds a new copy.

    Raises:
        VerificationFailed: the copy differs from the backup.
        OpsError: the server has not exited, or a rename failed (then the old directory is back).
    """
    if not copy.comparison.is_equal:
        raise VerificationFailed("the copy differs from the backup", copy.comparison.differences[0])
    live = live_directory(block)
    swapped = exchange(block, copy.directory, free_name(live) if live.exists() else None)
    removed(f"directory {copy.directory}")
    return swapped


def exchange(block: Redis, incoming: Path, kept: Path | None) -> SwappedRedis:
    """Rename a directory to the live name; an existing one is kept as `kept`.

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
    """The live server has the copy's data; returns differences as sentences.

    The number of keys that it loaded at its start must be that of the proven file; no client changes that number.
    Current keys without a TTL are counted too, as long as no client has written.

    Raises:
        Unreachable: it does not answer.
    """
    with connected(block) as client:
        info = client.info("persistence")
        if info["loading"]:
            raise Unreachable("Redis is still loading its data")
        return (*_persistence(info, copy), *_loaded(client, copy), *missing_keys(client, copy.persistent))


def superseded_redis(block: Redis) -> list[Path]:
    """Data directories that a restore replaced, oldest first."""
    live = live_directory(block)
    return sorted(path for path in live.parent.glob(f"{live.name}{SUPERSEDED}*") if path.is_dir())


def _prove_exit(block: Redis, live: Path, seconds: float) -> None:
    try:
        until(lambda: not answers(block) and not holders(block, live), what="the stop of Redis", seconds=seconds)
    except Unreachable:
        by = f"process {holders(block, live)} works in {live}" if holders(block, live) else "its port answers"
        raise OpsError(f"Redis did not stop: {by}", "stop it by hand, then run this again") from None


def free_name(live: Path) -> Path:
    """The name of a replaced directory: `<name>.superseded_<time, UTC>`."""

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
    """Databases with too few keys without a TTL, as sentences; empty if a client has written."""
    counts = key_counts(client)
    # Read after the counts: a deletion before them is counted as a write by now.
    if client_writes(client):
        return []
    short = []
    for number, expected in persistent.items():
        keys, expires = counts.get(number, (0, 0))
        if keys - expires < expected:
            short.append(f"database {number} has {keys - expires:,} keys without a TTL instead of {expected:,}")
    if evicted := int(client.info("stats")["evicted_keys"]):
        short.append(f"{evicted:,} keys were evicted: maxmemory is too low for them")
    return short


@action(idempotent=True)
def prepare_empty(block: Redis) -> str:
    """Restore a missing data directory: the newest one that a restore replaced (a run was killed between its renames),
    or an empty one owned by the server's user. Returns what was done, "": it exists."""
    directory = live_directory(block)
    if directory.exists():
        return ""
    if aside := superseded_redis(block):
        aside[-1].rename(directory)
        return f"{aside[-1].name} was restored"
    inside.make_directory(directory, MODE)
    own(block, directory)
    return "an empty one was created: its data is lost, and there is no backup of it"
