"""Whether this user may run a failover's commands, without running them."""

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
"""The commands for the new master."""
ALWAYS = (("CLIENT", "PAUSE", "1", "WRITE"), ("CLIENT", "UNPAUSE"), ("SET", MARKER, "", "EX", "1"), *AFTERWARDS)
DEMOTING = (("CONFIG", "REWRITE"), ("CLIENT", "KILL", "TYPE", "normal"), ("CLIENT", "KILL", "TYPE", "pubsub"))


@probe
def find_refused_commands(block: Redis, *, demotes: bool = False, promoted: bool = False) -> list[OpsError]:
    """The commands of a failover that this user may not run on this master; `demotes`: also those that demote it;
    `promoted`: on this replica, after its promotion.

    They are queued in a transaction that is discarded, so none is executed.

    Raises:
        OpsError, Unreachable: it cannot be queried.
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
                except redis.ReadOnlyError:  # a replica refuses a write only after it has checked the rights
                    continue
                except redis.ResponseError as error:
                    refusal = block.refused(error)
                    refused.setdefault(refusal.message, refusal)
                    if words == ("MULTI",):
                        break  # without a transaction they would be executed
        finally:
            connection.disconnect()
            client.connection_pool.release(connection)
    return list(refused.values())
