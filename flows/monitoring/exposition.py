"""An environment's metrics for Prometheus: gauges, read at each scrape.

A value that could not be measured is absent, and its `…_measured` is 0: no rule mistakes silence for a good value.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from blocks.environment import Environment
from flows.monitoring.sources import Reading
from flows.monitoring.table import ALARMS
from runbook.errors import OpsError
from tasks.monitoring import state
from tasks.recovery_points import standing
from tasks.recovery_points.standing import RecoveryStanding

PREFIX = "ops_"
FRESH, CHECKED = timedelta(minutes=3), timedelta(minutes=30)
"""Older rounds and older recoverability checks count as not measured."""
ROUND = "watch_last_round_timestamp_seconds"
HELP: Mapping[str, str] = {
    ROUND: "time of the watcher's last round",
    "metric_exceeded": "1: the metric exceeds its limit, and its alarm is active",
    "objective_rpo_seconds": "RPO of the environment",
    "objective_rto_seconds": "RTO of the environment",
    "recovery_checked_timestamp_seconds": "time of the last check-recovery-objectives",
    "recovery_point_timestamp_seconds": "newest point in time that can be restored",
    "recovery_loss_seconds": "data loss of a restore now",
    "recovery_estimate_seconds": "estimated duration of that restore, from measured recoveries",
    "recovery_proven": "1: a restore has proven this recovery point",
    "backup_age_seconds": "age of the newest backup",
    "backup_verified_age_seconds": "age of the newest verified backup",
    "drill_last_timestamp_seconds": "end of the last drill",
    "drill_last_ok": "1: the last drill succeeded",
    "drill_last_rto_seconds": "measured RTO of the last drill",
    "drill_next_timestamp_seconds": "time of the next scheduled drill",
}
Known = Callable[[], tuple[datetime | None, Mapping[str, Reading], Mapping[str, bool]]]


def exported(metric: str) -> str:
    """`api.error_ratio` → `ops_api_error_ratio`."""
    return PREFIX + metric.replace(".", "_")


def names() -> set[str]:
    """Every name that rules and dashboards can use."""
    measured = {exported(name) for name in ALARMS} | {PREFIX + name for name in HELP if name in _MEASURED}
    return measured | {f"{name}_measured" for name in measured} | {PREFIX + name for name in HELP}


_MEASURED = (
    "recovery_loss_seconds",
    "recovery_estimate_seconds",
    "backup_age_seconds",
    "backup_verified_age_seconds",
    "drill_last_timestamp_seconds",
    "drill_last_rto_seconds",
)


class Exposition(Collector):
    """The metrics of one environment, as of the scrape."""

    def __init__(self, find: Callable[[], Environment], known: Known, now: Callable[[], datetime]) -> None:
        self._find, self._known, self._now = find, known, now

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Called for each scrape. A wrong TOML serves nothing, which an alert rule detects."""
        try:
            env = self._find()
        except OpsError:
            return
        gauges = Gauges(env.name)
        self._rounds(gauges)
        gauges.set("objective_rpo_seconds", env.rpo_seconds)
        gauges.set("objective_rto_seconds", env.rto_seconds)
        if found := standing.read(env.reports_directory):
            _recovery(gauges, found, self._now())
        yield from gauges.families()

    def _rounds(self, gauges: Gauges) -> None:
        at, readings, exceeded = self._known()
        is_fresh = at is not None and self._now() - at <= FRESH
        if at:
            gauges.set(ROUND, at.timestamp())
        for name, reading in readings.items():
            row, _, host = name.partition("@")
            labels = {"host": host or socket.gethostname()} if row.startswith("host.") else {}
            gauges.measure(row.replace(".", "_"), reading.value if is_fresh else None, **labels)
            if is_fresh and name in exceeded:
                gauges.set("metric_exceeded", float(exceeded[name]), metric=row, host=labels.get("host", ""))


class Gauges:
    """Metric families, filled sample by sample."""

    def __init__(self, environment: str) -> None:
        self._environment, self._families = environment, dict[str, GaugeMetricFamily]()

    def families(self) -> Iterator[GaugeMetricFamily]:
        """Every family with a sample."""
        yield from self._families.values()

    def set(self, name: str, value: float, help_text: str = "", **labels: str) -> None:
        """One sample."""
        known = {"environment": self._environment, **labels}
        family = self._families.get(name)
        if family is None:
            title = help_text or HELP.get(name, METRICS_HELP.get(name, ""))
            family = self._families[name] = GaugeMetricFamily(PREFIX + name, title, labels=list(known))
        family.add_metric(list(known.values()), value)

    def measure(self, name: str, value: float | None, **labels: str) -> None:
        """A sample if there is a value, and `…_measured`."""
        if value is not None:
            self.set(name, value, **labels)
        self.set(f"{name}_measured", float(value is not None), "1: measured, 0: not", **labels)


METRICS_HELP = {name.replace(".", "_"): f"{one.title} (appendix B)" for name, one in ALARMS.items()}


def _recovery(gauges: Gauges, found: RecoveryStanding, now: datetime) -> None:
    gauges.set("recovery_checked_timestamp_seconds", found.checked.timestamp())
    is_fresh = now - found.checked <= CHECKED
    for one in found.resources:
        labels, point = {"resource": one.resource}, one.at if is_fresh else None
        if point:
            gauges.set("recovery_point_timestamp_seconds", point.timestamp(), **labels)
        gauges.measure("recovery_loss_seconds", one.loss_seconds if point else None, **labels)
        gauges.measure("recovery_estimate_seconds", one.seconds if point else None, **labels)
        gauges.set("recovery_proven", float(bool(point and one.proven)), **labels)
    for age in found.backups:
        for name, taken in (("backup_age_seconds", age.taken), ("backup_verified_age_seconds", age.verified)):
            seconds = (now - taken).total_seconds() if taken and is_fresh else None
            gauges.measure(name, seconds, kind=age.kind)
    drill = found.drill
    gauges.measure("drill_last_timestamp_seconds", drill.at.timestamp() if drill else None)
    gauges.measure("drill_last_rto_seconds", drill.rto_seconds if drill else None)
    if drill:
        gauges.set("drill_last_ok", float(drill.status in ("OK", "WARN")))
    if found.next_drill:
        gauges.set("drill_next_timestamp_seconds", found.next_drill.timestamp())


def known_of(env: Callable[[], Environment]) -> Known:
    """The results of the last round, of any watcher of the environment."""

    def known() -> tuple[datetime | None, Mapping[str, Reading], Mapping[str, bool]]:
        kept = state.load(env().reports_directory)
        readings = {name: Reading(one.value, one.told) for name, one in kept.standings.items()}
        return kept.at, readings, {name: one.exceeded for name, one in kept.standings.items()}

    return known


def serve(exposition: Exposition, host: str, port: int) -> Callable[[], None]:
    """Answer GET /metrics in a thread; returns the function that stops it.

    Raises:
        OpsError: the address cannot be used.
    """
    registry = CollectorRegistry()
    registry.register(exposition)
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise OpsError(
            f"metrics cannot be served on {host}:{port}: {error.strerror or error}",
            "correct [monitoring] metrics_address, or stop the program that uses the port",
        ) from None

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
