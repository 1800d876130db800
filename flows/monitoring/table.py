"""The alarms of 付録B and two more: title, owner, and next step of each."""

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
    category: str
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
        """The metric's Japanese title, with the host if it is another one."""
        return f"{self.metric_title} ({self.host})" if self.host else self.metric_title

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
        "API",
        "レスポンスタイム",
        "アラート",
        "SRE",
        "find the slow requests with search-logs (duration_ms>2000); then run check-connections",
    ),
    Alarm(
        metrics.API_ERRORS,
        "API",
        "エラーレート",
        "緊急対応",
        "SRE",
        "run summarise-errors for the kinds of errors, and diagnose-application for the cause",
        "severe",
        "severe",
    ),
    Alarm(
        metrics.CONNECTIONS,
        "DB",
        "接続数",
        "スケールアップ",
        "DBA",
        "run close-idle-connections to close idle sessions, and advise-scaling for the number needed",
        blind="severe",
    ),
    Alarm(
        metrics.REPLICATION_LAG,
        "DB",
        "レプリケーション遅延",
        "調査",
        "DBA",
        "run diagnose-database and check-replication for the cause: a long query on the standby, its disk, the "
        "network, or a paused replay",
    ),
    Alarm(
        metrics.REDIS_MEMORY,
        "Redis",
        "メモリ使用率",
        "キャッシュクリア",
        "SRE",
        "run check-redis-memory for the largest prefixes, and clear-cache to delete caches",
        level="critical",
    ),
    Alarm(
        metrics.CPU,
        "インフラ",
        "CPU使用率",
        "スケールアップ",
        "SRE",
        "run check-docker-usage and check-connections for the cause, and advise-scaling for the number needed",
    ),
    Alarm(
        metrics.DISK,
        "インフラ",
        "ディスク使用率",
        "クリーンアップ",
        "DevOps",
        "run clean-logs, clean-docker or prune-backups; never delete files in pg_wal by hand",
    ),
    Alarm(
        metrics.TOKENS,
        "AI",
        "トークン使用量",
        "コスト最適化",
        "SRE",
        "run report-token-usage for the models and days; lower the limit per user",
    ),
)
BESIDES = (
    Alarm(
        metrics.SERVICES_STOPPED,
        "サービス",
        "停止中のサービス",
        "アラート",
        "SRE",
        "run diagnose-application and read the service's log for the cause; then start it",
        "severe",
    ),
    Alarm(
        metrics.STREAMS_MISSING,
        "DB",
        "WALの受信停止",
        "調査",
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
