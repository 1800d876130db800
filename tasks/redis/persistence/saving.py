"""Saves that are proven to have succeeded: BGSAVE, SAVE, BGREWRITEAOF (§2.3).

BGSAVE and BGREWRITEAOF return at once. `rdb_saves` and `aof_rewrites` count started saves, and a save that the server
aborts (FLUSHALL, a full synchronisation) does not change the last status. So the proof of a save is that LASTSAVE
changed. LASTSAVE has a resolution of one second, so a save starts at least a second after the previous one ended. With
save rules, a FLUSHALL changes LASTSAVE too, because the server then saves the empty data: FLUSHALLs are counted.

https://valkey.io/commands/bgsave/, https://valkey.io/commands/save/ and https://valkey.io/commands/bgrewriteaof/
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import redis

from blocks.redis.server import Redis
from runbook.errors import OpsError, Unreachable
from runbook.failpoint import failpoint
from runbook.guard.permit import Act
from runbook.kinds import action
from runbook.progress import WorkDone, progress
from runbook.wait import until
from tasks.redis.persistence.failures import failed
from tasks.redis.persistence.state import Persistence, PersistenceState, read_state
from tasks.redis.server import connected

BLOCK = "block every client of Redis for a SAVE"
"""The act in a permit, with the server's address."""
SAVE_SECONDS = 3600.0
GONE_SECONDS = 3.0
STEP_SECONDS = 1.05
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Saved:
    """A proven save: the counters before and after it, and its seconds. `taken`: a time before its fork; every write
    acknowledged by then is in it."""

    before: PersistenceState
    after: PersistenceState
    taken: datetime
    seconds: float


@action
def save_in_background(block: Redis, server: Persistence) -> Saved:
    """BGSAVE. If a save is running, waits for it and then starts its own.

    Raises:
        OpsError: it failed (with the reason from INFO and the disk), or the server stopped or changed its role.
    """
    return bgsave(block, server)


def bgsave(block: Redis, server: Persistence) -> Saved:
    """See `save_in_background`."""
    return carry_out(block, server, "BGSAVE", lambda client: client.bgsave(schedule=False), _is_saved)


@action
def rewrite_aof(block: Redis, server: Persistence) -> Saved:
    """BGREWRITEAOF. If a save is running, waits for it and then starts its own.

    Raises:
        OpsError: as `save_in_background`, or the AOF is off.
    """
    return carry_out(block, server, "BGREWRITEAOF", lambda client: client.bgrewriteaof(), _is_rewritten)


@action(of=lambda server: Act(BLOCK, server.address))
def save_blocking(block: Redis, server: Persistence) -> Saved:
    """SAVE: it blocks every client until it ends.

    Raises:
        OpsError: as `save_in_background`.
    """
    return carry_out(block, server, "SAVE", _save, _is_saved)


def _save(client: redis.Redis) -> None:
    """Use a separate connection: the answer takes longer than a client's usual timeout."""
    pool = client.connection_pool
    usual, pool.connection_kwargs["socket_timeout"] = pool.connection_kwargs["socket_timeout"], SAVE_SECONDS
    pool.disconnect()
    try:
        client.save()
    finally:
        pool.connection_kwargs["socket_timeout"] = usual
        pool.disconnect()


def _is_saved(before: PersistenceState, now: PersistenceState) -> bool:
    return now.last_save > before.last_save and now.flushes <= before.flushes


def _is_rewritten(before: PersistenceState, now: PersistenceState) -> bool:
    return now.rewrites > before.rewrites and now.rewrite_ok and now.aof_enabled and not now.rewriting


def carry_out(
    block: Redis,
    server: Persistence,
    what: str,
    begin: Callable[[redis.Redis], object],
    is_done: Callable[[PersistenceState, PersistenceState], bool],
    has_failed: Callable[[PersistenceState, PersistenceState], bool] | None = None,
) -> Saved:
    """Start a save when no other runs, and wait until it is proven. It failed if no save runs any more, or if
    `has_failed`.

    Raises:
        OpsError: as `save_in_background`.
    """
    with connected(block) as client:
        watch = _Watch(client, server, what)
        with progress(watch.progress):
            begun = until(lambda: watch.start(begin), what="the end of another save", seconds=SAVE_SECONDS)
            assert begun
            before, taken = begun
            failpoint(f"redis: {what} begun")
            started = time.monotonic()

            def ended() -> PersistenceState | None:
                now = watch.read()
                if is_done(before, now):
                    return now
                if has_failed(before, now) if has_failed else not (now.saving or now.rewriting):
                    raise failed(server, what, now)
                return None

            after = until(ended, what=f"the end of {what}", seconds=SAVE_SECONDS, every_seconds=POLL_SECONDS)
            assert after
            return Saved(before, after, taken, time.monotonic() - started)


class _Watch:
    """A server's counters during a save, and proof that it is the same process with the same role."""

    def __init__(self, client: redis.Redis, server: Persistence, what: str) -> None:
        self._client, self._server, self._what = client, server, what
        self._lost: float | None = None
        self._is_begun = False
        self._last = server.state

    def start(self, begin: Callable[[redis.Redis], object]) -> tuple[PersistenceState, datetime] | None:
        """Start the save; returns the counters and the time before, or None if another save runs."""
        now = self.read()
        if now.rewriting and not now.rewrite_ok and now.rewrites > self._server.state.rewrites + 1:
            raise failed(self._server, "BGREWRITEAOF", now)  # the server retries a rewrite without end
        seconds, microseconds = self._client.time()
        if now.saving or now.rewriting or seconds + microseconds / 1e6 - now.last_save < STEP_SECONDS:
            return None
        taken = datetime.now(UTC)
        try:
            self._is_begun = True
            begin(self._client)
        except redis.exceptions.NoPermissionError:
            raise
        except redis.ResponseError as error:
            self._is_begun = False
            if "in progress" in str(error) or "child process is active" in str(error):
                return None  # another client's save started meanwhile
            raise failed(self._server, self._what, self.read(), str(error)) from None
        except redis.ConnectionError as error:
            if isinstance(error, redis.AuthenticationError):
                raise
            self.read()  # raises if the server stopped
            raise OpsError(f"the connection broke during {self._what}: {error}", "run it again") from None
        return now, taken

    def read(self) -> PersistenceState:
        """The counters now.

        Raises:
            Unreachable: it has not answered for a short time.
            OpsError: it stopped, was restarted, or has another role.
        """
        where, expected = f"Redis at {self._server.address}", self._server.state
        kept = "start it if it is down, then run this again. The earlier files are untouched"
        try:
            now = read_state(self._client)
        except redis.BusyLoadingError:
            raise OpsError(f"{where} was restarted {self._when}", kept) from None
        except (redis.ConnectionError, redis.TimeoutError) as error:
            if isinstance(error, redis.AuthenticationError):
                raise
            self._lost = self._lost or time.monotonic()
            if time.monotonic() - self._lost > GONE_SECONDS:
                raise OpsError(f"{where} stopped or cannot be reached {self._when}", kept) from None
            raise Unreachable(f"{where} does not answer") from None
        self._lost = None
        if now.run_id != expected.run_id:
            raise OpsError(f"{where} was restarted {self._when}", kept)
        if now.role != expected.role:
            raise OpsError(f"{where} was made {_named(now)} {self._when}", "run it again: it finds the new master")
        self._last = now
        return now

    def progress(self) -> WorkDone:
        """The progress, for the log."""
        state = self._last
        if not self._is_begun:
            return WorkDone(f"{self._what} waits for the end of another save", 0.0)
        if self._what == "SAVE":
            return WorkDone("SAVE: no client is served until it ends", 0.0)
        ratio = state.done_keys / state.all_keys if state.all_keys else 0.0
        return WorkDone(f"{self._what}: {state.done_keys:,} of {state.all_keys:,} keys", ratio)

    @property
    def _when(self) -> str:
        return f"during {self._what}" if self._is_begun else f"before {self._what} started"


def _named(state: PersistenceState) -> str:
    return "the master" if state.role == "master" else f"a replica of {state.master}"
