"""The table of 付録B as data, and what check flows measure cheaply besides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from runbook.thresholds import DEFAULTS
from tasks.monitoring.hysteresis import Bounds

Severity = Literal["severe", "normal"]
Unit = Literal["s", "ratio", "count"]


@dataclass(frozen=True)
class Metric:
    """A row. Its limits are the environment's [thresholds], or runbook.thresholds; `alarm` is which of the two is the
    table's. `severity` of a value over it; `blind`: of not being measured at all."""

    name: str
    category: str
    title: str
    unit: Unit
    action: str
    owner: str
    hint: str
    severity: Severity = "normal"
    blind: Severity = "normal"
    alarm: Literal["warn", "critical"] = "warn"

    def limit(self, limits: Mapping[str, tuple[float, float]]) -> float:
        """Above it the table's action is due."""
        name = self.name.partition("@")[0]
        return limits.get(name, DEFAULTS[name])[self.alarm == "critical"]

    def bounds(self, limits: Mapping[str, tuple[float, float]]) -> Bounds:
        """With the lower limit at which it is well again."""
        return Bounds.below(self.limit(limits))

    def show(self, value: float) -> str:
        """With its unit."""
        return {"s": f"{value:.2f} s", "ratio": f"{value:.1%}", "count": f"{value:g}"}[self.unit]


TABLE = (
    Metric("api.response_seconds", "API", "レスポンスタイム", "s", "アラート", "SRE",
           "look for the slow requests: search-logs with duration_ms>2000; then check-connections"),
    Metric("api.error_ratio", "API", "エラーレート", "ratio", "緊急対応", "SRE",
           "summarise-errors says which; diagnose-application why, and what to run next", "severe", "severe"),
    Metric("postgres.connections.used_ratio", "DB", "接続数", "ratio", "スケールアップ", "DBA",
           "advise-scaling says by how much; close-idle-connections ends what holds them for nothing", blind="severe"),
    Metric("postgres.replication.lag_seconds", "DB", "レプリケーション遅延", "s", "調査", "DBA",
           "diagnose-database and check-replication say what holds the standby back: a long query there, its disk, the "
           "network, or a paused replay"),
    Metric("redis.memory.used_ratio", "Redis", "メモリ使用率", "ratio", "キャッシュクリア", "SRE",
           "clear-cache for what is made anew; check-redis-memory says what fills it", alarm="critical"),
    Metric("host.cpu.used_ratio", "インフラ", "CPU使用率", "ratio", "スケールアップ", "SRE",
           "advise-scaling says by how much; look for what takes it: check-docker-usage, check-connections"),
    Metric("host.disk.used_ratio", "インフラ", "ディスク使用率", "ratio", "クリーンアップ", "DevOps",
           "clean-logs, clean-docker, prune-backups; never anything in pg_wal by hand"),
    Metric("ai.tokens.budget_ratio", "AI", "トークン使用量", "ratio", "コスト最適化", "SRE",
           "report-token-usage says which models and days; lower the limit per user"),
)  # fmt: skip
BESIDES = (
    Metric("services.stopped", "サービス", "停止中のサービス", "count", "アラート", "SRE",
           "find out why it stopped (its log), then start it; diagnose-application tells causes", "severe"),
    Metric("postgres.wal.streams_missing", "DB", "WALの受信停止", "count", "調査", "DBA",
           "start the standby or the receiver that does not stream: until then a lost primary loses writes", "severe"),
)  # fmt: skip
METRICS: Mapping[str, Metric] = {one.name: one for one in (*TABLE, *BESIDES)}


def named(metric: str, host: str) -> str:
    """A metric of another host than the watcher's: `host.disk.used_ratio@db1`."""
    return f"{metric}@{host}"


def metric_of(name: str) -> Metric:
    """The row of a metric, whichever host it is of."""
    row, _, host = name.partition("@")
    return replace(METRICS[row], name=name, title=f"{METRICS[row].title} ({host})") if host else METRICS[row]
