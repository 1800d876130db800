"""Delete every key of a database in one call that first compares their number with the plan (§2.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from blocks.redis.server import Redis
from runbook.errors import OpsError
from runbook.guard.permit import Act
from runbook.kinds import action
from tasks.redis.cache.server import CacheServer, require_same
from tasks.redis.cache.sweep import client_of
from tasks.redis.script import evaluate
from tasks.redis.sentinels import require_master
from tasks.redis.server import connected

FLUSHING = "flush Redis"
TOLERANCE = 0.1
DONE, OTHER_SERVER = 1, -1

# {1: flushed, 0: another number of keys, -1: restarted, or no master; keys}
FLUSH = r"""
local function has(section, line) return string.find(redis.call('INFO', section), line, 1, true) end
if not has('server', 'run_id:' .. ARGV[3]) or not has('replication', 'role:master') then return {-1, 0} end
local keys = redis.call('DBSIZE')
if keys < tonumber(ARGV[1]) or keys > tonumber(ARGV[2]) then return {0, keys} end
redis.call('FLUSHDB', 'ASYNC')
return {1, keys}
"""


@dataclass(frozen=True)
class Flush:
    """A database with its planned number of keys. `waived`: too few Sentinels may name the master."""

    database: int
    keys: int
    server: CacheServer
    waived: bool = False

    @property
    def where(self) -> str:
        """The database, for people."""
        return f"db {self.database} of {self.server.address}"

    @property
    def target(self) -> str:
        """The database and its keys, for people and permits."""
        return f"{self.where}: {self.keys:,} keys"


def slack(keys: int) -> int:
    """By how many keys a number may differ from the planned one."""
    return math.ceil(keys * TOLERANCE)


@action(of=lambda flush: Act(FLUSHING, flush.target))
def flush_keys(block: Redis, flush: Flush) -> int:
    """FLUSHDB ASYNC; returns how many keys there were. The same call checks the server and the number of keys.

    Raises:
        Unreachable: no answer: it may be flushed.
        OpsError: the number of keys changed, or the server was restarted or replaced; it is not flushed.
    """
    require_master(block, flush.server.address, waived=flush.waived)
    server, most_change = block.at(flush.server.address), slack(flush.keys)
    words = (flush.keys - most_change, flush.keys + most_change, flush.server.run_id)
    with connected(server), client_of(server, flush.database) as client:
        done, keys = map(int, evaluate(client, FLUSH, *words, command="DBSIZE or FLUSHDB"))
        if done == OTHER_SERVER:
            require_same(client, flush.server)
    if done != DONE:
        raise OpsError(
            f"{flush.keys:,} keys were planned, now there are {keys:,}",
            "find out which client writes, then plan again with an empty confirm",
        )
    return keys
