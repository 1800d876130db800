"""A Redis server's connections: counts, buffers and limits (§2.4).

https://valkey.io/commands/client-list/ and https://valkey.io/topics/clients/
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import redis

from blocks.redis.server import Redis
from runbook.kinds import probe
from tasks.redis.client_list import Client, list_clients
from tasks.redis.server import call, connected, version_of

SETTINGS = ("maxclients", "timeout", "tcp-keepalive", "client-output-buffer-limit", "maxmemory", "maxmemory-clients")


@dataclass(frozen=True)
class RedisClients:
    """All connections except the reading one, and their limits. `rejected` and the other counters: since the server's
    start (or CONFIG RESETSTAT)."""

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
        """The share of maxclients. Replicas and the reading connection count too."""
        return (self.connected + self.replicas) / self.most

    @property
    def client_bytes(self) -> int:
        """The server's memory for all connections."""
        return sum(client.memory_bytes for client in self.clients)

    def number(self, name: str) -> int:
        """A numeric setting of SETTINGS."""
        return int(self.settings[name])

    @property
    def output_limits(self) -> Mapping[str, tuple[int, int, int]]:
        """Class → hard limit, soft limit (bytes, 0: none), seconds at the soft one."""
        words = self.settings["client-output-buffer-limit"].split()
        return {
            words[at]: (int(words[at + 1]), int(words[at + 2]), int(words[at + 3])) for at in range(0, len(words), 4)
        }


@probe
def read_clients(block: Redis) -> RedisClients:
    """Connections and limits. No call blocks the server for long, even with thousands of connections.

    Raises:
        Unreachable: the server does not answer, or has reached maxclients.
        OpsError: it refuses the password or a command.
    """
    with connected(block) as client:
        return _read(client, block.address)


def _read(client: redis.Redis, address: str) -> RedisClients:
    info: dict[str, Any] = client.info()
    settings = {str(name): str(value) for name, value in client.config_get(*SETTINGS).items()}
    own = int(call(client, "CLIENT", "ID"))
    connections = int(info["connected_clients"]) + int(info.get("cluster_connections", 0))
    replicas = int(info.get("connected_slaves", 0))
    found, complete = list_clients(client, own, connections + replicas)
    return RedisClients(
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
