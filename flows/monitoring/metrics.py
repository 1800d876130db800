"""The metrics of 付録B, measured every minute."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from blocks.environment import Environment
from flows.monitoring.rounds import TIMING, Round, take_round
from flows.monitoring.table import ALARMS, Alarm, alarm_of
from flows.recovery.objectives.check import serves_elsewhere
from runbook import clock
from runbook.flow import flow
from runbook.page.plots import Trace, traces
from runbook.report import Evidence, Report, Status
from runbook.run import runbook
from runbook.run_name import RunName
from tasks.monitoring.history import histories
from tasks.monitoring.hysteresis import AlarmState

if TYPE_CHECKING:
    from pandas import DataFrame


@flow(name="watch-metrics", flow_run_name=RunName("watch-metrics {environment}"))
def watch_metrics(environment: str) -> Report:
    """監視メトリクス (付録B)

    Measures the table's eight rows and two more: response times and error rate of the last five minutes (from the log
    and /health), connections, replication lag, Redis memory, CPU, disks, tokens against the budget, stopped services,
    and standbys or WAL receivers that do not stream. `python -m flows.monitoring.serve` measures every minute; launch
    this flow by hand to see the current values.

    An alarm is raised after three measurements in a row and two minutes over the limit. It clears after the same time
    at 10 % below the limit. A metric that cannot be measured counts as exceeded: a dead database is an alarm. Each
    change is an event (ops.metric.exceeded, ops.metric.recovered), on which Prefect's automations act; an event that
    Prefect did not accept is sent again. [thresholds] in the environment's TOML sets the limits. Redis memory raises
    its alarm at its second limit.

    It changes nothing but its history in reports/metrics: every value for two days, then hours for 13 months. A report
    is filed when something changed, and once an hour.

    Departs from the manual, which names neither a duration nor a statistic: this measures the 95th percentile of
    requests and the fullest disk.

    Args:
        environment: Environment (lab, staging, production …)
    """
    env = Environment.find(environment)
    with runbook("Watch metrics", env, often=True) as report:
        if elsewhere := serves_elsewhere(env):
            report.outcome = f"users are sent to {elsewhere}: the metrics of this region are not judged"
            return report
        now = datetime.now(UTC)
        found = take_round(env, now, TIMING)
        judge_metrics(report, env, found)
        show_history(report, env, now - timedelta(days=1))
    return report


BIN = "6min"


def judge_metrics(report: Report, env: Environment, found: Round) -> None:
    """A finding for each metric, and one if Prefect did not accept the events."""
    report.fact("measured", f"{clock.text(found.at)}" + (" by another run" if found.by_another else ""))
    for name, standing in found.standings.items():
        _judge(report, env, alarm_of(name), standing)
    exceeded = [alarm_of(name).title for name, standing in found.standings.items() if standing.exceeded]
    for name, change in found.changed.items():
        fact = "exceeded in this round" if change == "exceeded" else "recovered in this round"
        report.fact(fact, ", ".join(filter(None, [report.facts.get(fact), name])))
    if found.problem:
        report.warn(
            "events sent to Prefect",
            "check the Prefect server and PREFECT_API_URL; the events are sent as soon as it answers",
            value=f"{found.unsent} events are not sent yet: {found.problem}",
        )
    report.outcome = (
        f"over the limit: {', '.join(exceeded)}" if exceeded else f"{len(found.standings)} metrics are healthy"
    )


def _judge(report: Report, env: Environment, metric: Alarm, standing: AlarmState) -> None:
    limit, value = metric.limit(env.limits), standing.value
    shown = "not measured" if value is None else metric.show(value)
    since = f", since {clock.text(standing.since, 'minutes')}" if standing.exceeded and standing.since else ""
    row = f" (over it {standing.against} of {TIMING.samples} times)" if standing.against else ""
    if row and standing.exceeded:
        row = f" (below it again {standing.against} of {TIMING.samples} times)"
    severity = metric.blind if value is None else metric.severity
    report.require(
        metric.full_title,
        not standing.exceeded,
        metric.hint,
        value=f"{shown}{since}{row}: {standing.told}",
        expected=f"at most {metric.show(limit)} ({metric.action})",
        worst=Status.CRITICAL if severity == "severe" else Status.WARN,
    )


def show_history(report: Report, env: Environment, since: datetime) -> None:
    """The last 24 hours of every metric, with its limit."""
    try:
        found = histories(env.reports_directory, since)
    except OSError as error:
        report.warn(
            "the history", "correct the owner of the folder reports/metrics", value=f"not read: {error.strerror}"
        )
        return
    known = found[found["metric"].str.partition("@")[0].isin(ALARMS)]
    lines = [_trace(env, alarm_of(str(name)), samples) for name, samples in known.groupby("metric")]
    if lines:
        report.attach(Evidence("The last 24 hours (dashed: the limit)", svg=traces(lines, env.zone)))


def _trace(env: Environment, alarm: Alarm, samples: DataFrame) -> Trace:
    """The highest value of every six minutes: a short peak stays visible."""
    highest = samples.set_index("at")["most"].resample(BIN).max().dropna()
    points = list(zip(highest.index.to_pydatetime(), highest, strict=True))
    newest = alarm.show(float(samples["value"].iloc[-1]))
    return Trace(alarm.name, points, newest, alarm.metric.unit, alarm.limit(env.limits))
