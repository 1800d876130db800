"""The metrics of 付録B, watched every minute."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from prefect import flow

from blocks.environment import Environment
from flows.monitoring.metric_findings import judge_metrics, tell_history
from flows.monitoring.rounds import TIMING, take_round
from flows.recovery.objectives import serves_elsewhere
from runbook.report import Report
from runbook.run import runbook


@flow(name="watch-metrics", flow_run_name="watch-metrics {environment}")
def watch_metrics(environment: str) -> Report:
    """監視メトリクス (付録B)

    Measures the table's eight rows, and what else costs little: response times and the error rate of the last five
    minutes by the application's log and by /health, connections, replication lag, Redis memory, CPU, disks, tokens
    against the budget; services that do not run, and who is to receive WAL and does not. It runs every minute, in
    `python -m flows.monitoring.serve`; launched by hand it shows what is known now.

    A metric is exceeded when it was over its limit for three measurements in a row and two minutes, and well again when
    it was a tenth below it as long. What could not be measured counts as over the limit: a dead database is an alarm.
    Each change is an event (ops.metric.exceeded, ops.metric.recovered), from which Prefect's automations do what the
    table says; one that Prefect could not take is told again. Limits: [thresholds] of the environment's TOML; of Redis'
    memory the second one is the table's.

    It changes nothing but its own notes under reports/metrics: values of two days, then hours of 13 months. A run that
    finds the same as the one before is counted; a report is filed where something changed, and once an hour.

    Departs from the manual: it says neither for how long nor of what: so 95 of 100 requests, and the fullest disk.

    Args:
        environment: 対象の環境
    """
    env = Environment.find(environment)
    with runbook("Watch metrics", env, often=True) as report:
        if elsewhere := serves_elsewhere(env):
            report.outcome = f"this region does not serve (users are sent to {elsewhere}): nothing to judge"
            return report
        now = datetime.now(UTC)
        found = take_round(env, now, TIMING)
        judge_metrics(report, env, found)
        tell_history(report, env, now - timedelta(days=1), now)
    return report
