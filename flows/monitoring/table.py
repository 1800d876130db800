"""The alarms of appendix B and two more: title, owner, and next step of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from runbook import metrics
from runbook.metrics import Limits, Metric
from tasks.monitoring.hysteresis import AlarmBounds

Severity = Literal["severe", "normal"]


def named(metric: str, host: str) -> str:
    """The name of a metric on another host: `host.disk.used_ratio@db1`."""
    return f"{metric}@{host}" if host else metric


@dataclass(frozen=True)
class Alarm:
    """A row of the table. `level`: which of the metric's two limits raises the alarm. `severity`: of an exceeded limit;
    `blind`: of a metric that cannot be measured. `host`: another host than the watcher's."""

    metric: Metric
    metric_title: str
    action: str
    owner: str
    hint: str
    severity: Severity = "normal"
    blind: Severity = "normal"
    level: Literal["warn", "critical"] = "warn"
    host: str = ""

    @property
    def name(self) -> str:
        """`host.disk.used_ratio`, or `host.disk.used_ratio@db1` for another host."""
        return named(self.metric.name, self.host)

    @property
    def title(self) -> str:
        """For people, with the host if it is another one."""
        return f"{self.metric_title} of host {self.host}" if self.host else self.metric_title

    @property
    def full_title(self) -> str:
        """The title and the metric's name."""
        return f"{self.title} (metric {self.name})"

    def limit(self, limits: Limits) -> float:
        """The limit above which the alarm is raised."""
        return limits.get(self.metric.name, self.metric.limits)[self.level == "critical"]

    def bounds(self, limits: Limits) -> AlarmBounds:
        """The limit, and the lower one at which the alarm clears."""
        return AlarmBounds.below(self.limit(limits))

    def show(self, value: float) -> str:
        """A value with its unit."""
        return self.metric.show(value)


TABLE = (
    Alarm(
        metrics.API_RESPONSE,
        "API response time",
        "alert on-call",
        "SRE",
        "find the slow requests with search-logs (duration_ms>2000); then run check-connections",
    ),
    Alarm(
        metrics.API_ERRORS,
        "API error rate",
        "emergency response",
        "SRE",
        "run summarise-errors for the kinds of errors, and diagnose-application for the cause",
        "severe",
        "severe",
    ),
    Alarm(
        metrics.CONNECTIONS,
        "database connections in use",
        "scale up",
        "DBA",
        "run close-idle-connections to close idle sessions, and advise-scaling for the number needed",
        blind="severe",
    ),
    Alarm(
        metrics.REPLICATION_LAG,
        "replication lag",
        "find the cause",
        "DBA",
        "run diagnose-database and check-replication for the cause: a long query on the standby, its disk, the "
        "network, or a paused replay",
    ),
    Alarm(
        metrics.REDIS_MEMORY,
        "Redis memory in use",
        "clear the cache",
        "SRE",
        "run check-redis-memory for the largest prefixes, and clear-cache to delete caches",
        level="critical",
    ),
    Alarm(
        metrics.CPU,
        "CPU time in use",
        "scale up",
        "SRE",
        "run check-docker-usage and check-connections for the cause, and advise-scaling for the number needed",
    ),
    Alarm(
        metrics.DISK,
        "disk space in use",
        "clean up",
        "DevOps",
        "run clean-logs, clean-docker or prune-backups; never delete files in pg_wal by hand",
    ),
    Alarm(
        metrics.TOKENS,
        "AI token budget",
        "optimise costs",
        "SRE",
        "run report-token-usage for the models and days; lower the limit per user",
    ),
)
BESIDES = (
    Alarm(
        metrics.SERVICES_STOPPED,
        "stopped services",
        "alert on-call",
        "SRE",
        "run diagnose-application and read the service's log for the cause; then start it",
        "severe",
    ),
    Alarm(
        metrics.STREAMS_MISSING,
        "WAL streams missing",
        "find the cause",
        "DBA",
        "start the standby or the receiver that does not stream: until then, losing the primary loses writes",
        "severe",
    ),
)
ALARMS: Mapping[str, Alarm] = {one.name: one for one in (*TABLE, *BESIDES)}


def alarm_of(name: str) -> Alarm:
    """The alarm of a metric, with its host."""
    row, _, host = name.partition("@")
    return replace(ALARMS[row], host=host)
