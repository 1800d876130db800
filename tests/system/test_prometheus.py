"""The alert rules and /metrics by Prometheus' own programs."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from deployments.observability import RULES
from flows.monitoring.exposition import Exposition
from flows.monitoring.sources import Reading
from flows.monitoring.table import ALARMS
from tasks.recovery_points import standing
from tests.monitoring.test_exposition import record
from tests.monitoring.watched import NAME, Watched, backend, small_postgres, small_redis, watched

__all__ = ["backend", "small_postgres", "small_redis", "watched"]
pytestmark = pytest.mark.system
TWO_WATCHERS = 'environment="prod",instance="{0}:9187"'
MINUTES = 30


def promtool(*arguments: str, given: bytes = b"") -> str:
    done = subprocess.run(["promtool", *arguments], input=given, capture_output=True, check=False, timeout=120)
    output = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, output
    return output


def series(name: str, value: str, more: str = "") -> list[dict[str, str]]:
    """The same from two watchers."""
    labels = (TWO_WATCHERS.format(host) + more for host in ("a", "b"))
    return [{"series": f"{name}{{{one}}}", "values": value} for one in labels]


def test_prometheus_fires_what_it_should_and_nothing_else(tmp_path: Path) -> None:
    assert "rules found" in promtool("check", "rules", str(RULES))
    given = [
        *series("ops_objective_rpo_seconds", f"3600x{MINUTES}"),
        *series("ops_recovery_loss_seconds", f"7200x{MINUTES}", ',resource="database"'),
        *series("ops_recovery_loss_seconds", f"60x{MINUTES}", ',resource="redis"'),
        *series("ops_host_disk_used_ratio", f"0.9x{MINUTES}", ',host="db1"'),
        *series("ops_api_error_ratio", f"0.01x{MINUTES}"),
        *series("ops_api_error_ratio_measured", f"1x{MINUTES}"),
        *series("ops_watch_last_round_timestamp_seconds", "0+60x5 300x2"),
    ]
    wanted = {
        "OpsRecoveryLossOverObjective": 2,
        "OpsHostDiskUsedRatio": 2,
        "OpsWatcherSilent": 2,
        "OpsApiErrorRatio": 0,
    }
    checks = [
        {
            "expr": f'count(ALERTS{{alertname="{name}",alertstate="firing"}}) or vector(0)',
            "eval_time": "20m",
            "exp_samples": [{"labels": "{}", "value": count}],
        }
        for name, count in wanted.items()
    ]
    test = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "1m",
        "tests": [{"interval": "1m", "input_series": given, "promql_expr_test": checks}],
    }
    path = tmp_path / "test.yaml"
    path.write_text(yaml.safe_dump(test))
    promtool("test", "rules", str(path))


def test_prometheus_reads_what_the_watcher_serves(watched: Watched) -> None:
    now = datetime.now(UTC)
    standing.save(watched.reports, record(now))
    readings = {name: Reading(0.5, "") for name in ALARMS} | {"host.disk.used_ratio@db1": Reading(None, "")}
    registry = CollectorRegistry()
    registry.register(Exposition(lambda: watched.environment, lambda: (now, readings, {}), lambda: now))
    text = generate_latest(registry)
    assert f'environment="{NAME}"'.encode() in text
    promtool("check", "metrics", given=text)
