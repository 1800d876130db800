"""The server that a clearing changes: its state before, and proof that it is still the same master."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import redis

from blocks.redis.server import Redis
from runbook.current import current_report
from runbook.errors import OpsError, Unreachable
from runbook.kinds import probe
from tasks.redis.rights import find_refused
from tasks.redis.sentinels import require_master
from tasks.redis.server import call, connected, key_counts, setting, version_of

RECHECK_SECONDS = 1.0


@dataclass(frozen=True)
class CacheServer:
    """The server before the clearing. `counts`: database → (keys, keys with a TTL), from INFO keyspace. `run_id`
    changes with each start."""

    address: str
    version: str
    run_id: str
    role: str
    replicas: int
    counts: Mapping[int, tuple[int, int]]
    used_bytes: int

    def keys_in(self, databases: tuple[int, ...]) -> int:
        """The keys of some databases together."""
        return sum(self.counts.get(number, (0, 0))[0] for number in databases)

    def without_ttl_in(self, databases: tuple[int, ...]) -> int:
        """The keys without a TTL of some databases together."""
        return self.keys_in(databases) - sum(self.counts.get(number, (0, 0))[1] for number in databases)


@probe
def read_cache_server(block: Redis) -> CacheServer:
    """Role, replicas, keys and memory.

    Raises:
        Unreachable: the server is down.
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
        )


def require_same(client: redis.Redis, server: CacheServer) -> None:
    """The server was neither restarted nor demoted since it was read: otherwise it may hold other data.

    Raises:
        OpsError: it was.
    """
    run_id, role = str(client.info("server")["run_id"]), str(client.info("replication")["role"])
    if run_id != server.run_id:
        raise OpsError(
            f"Redis at {server.address} was restarted after its keys were counted: it may hold other keys now",
            "plan again with an empty confirm, and check the new plan",
        )
    if role != server.role:
        raise OpsError(
            f"Redis at {server.address} is now a {role}; it was a {server.role}",
            "run it again: it finds the new master",
        )


class MasterCheck:
    """Every second of a clearing: the lock is held, the server was neither restarted nor demoted, and the Sentinels
    name it (`waived`: too few may name it, but none another)."""

    def __init__(self, block: Redis, client: redis.Redis, server: CacheServer, *, waived: bool) -> None:
        self._block, self._client, self._server, self._waived = block, client, server, waived
        self._due = 0.0

    def __call__(self) -> None:
        """Raises LockLost or OpsError if that is no longer true."""
        if time.monotonic() >= self._due:
            self.now()

    def now(self) -> None:
        """The same, even if the last check is less than a second old."""
        if report := current_report():
            report.require_lock()
        require_same(self._client, self._server)
        require_master(self._block, self._server.address, waived=self._waived)
        self._due = time.monotonic() + RECHECK_SECONDS


def reason(block: Redis, address: str, error: OpsError) -> OpsError:
    """Why a clearing ended: a master that is replaced closes its clients' connections."""
    if isinstance(error, Unreachable):
        try:
            require_master(block, address, waived=True)
        except OpsError as replaced:
            return replaced
    return error


@probe
def require_databases(block: Redis, numbers: Sequence[int]) -> None:
    """The server has all of these databases.

    Raises:
        OpsError: it lacks some; the message names them.
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
            f"correct databases: it has 0 to {known - 1}" if known else "correct databases: INFO keyspace lists them",
        )


@probe
def find_refusals(block: Redis, commands: Sequence[Sequence[Any]]) -> list[OpsError]:
    """Why the server would refuse commands: this user's rights, a failed save, too few replicas. No command is carried
    out (see `find_refused`).

    Raises:
        Unreachable, OpsError: the server cannot be queried.
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
