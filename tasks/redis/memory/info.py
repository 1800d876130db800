"""A server's memory and its limits (https://valkey.io/commands/info/)."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass
from pathlib import Path

from blocks.redis.server import Redis
from runbook.kinds import probe
from tasks.redis.server import connected, key_counts, version_of


@dataclass(frozen=True)
class Memory:
    """Bytes, and ratios. `swapped` -1: not measured. `limit` 0: none; it does not apply to `not_counted` bytes (buffers
    of replicas and of the AOF). `key_counts`: database → (keys, keys with a TTL)."""

    version: str
    run_id: str
    role: str
    up_seconds: int
    used: int
    peak: int
    resident: int
    dataset: int
    overhead: int
    client_buffers: int
    replica_buffers: int
    scripts: int
    limit: int
    not_counted: int
    host: int
    policy: str
    fragmentation: float
    fragmentation_bytes: int
    allocator_fragmentation: float
    swapped: int
    evicted: int
    expired: int
    key_counts: dict[int, tuple[int, int]]

    @property
    def keys(self) -> int:
        """The keys of all databases."""
        return sum(keys for keys, _ in self.key_counts.values())

    @property
    def expiring_keys(self) -> int:
        """The keys with a TTL of all databases."""
        return sum(expires for _, expires in self.key_counts.values())


@dataclass(frozen=True)
class Afterwards:
    """The server after a sweep, to compare with `Memory`."""

    run_id: str
    role: str
    evicted: int
    expired: int
    dataset: int


@probe
def read_memory(block: Redis) -> Memory:
    """INFO memory, keyspace, stats and replication.

    Raises:
        Unreachable: the server is down or loading.
        OpsError: it refuses the password or a command.
    """
    with connected(block) as client:
        memory, stats, server = client.info("memory"), client.info("stats"), client.info("server")
        return Memory(
            version=version_of(client),
            run_id=str(server["run_id"]),
            role=str(client.info("replication")["role"]),
            up_seconds=int(server["uptime_in_seconds"]),
            used=int(memory["used_memory"]),
            peak=int(memory["used_memory_peak"]),
            resident=int(memory["used_memory_rss"]),
            dataset=int(memory["used_memory_dataset"]),
            overhead=int(memory["used_memory_overhead"]),
            client_buffers=int(memory.get("mem_clients_normal", 0)),
            replica_buffers=int(memory.get("mem_clients_slaves", 0)),
            scripts=int(memory.get("used_memory_vm_total", memory.get("used_memory_lua", 0))),
            limit=int(memory["maxmemory"]),
            not_counted=int(memory.get("mem_not_counted_for_evict", 0)),
            host=int(memory["total_system_memory"]),
            policy=str(memory["maxmemory_policy"]),
            fragmentation=float(memory["mem_fragmentation_ratio"]),
            fragmentation_bytes=int(memory["mem_fragmentation_bytes"]),
            allocator_fragmentation=float(memory["allocator_frag_ratio"]),
            swapped=_swapped(block, int(server["process_id"])),
            evicted=int(stats["evicted_keys"]),
            expired=int(stats["expired_keys"]),
            key_counts=key_counts(client),
        )


@probe
def read_afterwards(block: Redis) -> Afterwards:
    """The server's run, role and counters after a sweep.

    Raises:
        Unreachable, OpsError: as `read_memory`.
    """
    with connected(block) as client:
        stats = client.info("stats")
        return Afterwards(
            run_id=str(client.info("server")["run_id"]),
            role=str(client.info("replication")["role"]),
            evicted=int(stats["evicted_keys"]),
            expired=int(stats["expired_keys"]),
            dataset=int(client.info("memory")["used_memory_dataset"]),
        )


def _swapped(block: Redis, pid: int) -> int:
    """VmSwap of the server's process; -1: it is on another host, or cannot be read."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        if not socket.gethostbyname(block.host).startswith("127."):
            return -1
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        name = fields["Name"].strip()
        if any(word in name for word in ("redis", "valkey", Path(block.server_program).name[:15])):
            return int(fields["VmSwap"].split()[0]) * 1024
    return -1
