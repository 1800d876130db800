"""Who is connected to Redis: counts, buffers, limits, and the end of connections that nobody uses any more (§2.4).

https://valkey.io/commands/client-list/ and https://valkey.io/topics/clients/
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import redis

from blocks.redis import Redis
from runbook.errors import OpsError, Unreachable
from runbook.failpoint import failpoint
from runbook.kinds import action, probe
from runbook.permit import Permit
from runbook.wait import until
from tasks.redis.client_list import PAGE_CLIENTS, Client, list_clients, parse
from tasks.redis.server import call, connected, version_of

CLOSE = "close client"
OURS = "interview-ops"
_FULL = "max number of clients reached"
SETTINGS = ("maxclients", "timeout", "tcp-keepalive", "client-output-buffer-limit", "maxmemory", "maxmemory-clients")


@dataclass(frozen=True)
class Clients:
    """All connections but the one that read them, and the limits around them. `rejected` and the other counters are
    since the server's start (or CONFIG RESETSTAT)."""

    address: str
    version: str
    run_id: str
    role: str
    uptime_seconds: int
    clients: tuple[Client, ...]
    connected: int
    replicas: int
    most: int
    rejected: int
    evicted: int
    output_disconnections: int
    query_disconnections: int
    settings: Mapping[str, str]
    memory_bytes: int
    newest_id: int
    complete: bool

    @property
    def used_ratio(self) -> float:
        """Of maxclients, replicas and the reading connection included: the server counts them all."""
        return (self.connected + self.replicas) / self.most

    @property
    def client_bytes(self) -> int:
        """What all connections take of the server's memory."""
        return sum(client.memory_bytes for client in self.clients)

    def number(self, name: str) -> int:
        """A setting of SETTINGS that is a number."""
        return int(self.settings[name])

    @property
    def output_limits(self) -> Mapping[str, tuple[int, int, int]]:
        """Class → hard limit, soft limit (bytes, 0: none), seconds at the soft one."""
        words = self.settings["client-output-buffer-limit"].split()
        return {
            words[at]: (int(words[at + 1]), int(words[at + 2]), int(words[at + 3])) for at in range(0, len(words), 4)
        }


@dataclass(frozen=True)
class Closed:
    """What became of a connection: closed, or why it was left alone."""

    client: Client
    closed: bool
    why: str


@probe
def read_clients(block: Redis) -> Clients:
    """Connections and limits; no call keeps the server for long, however many there are.

    Raises:
        Unreachable: it does not answer, or has no place for one more connection (the message says which).
        OpsError: it refuses the password or a command.
    """
    with _connected(block) as client:
        return _read(client, block.address)


@contextmanager
def _connected(block: Redis) -> Iterator[redis.Redis]:
    """As `connected`, which cannot tell a server that is full from one that is down."""
    try:
        with connected(block) as client:
            yield client
    except Unreachable:
        if _is_full(block):
            raise Unreachable(
                f"Redis at {block.address} has reached maxclients: it takes no more connections",
                "stop one of the application's workers so that a place is free, then launch close-idle-redis-clients",
            ) from None
        raise


def _is_full(block: Redis) -> bool:
    client = block.client()
    try:
        client.ping()
    except redis.RedisError as error:
        return _FULL in str(error)
    finally:
        client.close()
    return False


def _read(client: redis.Redis, address: str) -> Clients:
    info: dict[str, Any] = client.info()
    settings = {str(name): str(value) for name, value in client.config_get(*SETTINGS).items()}
    own = int(call(client, "CLIENT", "ID"))
    connections = int(info["connected_clients"]) + int(info.get("cluster_connections", 0))
    replicas = int(info.get("connected_slaves", 0))
    found, complete = list_clients(client, own, connections + replicas)
    return Clients(
        address=address,
        version=version_of(client),
        run_id=str(info["run_id"]),
        role=str(info["role"]),
        uptime_seconds=int(info["uptime_in_seconds"]),
        clients=tuple(one for one in found if one.id != own),
        connected=connections,
        replicas=replicas,
        most=int(settings["maxclients"]),
        rejected=int(info["rejected_connections"]),
        evicted=int(info.get("evicted_clients", 0)),
        output_disconnections=int(info.get("client_output_buffer_limit_disconnections", 0)),
        query_disconnections=int(info.get("client_query_buffer_limit_disconnections", 0)),
        settings={"maxmemory-clients": "0", **settings},
        memory_bytes=int(settings["maxmemory"]) or int(info.get("total_system_memory", 0)),
        newest_id=max((one.id for one in found), default=own),
        complete=complete,
    )


def why_kept(client: Client, names: Sequence[str], users: Sequence[str], addresses: Sequence[str]) -> str:
    """Why a connection is not to be closed; empty where it may be. An address is `ip` or `ip:port`."""
    if client.kind != "normal":
        return {"Sentinel": "a Sentinel's", "tracking": "it is told of changed keys"}.get(client.kind, client.kind)
    if client.name == OURS:
        return "these runbooks' own"
    if client.name in names:
        return f"name {client.name}"
    if client.user in users:
        return f"user {client.user}"
    if client.address in addresses or client.host.strip("[]") in addresses:
        return f"address {client.address}"
    return ""


@action(idempotent=True)
def close_clients(
    permit: Permit, block: Redis, found: Clients, clients: Sequence[Client], min_seconds: int
) -> tuple[Closed, ...]:
    """End connections by their id, each looked at again right before, and matched again (id, address, type; on Valkey
    9 its idle time too) in the very call that ends it.

    Raises:
        NotConfirmed: one is not in the permit.
        OpsError: the server was restarted since (then none of them is there any more), or refuses.
        Unreachable: it went away.
    """
    for one in clients:
        permit.require(CLOSE, f"{one.target} at {found.address}")
    try:
        with _connected(block) as client:
            done = []
            for one in clients:
                done.append(_close(client, found, one, min_seconds))
                failpoint("redis clients: closed one")
            return tuple(done)
    except Unreachable as error:
        raise Unreachable(f"while clients were closed: {error.message}", "launch it again: it looks anew") from None


def _close(client: redis.Redis, found: Clients, one: Client, min_seconds: int) -> Closed:
    info = client.info("server"), client.info("replication")
    if str(info[0]["run_id"]) != found.run_id:
        raise OpsError(f"Redis at {found.address} was restarted meanwhile", "launch it again: who is connected is new")
    if str(info[1]["role"]) != found.role:
        return Closed(one, False, f"left alone: the server is a {info[1]['role']} now")
    now = parse(call(client, "CLIENT", "LIST", "ID", one.id))
    if not now:
        return Closed(one, False, "gone by itself")
    if not now[0].is_same(one):
        return Closed(one, False, "left alone: another connection has its id")
    if now[0].kind != "normal":
        return Closed(one, False, f"left alone: now {now[0].kind}")
    if now[0].idle_seconds < min_seconds:
        return Closed(one, False, "left alone: it works again")
    if _kill(client, one, min_seconds):
        return Closed(one, True, "closed")
    return Closed(one, False, "left alone: gone or working in the moment of the call")


def _kill(client: redis.Redis, one: Client, min_seconds: int) -> bool:
    """One call whose conditions must all hold; only Valkey 9 knows IDLE."""
    words = ("CLIENT", "KILL", "ID", one.id, "ADDR", one.address, "TYPE", "normal", "SKIPME", "yes")
    try:
        return bool(call(client, *words, *(("IDLE", min_seconds) if min_seconds else ())))
    except redis.ResponseError as error:
        if "syntax" not in str(error):
            raise
        return bool(call(client, *words))


@probe
def count_reconnected(block: Redis, since: int, closed: Sequence[Client], seconds: float) -> int:
    """How many of the closed came back within so long: as many new ones (with ids after `since`) from the same host by
    the same user and name. One that needs no connection now comes later."""
    back = 0

    def are_back() -> bool:
        nonlocal back
        with _connected(block) as client:
            own = int(call(client, "CLIENT", "ID"))
            first = max(since + 1, own - PAGE_CLIENTS)
            new = parse(call(client, "CLIENT", "LIST", "ID", *range(first, own))) if first < own else []
        back = (_origins(new) & _origins(closed)).total()
        return back == len(closed)

    with suppress(Unreachable):
        until(are_back, what="their coming back", seconds=seconds, every_seconds=0.25)
    return back


def _origins(clients: Iterable[Client]) -> Counter[tuple[str, str, str]]:
    return Counter((one.host, one.name, one.user) for one in clients)
