"""Alert rules for Prometheus and a dashboard for Grafana, from the monitoring's own table and an environment's limits:

python -m deployments.observability [--environment production]

Without an environment they have the manual's limits. Objectives (RPO, RTO) are metrics themselves: rules compare them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from blocks.config import toml
from flows.monitoring.exposition import exported
from flows.monitoring.rounds import TIMING
from flows.monitoring.table import ALARMS, Alarm
from runbook import metrics
from runbook.drivers import exit_code
from runbook.errors import OpsError

HERE = Path(__file__).parent
RULES, DASHBOARD = HERE / "prometheus" / "alerts.yaml", HERE / "grafana" / "interview-ops.json"
Limits = Mapping[str, tuple[float, float]]
Row = tuple[str, str, str, float | None]
SEVERITY = {"severe": "critical", "normal": "warning"}
DAY = 86400
VERIFIED_DAYS, DRILL_DAYS = 8, 100
"""verify-backup runs every week, run-drill every quarter; some days late is no alarm."""
OVER = "{0} > on (environment) group_left () max by (environment) ({1})"
"""`max`: two watchers may serve the same environment."""


def alert(name: str, expr: str, severity: str, summary: str, todo: str, minutes: float = 2) -> dict[str, Any]:
    """One rule."""
    return {
        "alert": name,
        "expr": expr,
        "for": f"{minutes:g}m",
        "labels": {"severity": severity},
        "annotations": {"summary": f"{{{{ $labels.environment }}}}: {summary}", "description": todo},
    }


def rules(limits: Limits) -> dict[str, Any]:
    """alerts.yaml (https://prometheus.io/docs/prometheus/latest/configuration/alerting_rules/)."""
    rows = [rule for row in ALARMS.values() for rule in _of_alarm(row, limits)]
    return {
        "groups": [
            {"name": "interview-ops-metrics", "rules": rows},
            {"name": "interview-ops-recovery", "rules": list(_of_recovery(limits))},
        ]
    }


def _of_alarm(row: Alarm, limits: Limits) -> list[dict[str, Any]]:
    name, limit = exported(row.name), row.limit(limits)
    camel = "".join(part.capitalize() for part in row.name.replace(".", "_").split("_"))
    minutes = TIMING.seconds / 60
    return [
        alert(
            f"Ops{camel}",
            f"{name} > {limit:g}",
            SEVERITY[row.severity],
            f"{row.title} over {row.show(limit)} (appendix B: {row.action})",
            row.hint,
            minutes,
        ),
        alert(
            f"Ops{camel}NotMeasured",
            f"{name}_measured == 0",
            SEVERITY[row.blind],
            f"{row.title} cannot be measured",
            "read the watcher's log, and the report of watch-metrics",
            minutes,
        ),
    ]


def _of_recovery(limits: Limits) -> list[dict[str, Any]]:
    oldest = limits.get(metrics.BACKUP_AGE.name, (3600.0, float(DAY)))[1]
    return [
        alert(
            "OpsWatcherSilent",  # of a day: the series of a watcher that died ends
            "time() - max_over_time(ops_watch_last_round_timestamp_seconds[1d]) > 180",
            "critical",
            "the watcher has not measured for three minutes",
            "systemctl status interview-ops-watcher",
        ),
        alert(
            "OpsRecoveryNotChecked",
            "time() - ops_recovery_checked_timestamp_seconds > 1800",
            "critical",
            "nobody knows what can be restored",
            "run check-recovery-objectives; check Prefect's worker",
        ),
        alert(
            "OpsRecoveryLossOverObjective",
            OVER.format("ops_recovery_loss_seconds", "ops_objective_rpo_seconds"),
            "critical",
            "more than the RPO would be lost ({{ $labels.resource }})",
            "run show-recovery-options",
            5,
        ),
        alert(
            "OpsRecoveryLossNotMeasured",
            "ops_recovery_loss_seconds_measured == 0",
            "critical",
            "nothing can be restored, or nobody knows ({{ $labels.resource }})",
            "run check-recovery-objectives",
            10,
        ),
        alert(
            "OpsRecoveryEstimateOverObjective",
            OVER.format("ops_recovery_estimate_seconds", "ops_objective_rto_seconds"),
            "warning",
            "a recovery would take longer than the RTO ({{ $labels.resource }})",
            "see in past reports which step takes long",
            15,
        ),
        alert(
            "OpsRecoveryNotProven",
            "ops_recovery_proven == 0",
            "warning",
            "no restore has proven the newest recovery point ({{ $labels.resource }})",
            "run verify-backup",
            60,
        ),
        alert(
            "OpsBackupOld",
            f"ops_backup_age_seconds > {oldest:g}",
            "critical",
            "the newest backup is too old ({{ $labels.kind }})",
            "run the backup by hand, then check its schedule",
        ),
        alert(
            "OpsBackupNotVerified",
            f"ops_backup_verified_age_seconds > {VERIFIED_DAYS * DAY}",
            "warning",
            "no recent backup is verified ({{ $labels.kind }})",
            "run verify-backup",
        ),
        alert(
            "OpsBackupVerifiedNotMeasured",
            "ops_backup_verified_age_seconds_measured == 0",
            "warning",
            "no backup is verified, or nobody knows ({{ $labels.kind }})",
            "run verify-backup",
            60,
        ),
        alert(
            "OpsDrillFailed",
            "ops_drill_last_ok == 0",
            "warning",
            "the last drill failed",
            "read its report, fix what it found, run run-drill again",
        ),
        alert(
            "OpsDrillOverdue",
            f"time() - ops_drill_last_timestamp_seconds > {DRILL_DAYS * DAY}",
            "warning",
            "no drill for over a quarter",
            "run run-drill",
        ),
    ]


def dashboard(limits: Limits) -> dict[str, Any]:
    """A Grafana dashboard (https://grafana.com/docs/grafana/latest/dashboards/build-dashboards/view-dashboard-json-model/)."""
    panels = [_panel(number, *row) for number, row in enumerate([*_recovery_rows(limits), *_alarm_rows(limits)], 1)]
    variable = {
        "name": "environment",
        "type": "query",
        "label": "environment",
        "multi": True,
        "includeAll": True,
        "datasource": _SOURCE,
        "query": "label_values(ops_objective_rpo_seconds, environment)",
        "refresh": 2,
    }
    return {
        "title": "interview-ops",
        "uid": "interview-ops",
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "1m",
        "time": {"from": "now-24h", "to": "now"},
        "tags": ["interview-ops"],
        "__inputs": [{"name": "DS_PROMETHEUS", "label": "Prometheus", "type": "datasource", "pluginId": "prometheus"}],
        "templating": {"list": [variable]},
        "panels": panels,
    }


def _recovery_rows(limits: Limits) -> list[Row]:
    """Title, query, unit and limit of each panel on what can be recovered."""
    return [
        ("Lost if restored now, of the RPO", 'ops_recovery_loss_seconds{environment=~"$environment"}', "s", None),
        ("Estimated duration of a recovery", 'ops_recovery_estimate_seconds{environment=~"$environment"}', "s", None),
        (
            "Age of the newest backup",
            'ops_backup_age_seconds{environment=~"$environment"}',
            "s",
            limits.get(metrics.BACKUP_AGE.name, (3600.0, float(DAY)))[1],
        ),
        (
            "Age of the newest verified backup",
            'ops_backup_verified_age_seconds{environment=~"$environment"}',
            "s",
            float(VERIFIED_DAYS * DAY),
        ),
        (
            "Since the last drill",
            'time() - ops_drill_last_timestamp_seconds{environment=~"$environment"}',
            "s",
            float(DRILL_DAYS * DAY),
        ),
        ("RTO of the last drill", 'ops_drill_last_rto_seconds{environment=~"$environment"}', "s", None),
    ]


def _alarm_rows(limits: Limits) -> list[Row]:
    """The same of each metric with an alarm."""
    units = {"s": "s", "ratio": "percentunit", "count": "short"}
    return [
        (
            f"{one.title} ({one.name})",
            f'{exported(one.name)}{{environment=~"$environment"}}',
            units[one.metric.unit],
            one.limit(limits),
        )
        for one in ALARMS.values()
    ]


_SOURCE = {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}


def _panel(number: int, title: str, expr: str, unit: str, limit: float | None) -> dict[str, Any]:
    steps = [{"color": "green", "value": None}, *([{"color": "red", "value": limit}] if limit is not None else [])]
    return {
        "id": number,
        "title": title,
        "type": "timeseries",
        "datasource": _SOURCE,
        "gridPos": {"h": 8, "w": 8, "x": (number - 1) % 3 * 8, "y": (number - 1) // 3 * 8},
        "fieldConfig": {
            "defaults": {
                "unit": unit,
                "min": 0,
                "thresholds": {"mode": "absolute", "steps": steps},
                "custom": {"thresholdsStyle": {"mode": "line" if limit is not None else "off"}},
            },
            "overrides": [],
        },
        "targets": [
            {
                "refId": "A",
                "datasource": _SOURCE,
                "expr": expr,
                "legendFormat": "{{environment}} {{resource}}{{kind}}{{host}}",
            }
        ],
    }


def texts(limits: Limits) -> dict[Path, str]:
    """Both files."""
    head = "# Made by python -m deployments.observability: change the table or [thresholds], then make it again.\n"
    dumped = yaml.safe_dump(rules(limits), sort_keys=False, allow_unicode=True, width=120)
    return {RULES: head + dumped, DASHBOARD: json.dumps(dashboard(limits), ensure_ascii=False, indent=1) + "\n"}


def main(arguments: Sequence[str] = ()) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m deployments.observability")
    parser.add_argument("--environment", default="", help="whose [thresholds]; empty: the manual's limits")
    given = parser.parse_args(arguments or None)
    try:
        limits = toml.environment(given.environment).limits if given.environment else {}
    except OpsError as error:
        print(error, file=sys.stderr)
        return 1
    for path, text in texts(limits).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
