"""Keys that may go: counted and unlinked page by page, or a database flushed as a whole (§2.2).

No call holds the server for longer than a fraction of a millisecond, but for what a single big value takes: other
clients go in between. What is deleted propagates to the replicas as UNLINK or FLUSH.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import redis

from blocks.redis import Redis
from runbook.errors import OpsError, Unreachable
from runbook.kinds import action, probe
from runbook.permit import Permit
from runbook.progress import progress
from runbook.wait import until
from tasks.redis.cache.pages import Ask
from tasks.redis.cache.recheck import Recheck, require_master
from tasks.redis.cache.script import FLUSH, Scripts, evaluated, scripts_of
from tasks.redis.cache.selection import Selection
from tasks.redis.cache.sweep import FIRST_KEYS, Pace, Sweep, Tally, client_of, describe, sweep
from tasks.redis.server import call, connected, key_counts, version_of

UNLINK = "unlink Redis keys of"
FLUSHING = "flush Redis"
EVERYTHING = -1
TOLERANCE = 0.1
MEASURED_KEYS = 20_000
FREEING_SECONDS = 60.0


@dataclass(frozen=True)
class CacheServer:
    """The server before anything is done. `counts`: database → (keys, keys with a TTL), as INFO keyspace has them.

    `scripts`: how its user may call them. `saves`: it has save points, or does not say: FLUSHALL empties its RDB then.
    """

    address: str
    version: str
    role: str
    replicas: int
    counts: Mapping[int, tuple[int, int]]
    used_bytes: int
    scripts: Scripts
    saves: bool

    def keys_in(self, databases: tuple[int, ...]) -> int:
        """Of some databases together."""
        return sum(self.counts.get(number, (0, 0))[0] for number in databases)

    def without_ttl_in(self, databases: tuple[int, ...]) -> int:
        """Of some databases together."""
        return self.keys_in(databases) - sum(self.counts.get(number, (0, 0))[1] for number in databases)


@dataclass(frozen=True)
class Order:
    """What is to be unlinked, as it was planned: `planned` -1 was not counted, then as many go as are found; else it
    stops where the number is beyond the tolerance."""

    selection: Selection
    databases: tuple[int, ...]
    server: CacheServer
    planned: int = -1
    keys_per_second: int = 0

    @property
    def target(self) -> str:
        """For people and permits."""
        counted = f": {self.planned:,} keys" if self.planned >= 0 else ""
        numbers = ", ".join(f"db {number}" for number in self.databases)
        return f"{self.selection.told} in {numbers} of {self.server.address}{counted}"

    def require_room(self, keys: int) -> None:
        """Raises OpsError where more were unlinked than the tolerance allows (by a page at most)."""
        if self.planned >= 0 and keys > self.planned + slack(self.planned):
            raise OpsError(
                f"there are more keys than the {self.planned:,} that were planned",
                "look who adds them, then plan again with an empty confirm",
            )


@dataclass(frozen=True)
class Flush:
    """A database (or EVERYTHING) with its number of keys, as it was planned."""

    database: int
    keys: int
    server: CacheServer

    @property
    def target(self) -> str:
        """For people and permits."""
        which = "all databases" if self.database == EVERYTHING else f"db {self.database}"
        return f"{which} of {self.server.address}: {self.keys:,} keys"


@dataclass(frozen=True)
class Freed:
    """Memory after the work; `pending` values are still being freed."""

    used_bytes: int
    pending: int


def slack(keys: int) -> int:
    """How far a number of keys may be from the one that was confirmed."""
    return math.ceil(keys * TOLERANCE)


@probe
def read_cache_server(block: Redis) -> CacheServer:
    """Role, replicas, keys and memory, and whether scripts are permitted.

    Raises:
        Unreachable: it is down.
        OpsError: it refuses the password or a command.
    """
    with connected(block) as client:
        replication = client.info("replication")
        return CacheServer(
            address=block.address,
            version=version_of(client),
            role=str(replication["role"]),
            replicas=int(replication.get("connected_slaves", 0)),
            counts=key_counts(client),
            used_bytes=int(client.info("memory")["used_memory"]),
            scripts=scripts_of(client),
            saves=_has_save_points(client),
        )


@probe
def find_keys(block: Redis, selection: Selection, databases: tuple[int, ...], server: CacheServer) -> Sweep:
    """Count what a clearing would unlink, by prefix, and describe the first keys.

    Raises:
        Unreachable: it does not answer.
        OpsError: it refuses a command, or has no such database.
    """
    tally = Tally(server.keys_in(databases))
    with connected(block), progress(lambda: tally.told("counted")):
        for number in databases:
            sweep(block, number, _ask(selection, server, number), tally, names=FIRST_KEYS)
        return tally.result(describe(block, tally.names))


@action
def unlink_keys(permit: Permit, block: Redis, order: Order) -> Sweep:
    """Unlink what the order names, page by page. An error on the way ends it and is part of the result (`stopped`).

    That the server is still the master it says itself with every page (READONLY); the Sentinels are asked every second.

    Raises:
        NotConfirmed: the permit does not cover the order.
    """
    permit.require(UNLINK, order.target)
    server, tally = block.at(order.server.address), Tally(order.server.keys_in(order.databases))
    recheck, pace = Recheck(block, order.server.address), Pace(order.keys_per_second)

    def between() -> None:
        order.require_room(tally.keys)
        pace.keep(tally.keys)
        recheck()

    try:
        with connected(server), progress(lambda: tally.told("unlinked")):
            for number in order.databases:
                ask = _ask(order.selection, order.server, number, unlink=True)
                sweep(server, number, ask, tally, most_step=pace.most_step, between=between)
    except OpsError as error:
        return tally.result(stopped=recheck.reason(error))
    return tally.result()


@action
def flush_keys(permit: Permit, block: Redis, flush: Flush) -> int:
    """FLUSHDB or FLUSHALL ASYNC; returns how many keys there were. In one call with the count, which must still be what
    was planned, within the tolerance; without EVAL the count comes a moment before.

    Raises:
        NotConfirmed: the permit does not cover it.
        OpsError: the count changed, or the server is no longer the master.
    """
    permit.require(FLUSHING, flush.target)
    require_master(block, flush.server.address)
    server = block.at(flush.server.address)
    with connected(server), client_of(server, max(flush.database, 0)) as client:
        done, keys = _flush(client, flush)
    if not done:
        raise OpsError(
            f"{flush.keys:,} keys were planned, now there are {keys:,}: nothing was flushed",
            "look who writes, then plan again with an empty confirm",
        )
    return keys


@probe
def read_freed(block: Redis) -> Freed:
    """Memory in use when what was unlinked has been freed, or a minute later.

    Raises:
        Unreachable: it does not answer.
    """
    with connected(block) as client:

        def pending() -> int:
            return int(client.info("memory").get("lazyfree_pending_objects", 0))

        with contextlib.suppress(Unreachable):
            until(lambda: not pending(), what="the freeing", seconds=FREEING_SECONDS)
        return Freed(int(client.info("memory")["used_memory"]), pending())


def _ask(selection: Selection, server: CacheServer, number: int, *, unlink: bool = False) -> Ask:
    stride = max(1, server.keys_in((number,)) // MEASURED_KEYS)
    return Ask(selection, unlink, stride, server.scripts)


def _has_save_points(client: redis.Redis) -> bool:
    try:
        return any(client.config_get("save").values())
    except redis.ResponseError:
        return True


def _flush(client: redis.Redis, flush: Flush) -> tuple[bool, int]:
    command = "FLUSHALL" if flush.database == EVERYTHING else "FLUSHDB"
    least, most = flush.keys - slack(flush.keys), flush.keys + slack(flush.keys)
    if flush.server.scripts:
        done, keys = evaluated(client, flush.server.scripts, FLUSH, command, least, most)
        return bool(done), int(keys)
    counts = key_counts(client)
    keys = sum(count for number, (count, _) in counts.items() if flush.database in (EVERYTHING, number))
    if done := least <= keys <= most:
        call(client, command, "ASYNC")
    return done, keys
