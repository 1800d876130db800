"""CLIENT LIST: a server's connections, read in parts (§2.4).

https://valkey.io/commands/client-list/
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import redis

from tasks.redis.server import call

# An answer blocks the server for about 15 µs a client.
PAGE_CLIENTS = 500
# The most ids that are searched page by page.
MOST_IDS = 2_000_000
_FIELD = re.compile(r"(?:^| )([a-z-]+)=(.*?)(?= [a-z-]+=|$)")
_SENTINEL = re.compile(r"sentinel-[0-9a-f]{8}-(?:cmd|pubsub)")


@dataclass(frozen=True)
class Client:
    """One connection. `output_bytes`: answers that it has not read; `query_bytes`: commands that are not executed yet;
    `memory_bytes`: all memory that the server uses for it."""

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
        """The address without the port."""
        return self.address.rpartition(":")[0]

    @property
    def kind(self) -> str:
        """The kind of connection; `normal`: it only sends commands."""
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
        """The connection in a permit. A running server never reuses an id."""
        return f"{self.id} from {self.address}"

    def is_same(self, before: Client) -> bool:
        """Whether this is the same connection as before: a restart reuses ids."""
        return (self.id, self.address) == (before.id, before.address) and self.age_seconds >= before.age_seconds


def list_clients(client: redis.Redis, own: int, expected: int) -> tuple[list[Client], bool]:
    """All clients, and whether the list is complete. Many clients are read by ranges of ids, the newest first, starting
    at `own` id; clients that connect meanwhile are left out."""
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
    """The lines of CLIENT LIST. Fields that a server version lacks are 0 or empty."""
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
