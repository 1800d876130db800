"""The route of a backup into a server on another host: by replication, or key by key (§2.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import redis

from blocks.redis.server import Redis
from runbook.kinds import probe
from tasks.redis.server import call, connected

LOADING = "repl-diskless-load"
Way = Literal["replication", "keys"]


@dataclass(frozen=True)
class Route:
    """The route of data into a server, and `why`."""

    way: Way
    why: str
    swaps: bool = False


@probe
def find_route(block: Redis, needed_bytes: int) -> Route:
    """The route for a backup of `needed_bytes` in memory into the live server. Nothing is changed.

    Raises:
        Unreachable, OpsError: it does not answer, or refuses INFO.
    """
    if block.tls:
        return Route("keys", "a temporary server has no certificate that the live one would trust")
    with connected(block) as client:
        memory = client.info("memory")
        try:
            if not next(iter(call(client, "COMMAND", "INFO", "REPLICAOF")), None):
                return Route("keys", "the server has no REPLICAOF")
            found = client.config_get(LOADING)
            client.config_set(LOADING, str(next(iter(found.values()))))
        except redis.ResponseError as error:
            return Route("keys", f"the server forbids its settings: {error}")
        if forbidden := _forbids_replicaof(client):
            return Route("keys", forbidden)
    free = int(memory.get("total_system_memory", 0)) - int(memory["used_memory"])
    swaps = free > needed_bytes * 1.2
    return Route(
        "replication",
        "its old data stays until the new data is loaded"
        if swaps
        else "its memory is too small for both: the old data is deleted before the new data is loaded",
        swaps,
    )


def _forbids_replicaof(client: redis.Redis) -> str:
    """Why ACL DRYRUN refuses this user; "": it may, or the server cannot report it."""
    try:
        answer = call(client, "ACL", "DRYRUN", call(client, "ACL", "WHOAMI"), "REPLICAOF", "NO", "ONE")
    except redis.ResponseError:
        return ""
    return "" if answer in (b"OK", "OK") else str(answer)
