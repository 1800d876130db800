"""Every metric that has a limit, with the limit that holds where an environment's `[thresholds]` do not set one.

A limit is a pair: WARN above the first number, CRITICAL above the second. The manual's own alarms are those of 付録B
(monitoring) and of §8.1 (the RPO). `[thresholds]` takes no other names than these.
"""

from __future__ import annotations

from collections.abc import Mapping

from runbook.errors import OpsError

Limits = Mapping[str, tuple[float, float]]
DAY_SECONDS = 86_400.0
DEFAULTS: dict[str, tuple[float, float]] = {
    # 付録B
    "api.response_seconds": (2.0, 5.0),
    "api.error_ratio": (0.05, 0.05),
    "postgres.connections.used_ratio": (0.8, 0.95),
    "postgres.replication.lag_seconds": (10.0, 10.0),
    "redis.memory.used_ratio": (0.8, 0.9),
    "host.cpu.used_ratio": (0.8, 0.95),
    "host.disk.used_ratio": (0.85, 0.95),
    "ai.tokens.budget_ratio": (0.8, 1.0),
    # watched as well
    "services.stopped": (0.0, 0.0),
    "postgres.wal.streams_missing": (0.0, 0.0),
    # between a plan and its confirmation; the plan shows it
    "plan.writes_bytes": (64e6, 1e9),
    # of check runbooks
    "api.refused_ratio": (0.1, 0.3),
    "backup.gap_seconds": (3600.0, DAY_SECONDS),
    "host.load.per_processor": (1.5, 4.0),
    "host.memory.used_ratio": (0.9, 0.97),
    "logs.errors.day_count": (20.0, 1000.0),
    "postgres.sessions.blocked_seconds": (5.0, 60.0),
    "postgres.sessions.idle_in_transaction_seconds": (60.0, 900.0),
    "redis.aof.delayed_fsyncs_per_hour": (1.0, 60.0),  # a delayed fsync doubles what a power failure loses
    "redis.clients.memory_ratio": (0.1, 0.25),
    "redis.clients.used_ratio": (0.8, 0.95),
    "redis.fork_seconds": (0.1, 1.0),  # clients wait during a fork
    "redis.memory.host_ratio": (0.8, 0.9),
}


def by_rpo(rpo_seconds: float) -> Limits:
    """The limits that follow from the RPO (§8.1)."""
    return {
        "backup.age_seconds": (rpo_seconds, max(2 * rpo_seconds, DAY_SECONDS)),
        "redis.loss_seconds": (rpo_seconds / 2, rpo_seconds),
    }


def default_limits(rpo_seconds: float) -> Limits:
    """Every metric of an environment that has this RPO."""
    return {**DEFAULTS, **by_rpo(rpo_seconds)}


def limit_of(limits: Limits, metric: str) -> tuple[float, float]:
    """A metric's limit: an environment's own, or the default.

    Raises:
        OpsError: there is no such metric.
    """
    found = limits.get(metric) or DEFAULTS.get(metric)
    if found is None:
        raise OpsError(f"no threshold for {metric}", "add the metric to runbook/thresholds.py")
    return found
