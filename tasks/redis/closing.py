"""The end of connections to Redis that nobody uses any more: by id, each looked at again right before (§2.4).

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
from runbook.guard.permit import Permit
from runbook.kinds import action, probe
from runbook.wait import until
from tasks.redis.client_list import PAGE_CLIENTS, Client, parse
from tasks.redis.clients import Clients
from tasks.redis.rights import find_refused
from tasks.redis.server import call, connected

CLOSE = "close client"
OURS = "interview-ops"


@dataclass(frozen=True)
class Closed:
    """What became of a connection: closed, or why it was left alone."""

    client: Client
    closed: bool
    why: str


@dataclass(frozen=True)
class Closing:
    """What became of all of them, and what ended it before the last, None where nothing did."""

    done: tuple[Closed, ...]
    stopped: OpsError | None = None

    @property
    def closed(self) -> tuple[Client, ...]:
        """Those that were closed."""
        return tuple(each.client for each in self.done if each.closed)


@probe
def find_refusal(block: Redis) -> OpsError | None:
    """Why this user may not close connections; None where he may.

    Raises:
        Unreachable: it does not answer.
    """
    with connected(block) as client:
        return next(iter(find_refused(client, block, ("CLIENT", "KILL", "ID", "0"))), None)


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
def close_clients(permit: Permit, block: Redis, found: Clients, clients: Sequence[Client], min_seconds: int) -> Closing:
    """End connections by their id, each looked at again right before, and matched again (id, address, type; on Valkey
    9 its idle time too) in the very call that ends it. An error after the first ends it and is part of the result.

    Raises:
        NotConfirmed: one is not in the permit.
        OpsError: the server was restarted since (then none of them is there any more), or refuses.
        Unreachable: it went away.
    """
    for one in clients:
        permit.require(CLOSE, f"{one.target} at {found.address}")
    done: list[Closed] = []
    try:
        with connected(block) as client:
            for one in clients:
                done.append(_close(client, found, one, min_seconds))
                failpoint("redis clients: closed one")
    except OpsError as error:
        if not done:
            raise
        if isinstance(error, Unreachable):
            done += [Closed(one, False, "not known: the server went away") for one in clients[len(done) :][:1]]
        return Closing(tuple(done), error)
    return Closing(tuple(done))


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
        with connected(block) as client:
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
