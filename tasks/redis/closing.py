"""Close connections to Redis by id; each is checked again immediately before (§2.4).

https://valkey.io/commands/client-kill/
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import redis

from blocks.redis.server import Redis
from runbook.errors import OpsError, Unreachable
from runbook.failpoint import failpoint
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from runbook.wait import until
from tasks.redis.client_list import PAGE_CLIENTS, Client, parse
from tasks.redis.clients import RedisClients
from tasks.redis.rights import find_refused
from tasks.redis.server import call, connected

CLOSE = "close client"
OURS = "interview-ops"


@dataclass(frozen=True)
class ClosedClient:
    """A connection's result: closed, or why it was kept."""

    client: Client
    closed: bool
    why: str


@dataclass(frozen=True)
class Closing:
    """The result for all connections. `stopped`: the error that ended it before the last one."""

    done: tuple[ClosedClient, ...]
    stopped: OpsError | None = None

    @property
    def closed(self) -> tuple[Client, ...]:
        """The closed connections."""
        return tuple(each.client for each in self.done if each.closed)


@probe
def find_refusal(block: Redis) -> OpsError | None:
    """Why this user may not close connections; None: permitted.

    Raises:
        Unreachable: the server does not answer.
    """
    with connected(block) as client:
        return next(iter(find_refused(client, block, ("CLIENT", "KILL", "ID", "0"))), None)


def why_kept(client: Client, names: Sequence[str], users: Sequence[str], addresses: Sequence[str]) -> str:
    """Why a connection is kept; "": it can be closed. An address is `ip` or `ip:port`."""
    if client.kind != "normal":
        return {"Sentinel": "a Sentinel's", "tracking": "it uses client tracking"}.get(client.kind, client.kind)
    if client.name == OURS:
        return "these runbooks' own"
    if client.name in names:
        return f"name {client.name}"
    if client.user in users:
        return f"user {client.user}"
    if client.address in addresses or client.host.strip("[]") in addresses:
        return f"address {client.address}"
    return ""


def _acts(found: RedisClients, clients: Sequence[Client]) -> list[Act]:
    return [Act(CLOSE, f"{one.target} at {found.address}") for one in clients]


@action(of=_acts, idempotent=True)
def close_clients(block: Redis, found: RedisClients, clients: Sequence[Client], min_seconds: int) -> Closing:
    """Close connections by id. The same call compares address and type, on Valkey 9 also the idle time.

    An error after the first connection ends it and is part of the result.

    Raises:
        OpsError: the server was restarted since (which closed all of them), or refuses.
        Unreachable: the connection to the server broke.
    """
    done: list[ClosedClient] = []
    try:
        with connected(block) as client:
            for one in clients:
                done.append(_close(client, found, one, min_seconds))
                failpoint("redis clients: closed one")
    except OpsError as error:
        if not done:
            raise
        if isinstance(error, Unreachable):
            done += [
                ClosedClient(one, False, "unknown: the connection to the server broke")
                for one in clients[len(done) :][:1]
            ]
        return Closing(tuple(done), error)
    return Closing(tuple(done))


def _close(client: redis.Redis, found: RedisClients, one: Client, min_seconds: int) -> ClosedClient:
    info = client.info("server"), client.info("replication")
    if str(info[0]["run_id"]) != found.run_id:
        raise OpsError(
            f"Redis at {found.address} was restarted meanwhile", "run it again: all clients have reconnected"
        )
    if str(info[1]["role"]) != found.role:
        return ClosedClient(one, False, f"kept: the server is a {info[1]['role']} now")
    now = parse(call(client, "CLIENT", "LIST", "ID", one.id))
    if not now:
        return ClosedClient(one, False, "disconnected by itself")
    if not now[0].is_same(one):
        return ClosedClient(one, False, "kept: another connection has its id")
    if now[0].kind != "normal":
        return ClosedClient(one, False, f"kept: now {now[0].kind}")
    if now[0].idle_seconds < min_seconds:
        return ClosedClient(one, False, "kept: active again")
    if _kill(client, one, min_seconds):
        return ClosedClient(one, True, "closed")
    return ClosedClient(one, False, "kept: disconnected or active at the moment of the call")


def _kill(client: redis.Redis, one: Client, min_seconds: int) -> bool:
    """One call with all conditions; only Valkey 9 has IDLE."""
    words = ("CLIENT", "KILL", "ID", one.id, "ADDR", one.address, "TYPE", "normal", "SKIPME", "yes")
    try:
        return bool(call(client, *words, *(("IDLE", min_seconds) if min_seconds else ())))
    except redis.ResponseError as error:
        if "syntax" not in str(error):
            raise
        return bool(call(client, *words))


@probe
def count_reconnected(block: Redis, since: int, closed: Sequence[Client], seconds: float) -> int:
    """How many of the closed clients reconnected within `seconds`: new connections (ids after `since`) from the same
    host, with the same user and name. An idle client reconnects later."""
    again = 0

    def have_reconnected() -> bool:
        nonlocal again
        with connected(block) as client:
            own = int(call(client, "CLIENT", "ID"))
            first = max(since + 1, own - PAGE_CLIENTS)
            new = parse(call(client, "CLIENT", "LIST", "ID", *range(first, own))) if first < own else []
        again = (_origins(new) & _origins(closed)).total()
        return again == len(closed)

    with suppress(Unreachable):
        until(have_reconnected, what="the clients to reconnect", seconds=seconds, every_seconds=0.25)
    return again


def _origins(clients: Iterable[Client]) -> Counter[tuple[str, str, str]]:
    return Counter((one.host, one.name, one.user) for one in clients)
