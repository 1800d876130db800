"""What a server says of its memory, its limits, and what it is busy with (https://valkey.io/commands/info/)."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import redis

from blocks.redis.server import Redis
from runbook.kinds import probe
from tasks.redis.server import call, connected, key_counts, version_of

MOST_COMMANDS = 10


@dataclass(frozen=True)
class Memory:
    """Bytes, but for ratios. `swapped` -1: not measured. `limit` 0: none; `not_counted` of `used` it does not apply to
    (buffers of replicas and of the AOF). `key_counts`: database → (keys, keys with a TTL)."""

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
    def counts_hits(self) -> bool:
        """Whether OBJECT FREQ answers: only an LFU policy counts."""
        return self.policy.endswith("-lfu")

    @property
    def keys(self) -> int:
        """Of all databases."""
        return sum(keys for keys, _ in self.key_counts.values())

    @property
    def expiring_keys(self) -> int:
        """Of all databases."""
        return sum(expires for _, expires in self.key_counts.values())


@dataclass(frozen=True)
class Afterwards:
    """The same server after a sweep, to be compared with `Memory`; keys since its start."""

    run_id: str
    role: str
    evicted: int
    expired: int
    dataset: int


@dataclass(frozen=True)
class CommandTime:
    """A command since the server started (or CONFIG RESETSTAT)."""

    name: str
    calls: int
    seconds: float
    microseconds_per_call: float


@dataclass(frozen=True)
class LatencyEvent:
    """What LATENCY LATEST says of a kind of event, in milliseconds."""

    name: str
    last: datetime
    last_ms: int
    longest_ms: int


@dataclass(frozen=True)
class Activity:
    """What it is busy with. `problem` says why there are no latency events, "" where they are recorded."""

    commands: tuple[CommandTime, ...]
    events: tuple[LatencyEvent, ...]
    problem: str


@probe
def read_memory(block: Redis) -> Memory:
    """INFO memory, keyspace, stats and replication.

    Raises:
        Unreachable: it is down or loading.
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
def read_activity(block: Redis) -> Activity:
    """The commands that took most of the server's time, and its latency events.

    Raises:
        Unreachable, OpsError: as `read_memory`.
    """
    with connected(block) as client:
        commands = [
            CommandTime(
                name.removeprefix("cmdstat_"), int(found["calls"]), found["usec"] / 1e6, float(found["usec_per_call"])
            )
            for name, found in client.info("commandstats").items()
        ]
        commands.sort(key=lambda command: -command.seconds)
        events, problem = _events(client)
        return Activity(tuple(commands[:MOST_COMMANDS]), events, problem)


@probe
def read_afterwards(block: Redis) -> Afterwards:
    """Whether it is the same server, in the same role, and what it removed by itself.

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


def _events(client: redis.Redis) -> tuple[tuple[LatencyEvent, ...], str]:
    try:
        rows: list[Any] = call(client, "LATENCY", "LATEST")
    except redis.ResponseError as error:
        return (), f"not available: {error}"
    events = tuple(LatencyEvent(row[0].decode(), datetime.fromtimestamp(row[1], UTC), row[2], row[3]) for row in rows)
    with contextlib.suppress(redis.ResponseError):  # CONFIG may be forbidden: then nobody can say
        threshold = str(next(iter(client.config_get("latency-monitor-threshold").values()), ""))
        if threshold == "0" and not events:
            return (), "not available: needs CONFIG SET latency-monitor-threshold 100 (milliseconds)"
    return events, "" if events else "none was recorded"


def _swapped(block: Redis, pid: int) -> int:
    """VmSwap of the server's process, where it is on this host; -1 where that cannot be told."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        if not socket.gethostbyname(block.host).startswith("127."):
            return -1
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        name = fields["Name"].strip()
        if any(word in name for word in ("redis", "valkey", Path(block.server_program).name[:15])):
            return int(fields["VmSwap"].split()[0]) * 1024
    return -1
