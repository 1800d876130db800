"""Every metric that has a limit: its unit, its default limits, its source. `[thresholds]` takes these names only.

WARN above the first limit, CRITICAL above the second. The manual's own alarms are those of appendix B (monitoring) and
of §8.1 (the RPO); the others are this project's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from runbook.units import duration, number, size

Limits = Mapping[str, tuple[float, float]]
Unit = Literal["s", "ratio", "B", "count"]
DAY_SECONDS = 86_400.0


@dataclass(frozen=True)
class Metric:
    """One metric. `unit`: seconds, a ratio (1.0 is 100 %), bytes or a plain number; `section`: the manual's."""

    name: str
    warn: float
    critical: float
    unit: Unit
    measures: str
    section: str = ""

    @property
    def limits(self) -> tuple[float, float]:
        """The default limits: WARN above the first, CRITICAL above the second."""
        return self.warn, self.critical

    def show(self, value: float) -> str:
        """A value with its unit: `85.3 %`, `2 min 05 s`, `64.0 MB`."""
        if not math.isfinite(value):
            return number(value)
        if self.unit == "ratio":
            return f"{value * 100:.1f}".removesuffix(".0") + " %"
        if self.unit == "s" and value < 1:
            return f"{value * 1000:.3g} ms" if value else "0 s"
        return {"s": duration, "B": size, "count": number}[self.unit](value)


@dataclass(frozen=True)
class Measure:
    """How long a recovery took, and for how many bytes: what an estimate of the next one is made from."""

    what: str
    bytes: int
    seconds: float


API_RESPONSE = Metric("api.response_seconds", 2, 5, "s", "response time of the API, 95th percentile", "appendix B")
API_ERRORS = Metric(
    "api.error_ratio", 0.05, 0.05, "ratio", "share of requests answered with a 5xx status", "appendix B"
)
CONNECTIONS = Metric("postgres.connections.used_ratio", 0.8, 0.95, "ratio", "connections in use", "appendix B")
REPLICATION_LAG = Metric("postgres.replication.lag_seconds", 10, 10, "s", "lag of the slowest standby", "appendix B")
REDIS_MEMORY = Metric("redis.memory.used_ratio", 0.8, 0.9, "ratio", "memory in use, of maxmemory", "appendix B")
CPU = Metric("host.cpu.used_ratio", 0.8, 0.95, "ratio", "processor time in use", "appendix B")
DISK = Metric("host.disk.used_ratio", 0.85, 0.95, "ratio", "space in use on the fullest disk", "appendix B")
TOKENS = Metric("ai.tokens.budget_ratio", 0.8, 1, "ratio", "tokens used, of the month's budget", "appendix B")

SERVICES_STOPPED = Metric("services.stopped", 0, 0, "count", "services of the environment that are stopped")
STREAMS_MISSING = Metric("postgres.wal.streams_missing", 0, 0, "count", "standbys or WAL receivers that do not stream")

BACKUP_AGE = Metric("backup.age_seconds", 3600, DAY_SECONDS, "s", "age of the newest backup", "§8.1")
REDIS_LOSS = Metric("redis.loss_seconds", 1800, 3600, "s", "writes that a kill of Redis would lose now", "§8.1")
BACKUP_SHRUNK = Metric(
    "backup.shrunk_ratio", 0.5, 1, "ratio", "share of a table's rows that a backup lacks, of an earlier one's"
)
BACKUP_GAP = Metric("backup.gap_seconds", 3600, DAY_SECONDS, "s", "time between the database's backup and the others")
PLAN_WRITES = Metric("plan.writes_bytes", 64e6, 1e9, "B", "writes between a plan and its confirmation")

API_REFUSED = Metric("api.refused_ratio", 0.1, 0.3, "ratio", "share of requests refused (4xx)", "§7.3")
LOAD = Metric("host.load.per_processor", 1.5, 4, "count", "load average per processor", "§7.1")
MEMORY = Metric("host.memory.used_ratio", 0.9, 0.97, "ratio", "memory in use on the host", "§7.1")
LOG_ERRORS = Metric("logs.errors.day_count", 20, 1000, "count", "errors in the logs within 24 h", "§7.1")
BLOCKED = Metric("postgres.sessions.blocked_seconds", 5, 60, "s", "longest wait for a lock")
DUMP_LOCKS = Metric("postgres.locks.dump_ratio", 0.8, 1, "ratio", "locks that a dump takes, of the server's lock table")
COMMIT_WAIT = Metric("postgres.replication.commit_wait_seconds", 10, 600, "s", "longest wait of a commit for a standby")
ARCHIVE_WAIT = Metric("postgres.wal.archive_wait_seconds", 300, 3600, "s", "oldest finished WAL file not yet archived")
IDLE = Metric("postgres.sessions.idle_in_transaction_seconds", 60, 900, "s", "longest session idle in a transaction")
# A delayed fsync doubles what a power failure loses.
DELAYED_FSYNCS = Metric("redis.aof.delayed_fsyncs_per_hour", 1, 60, "count", "delayed fsyncs of the AOF per hour")
CLIENT_MEMORY = Metric("redis.clients.memory_ratio", 0.1, 0.25, "ratio", "memory of the client buffers, of maxmemory")
CLIENTS = Metric("redis.clients.used_ratio", 0.8, 0.95, "ratio", "clients, of maxclients")
FORK = Metric("redis.fork_seconds", 0.1, 1, "s", "time of the last fork, during which clients wait")
REDIS_FRAGMENTATION = Metric("redis.memory.fragmentation", 1.5, math.inf, "count", "resident ÷ used memory of Redis")
REDIS_HOST_MEMORY = Metric("redis.memory.host_ratio", 0.8, 0.9, "ratio", "memory of Redis, of the host's")
CONTAINER_MEMORY = Metric("docker.memory.used_ratio", 0.8, 0.95, "ratio", "memory of a container, of its limit", "§4.2")

CATALOGUE: Mapping[str, Metric] = {one.name: one for one in list(globals().values()) if isinstance(one, Metric)}


def default_limits(rpo_seconds: float) -> dict[str, tuple[float, float]]:
    """The limits of every metric where `[thresholds]` sets none; two of them follow from the RPO (§8.1)."""
    return {
        **{name: one.limits for name, one in CATALOGUE.items()},
        BACKUP_AGE.name: (rpo_seconds, max(2 * rpo_seconds, DAY_SECONDS)),
        REDIS_LOSS.name: (rpo_seconds / 2, rpo_seconds),
    }
