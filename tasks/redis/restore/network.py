"""A restore by replication: the live server follows a temporary server with the backup until it has the same data, and
is then promoted again (§2.3).

Meanwhile it refuses writes, so that both can be compared key by key. With `repl-diskless-load swapdb` the old data
stays until the new data is loaded. Its settings are recorded before, so that a run after a killed one can restore them.
https://valkey.io/topics/replication/
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import redis

from blocks.redis.server import CONNECT_SECONDS, Redis
from runbook.errors import OpsError
from runbook.failpoint import failpoint
from runbook.files import record
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from runbook.log import logger
from runbook.wait import until
from tasks.redis.restore.equal import KeyComparison
from tasks.redis.restore.route import LOADING, Route
from tasks.redis.server import call, connected
from tasks.redis.topology.topology import RECORD as DETACHED
from tasks.redis.topology.topology import ReplicationTopology

ACT = "replace all data of Redis over the network"
RECORD = "redis-network-restore.json"
TRANSFER_SECONDS = 3600.0
REACH_SECONDS = 15.0
PROGRESS_SECONDS = 5.0


class NotReached(OpsError):
    """The live server cannot reach the temporary one; its data is unchanged."""


@dataclass(frozen=True)
class RedisLeftover:
    """What a restore changed on `server`: `settings` are the earlier values. `kept`: the backup of the earlier data."""

    server: str
    temporary: str
    settings: dict[str, str]
    kept: str


def find_leftover(reports: Path) -> RedisLeftover | None:
    """The record of a killed restore, if any.

    Raises:
        OpsError: the record cannot be read.
    """
    return record.read(reports / RECORD, RedisLeftover, "check that Redis is a master, then delete the file")


@probe
def still_follows(block: Redis, left: RedisLeftover) -> bool:
    """Whether a server is still the replica that a killed restore made of it; then no client has written to it since.

    Raises:
        Unreachable, OpsError: it does not answer, or refuses INFO.
    """
    with connected(block) as client:
        info = client.info("replication")
    return info["role"] == "slave" and f"{info['master_host']}:{info['master_port']}" == left.temporary


@action(of=lambda block: Act(ACT, block.address), idempotent=True)
def put_back(block: Redis, left: RedisLeftover, reports: Path) -> None:
    """Promote a server again that a restore made a replica, and restore its settings.

    Raises:
        Unreachable, OpsError: it does not answer, or refuses.
    """
    _put_back(block, left, reports)


@action(of=lambda block: Act(ACT, block.address), idempotent=True)
def forget_dead(block: Redis, around: ReplicationTopology, reports: Path) -> None:
    """Delete killed runs' records of a dead server that `block` replaces. The list of detached servers stays until
    `detach` replaces it.
    """
    (reports / RECORD).unlink(missing_ok=True)
    if around.is_alone:
        (reports / DETACHED).unlink(missing_ok=True)


def _put_back(block: Redis, left: RedisLeftover, reports: Path) -> None:
    with connected(block) as client:
        info = client.info("replication")
        if info["role"] == "slave" and f"{info['master_host']}:{info['master_port']}" == left.temporary:
            call(client, "REPLICAOF", "NO", "ONE")
        for name, value in left.settings.items():
            client.config_set(name, value)
    (reports / RECORD).unlink(missing_ok=True)


@action(of=lambda block: Act(ACT, block.address))
def replace_by_replication(
    block: Redis,
    scratch: redis.Redis,
    route: Route,
    reports: Path,
    kept: str,
    compare: Callable[[], KeyComparison],
) -> KeyComparison:
    """Let the live server follow the scratch server until it has the same data, compare, and promote it again.

    Raises:
        NotReached: it cannot reach the scratch server; its data is unchanged.
        Unreachable, OpsError: it, or the connection, failed; it was promoted again if possible.
    """
    left = _prepare(block, scratch, route, kept)
    record.write(reports / RECORD, left)
    failpoint("redis: network restore recorded")
    try:
        with connected(block) as client:
            _follow(client, scratch, left, route)
        failpoint("redis: live server follows")
        _wait(block, scratch)
        failpoint("redis: live server loaded")
        found = compare()
        failpoint("redis: live server compared")
    finally:
        _put_back(block, left, reports)
    failpoint("redis: live server is a master again")
    return found


def _prepare(block: Redis, scratch: redis.Redis, route: Route, kept: str) -> RedisLeftover:
    """Let the scratch server listen on the address at which the live server reaches this host, with the live server's
    masterauth, or a random password."""
    with connected(block) as client:
        login = {**client.config_get("masterauth"), **client.config_get("masteruser"), **client.config_get(LOADING)}
    auth, user = str(login.get("masterauth") or ""), str(login.get("masteruser") or "")
    settings = {LOADING: str(login[LOADING])} | ({} if auth else {"masteruser": user, "masterauth": ""})
    password = auth if auth and not user else secrets.token_urlsafe(32)
    with socket.create_connection((block.host, block.port), CONNECT_SECONDS) as probe_socket:
        host = str(probe_socket.getsockname()[0])
    if auth and user:
        call(scratch, "ACL", "SETUSER", user, "on", f">{auth}", "~*", "&*", "+@all")
    scratch.config_set("requirepass", password)
    scratch.connection_pool.connection_kwargs["password"] = password
    scratch.config_set("repl-diskless-sync", "yes")
    scratch.config_set("repl-diskless-sync-delay", 0)
    scratch.config_set("bind", host)
    scratch.config_set("port", port := _free_port(host))
    return RedisLeftover(block.address, f"{host}:{port}", settings, kept)


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as found:
        found.bind((host, 0))
        return int(found.getsockname()[1])


def _follow(client: redis.Redis, scratch: redis.Redis, left: RedisLeftover, route: Route) -> None:
    if "masterauth" in left.settings:
        client.config_set("masteruser", "")
        client.config_set("masterauth", scratch.connection_pool.connection_kwargs["password"])
    if route.swaps:
        client.config_set(LOADING, "swapdb")
    host, _, port = left.temporary.rpartition(":")
    call(client, "REPLICAOF", host, port)


def _wait(block: Redis, scratch: redis.Redis) -> None:
    started = reported = time.monotonic()

    def loaded() -> bool:
        nonlocal reported
        if not _came(scratch) and time.monotonic() - started > REACH_SECONDS:
            raise NotReached(
                f"{block.address} cannot reach this host", "permit the connection, if you want replication"
            )
        with connected(block) as client:
            info = client.info("replication")
        if time.monotonic() - reported > PROGRESS_SECONDS:
            reported = time.monotonic()
            logger().info("the live server received %s bytes", info.get("master_sync_read_bytes", 0))
        return info["master_link_status"] == "up" and not int(info.get("master_sync_in_progress", 0))

    until(loaded, what="the backup's data on the live server", seconds=TRANSFER_SECONDS, every_seconds=0.05)


def _came(scratch: redis.Redis) -> bool:
    return int(scratch.info("stats")["sync_full"]) > 0
