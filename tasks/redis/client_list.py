"""CLIENT LIST: who is connected, as the server sees it, asked for in pieces (§2.4).

https://valkey.io/commands/client-list/
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import redis

from tasks.redis.server import call

# One answer keeps the server for about 15 µs a client: so many are asked for in one call.
PAGE_CLIENTS = 500
# Beyond so many ids it is not looked for clients page by page.
MOST_IDS = 2_000_000
_FIELD = re.compile(r"(?:^| )([a-z-]+)=(.*?)(?= [a-z-]+=|$)")
_SENTINEL = re.compile(r"sentinel-[0-9a-f]{8}-(?:cmd|pubsub)")


@dataclass(frozen=True)
class Client:
    """One connection, as the server sees it. `output_bytes` is what waits to be read by it, `query_bytes` what it has
    sent and is not carried out yet; `memory_bytes` all that it takes."""

    id: int
    address: str
    name: str
    user: str
    age_seconds: int
    idle_seconds: int
    flags: str
    database: int
    subscriptions: int
    in_transaction: bool
    query_bytes: int
    output_bytes: int
    memory_bytes: int
    command: str

    @property
    def host(self) -> str:
        """Its address without the port."""
        return self.address.rpartition(":")[0]

    @property
    def kind(self) -> str:
        """What it is for; `normal` where it only sends commands."""
        if "S" in self.flags and "O" not in self.flags:
            return "replica"
        if "M" in self.flags:
            return "master"
        if _SENTINEL.fullmatch(self.name):
            return "Sentinel"
        if "O" in self.flags:
            return "MONITOR"
        if "P" in self.flags or self.subscriptions:
            return "pub/sub"
        if "b" in self.flags:
            return "blocked"
        return "tracking" if "t" in self.flags else "normal"

    @property
    def target(self) -> str:
        """What a permit names: ids are never used again while the server runs."""
        return f"{self.id} from {self.address}"

    def is_same(self, before: Client) -> bool:
        """Whether this is the connection that was seen before: after a restart ids begin anew."""
        return (self.id, self.address) == (before.id, before.address) and self.age_seconds >= before.age_seconds


def list_clients(client: redis.Redis, own: int, expected: int) -> tuple[list[Client], bool]:
    """All clients, and whether none was left out. Where there are many, by ranges of ids: the newest first, as `own`
    has just connected; what connects meanwhile is not seen."""
    if expected <= PAGE_CLIENTS:
        return parse(call(client, "CLIENT", "LIST")), True
    found: list[Client] = []
    lowest = max(1, own - MOST_IDS)
    for last in range(own, lowest - 1, -PAGE_CLIENTS):
        first = max(lowest, last - PAGE_CLIENTS + 1)
        found += parse(call(client, "CLIENT", "LIST", "ID", *range(first, last + 1)))
        if len(found) >= expected:
            return found, True
    return found, lowest == 1


def parse(answer: bytes) -> list[Client]:
    """The lines of CLIENT LIST. Fields that a version does not have are 0 or empty."""
    lines = answer.decode(errors="backslashreplace").splitlines()
    return [_parsed(dict(_FIELD.findall(line))) for line in lines if line.strip()]


def _parsed(found: Mapping[str, str]) -> Client:
    return Client(
        id=int(found["id"]),
        address=found["addr"],
        name=found.get("name", ""),
        user=found.get("user", ""),
        age_seconds=int(found["age"]),
        idle_seconds=int(found["idle"]),
        flags=found["flags"],
        database=int(found["db"]),
        subscriptions=sum(int(found.get(name, 0)) for name in ("sub", "psub", "ssub")),
        in_transaction=int(found.get("multi", -1)) >= 0,
        query_bytes=int(found.get("qbuf", 0)),
        output_bytes=int(found.get("omem", 0)),
        memory_bytes=int(found.get("tot-mem", 0)),
        command=found.get("cmd", ""),
    )
