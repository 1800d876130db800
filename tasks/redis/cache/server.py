"""The server of a clearing: what it is and holds before, that it is the same one still, and what this user may do."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import redis

from blocks.redis.server import Redis
from runbook.errors import OpsError
from runbook.kinds import probe
from tasks.redis.cache.script import Scripts, scripts_of
from tasks.redis.rights import find_refused
from tasks.redis.server import call, connected, key_counts, setting, version_of


@dataclass(frozen=True)
class CacheServer:
    """The server before anything is done. `counts`: database → (keys, keys with a TTL), as INFO keyspace has them.

    `run_id` is another one after each start. `scripts`: how its user may call them. `saves`: it has save points, or
    does not say: FLUSHALL empties its RDB then.
    """

    address: str
    version: str
    run_id: str
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
            run_id=str(client.info("server")["run_id"]),
            role=str(replication["role"]),
            replicas=int(replication.get("connected_slaves", 0)),
            counts=key_counts(client),
            used_bytes=int(client.info("memory")["used_memory"]),
            scripts=scripts_of(client),
            saves=_has_save_points(client),
        )


def require_same(client: redis.Redis, server: CacheServer) -> None:
    """It was not restarted since, and has its role still: else its data may be other than what was looked at.

    Raises:
        OpsError: it is not so.
    """
    run_id, role = str(client.info("server")["run_id"]), str(client.info("replication")["role"])
    if run_id != server.run_id:
        raise OpsError(
            f"Redis at {server.address} was restarted since its keys were looked at: it may hold others now",
            "plan again with an empty confirm, and look at what it shows",
        )
    if role != server.role:
        raise OpsError(
            f"Redis at {server.address} is a {role} now, and was a {server.role}",
            "launch it again: the master is found anew",
        )


@probe
def require_databases(block: Redis, numbers: Sequence[int]) -> None:
    """The server has all of these databases.

    Raises:
        OpsError: it has not: one clear sentence that names them.
        Unreachable: it does not answer.
    """
    with connected(block) as client:
        missing = [number for number in numbers if number and not _has_database(client, number)]
        if not missing:
            return
        known = 0
        with contextlib.suppress(redis.ResponseError, ValueError):  # CONFIG may be forbidden
            known = int(setting(client, "databases"))
        raise OpsError(
            f"Redis at {block.address} has no database {', '.join(map(str, missing))}",
            f"correct databases: it has 0 to {known - 1}" if known else "correct databases: INFO keyspace shows them",
        )


@probe
def find_refusals(block: Redis, commands: Sequence[Sequence[Any]]) -> list[OpsError]:
    """Why the server would refuse commands, from this user or from anybody (a failed save, too few replicas): each is
    tried and thrown away, none is carried out.

    Raises:
        Unreachable, OpsError: it cannot be asked at all.
    """
    with connected(block) as client:
        refused = find_refused(client, block, *commands)
    return list({error.message: error for error in refused}.values())


def _has_database(client: redis.Redis, number: int) -> bool:
    try:
        call(client, "SELECT", number)
    except redis.ResponseError as error:
        if "DB index is out of range" not in str(error):
            raise
        return False
    return True


def _has_save_points(client: redis.Redis) -> bool:
    try:
        return any(client.config_get("save").values())
    except redis.ResponseError:
        return True
