"""Whether this user may give the commands of a failover, found out without giving one."""

from __future__ import annotations

from typing import Any, cast

import redis

from blocks.redis.server import Redis
from runbook.errors import OpsError
from runbook.kinds import probe
from tasks.redis.failover.group import quick
from tasks.redis.failover.ledger import MARKER, PREFIX

AFTERWARDS = (
    ("GET", MARKER),
    ("SADD", f"{PREFIX}x", "1"),
    ("EXPIRE", f"{PREFIX}x", "1"),
    ("SMEMBERS", f"{PREFIX}x"),
    ("UNLINK", f"{PREFIX}x", MARKER),
)
"""What the new master is asked."""
ALWAYS = (("CLIENT", "PAUSE", "1", "WRITE"), ("CLIENT", "UNPAUSE"), ("SET", MARKER, "", "EX", "1"), *AFTERWARDS)
DEMOTING = (("CONFIG", "REWRITE"), ("CLIENT", "KILL", "TYPE", "normal"), ("CLIENT", "KILL", "TYPE", "pubsub"))


@probe
def find_refused_commands(block: Redis, *, demotes: bool = False, promoted: bool = False) -> list[OpsError]:
    """Which commands of a failover this user may not give to this master; `demotes`: those that make it a replica too;
    `promoted`: to this replica, when it is the master.

    They are queued in a transaction that is discarded: none is carried out.

    Raises:
        OpsError, Unreachable: it cannot be asked at all.
    """
    mine = AFTERWARDS if promoted else ALWAYS
    more = (("REPLICAOF", block.host, str(block.port)), *DEMOTING) if demotes else ()
    refused: dict[str, OpsError] = {}
    with quick(block) as client:
        connection = cast(Any, client.connection_pool.get_connection())
        try:
            for words in (("MULTI",), *mine, *more, ("DISCARD",)):
                try:
                    connection.send_command(*words)
                    connection.read_response()
                except redis.ReadOnlyError:  # a replica says so of a write after it has looked at the rights
                    continue
                except redis.ResponseError as error:
                    told = block.refused(error)
                    refused.setdefault(told.message, told)
                    if words == ("MULTI",):
                        break  # without a transaction they would be carried out
        finally:
            connection.disconnect()
            client.connection_pool.release(connection)
    return list(refused.values())
