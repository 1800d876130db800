"""A database, or all of them, emptied in one call that looks at the number of keys first (§2.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import redis

from blocks.redis.server import Redis
from runbook.errors import OpsError
from runbook.guard.permit import Permit
from runbook.kinds import action
from tasks.redis.cache.script import FLUSH, evaluated
from tasks.redis.cache.server import CacheServer, require_same
from tasks.redis.cache.sweep import client_of
from tasks.redis.sentinels import require_master
from tasks.redis.server import call, connected, key_counts

FLUSHING = "flush Redis"
EVERYTHING = -1
TOLERANCE = 0.1
DONE, MOVED = 1, -1


@dataclass(frozen=True)
class Flush:
    """A database (or EVERYTHING) with its number of keys, as it was planned. `waived`: the Sentinels need not vouch
    for the master."""

    database: int
    keys: int
    server: CacheServer
    waived: bool = False

    @property
    def command(self) -> str:
        """FLUSHALL or FLUSHDB."""
        return "FLUSHALL" if self.database == EVERYTHING else "FLUSHDB"

    @property
    def which(self) -> str:
        """For people."""
        return f"{'all databases' if self.database == EVERYTHING else f'db {self.database}'} of {self.server.address}"

    @property
    def target(self) -> str:
        """For people and permits."""
        return f"{self.which}: {self.keys:,} keys"


def slack(keys: int) -> int:
    """How far a number of keys may be from the one that was confirmed."""
    return math.ceil(keys * TOLERANCE)


@action
def flush_keys(permit: Permit, block: Redis, flush: Flush) -> int:
    """FLUSHDB or FLUSHALL ASYNC; returns how many keys there were. In one call with the count, which must still be what
    was planned, within the tolerance, and with a look whether it is the same server; without EVAL they come a moment
    before.

    Raises:
        NotConfirmed: the permit does not cover it.
        Unreachable: its answer did not come: it may be done.
        OpsError: the count changed, or the server is another or no longer the master; it was not done.
    """
    permit.require(FLUSHING, flush.target)
    require_master(block, flush.server.address, waived=flush.waived)
    server = block.at(flush.server.address)
    with connected(server), client_of(server, max(flush.database, 0)) as client:
        done, keys = _flush(client, flush)
        if done == MOVED:
            require_same(client, flush.server)
    if done != DONE:
        raise OpsError(
            f"{flush.keys:,} keys were planned, now there are {keys:,}",
            "look who writes, then plan again with an empty confirm",
        )
    return keys


def _flush(client: redis.Redis, flush: Flush) -> tuple[int, int]:
    least, most = flush.keys - slack(flush.keys), flush.keys + slack(flush.keys)
    if scripts := flush.server.scripts:
        words = (flush.command, least, most, flush.server.run_id)
        done, keys = evaluated(client, scripts, FLUSH, *words, named=f"DBSIZE or {flush.command}")
        return int(done), int(keys)
    require_same(client, flush.server)
    counts = key_counts(client)
    keys = sum(count for number, (count, _) in counts.items() if flush.database in (EVERYTHING, number))
    if done := least <= keys <= most:
        call(client, flush.command, "ASYNC")
    return done, keys
