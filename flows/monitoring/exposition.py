"""What is known of an environment, for Prometheus: gauges, read when they are asked for.

A value that could not be measured is absent; `…_measured` is 0 then. So no rule mistakes silence for a good value.
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
from tasks.recovery_points.standing import Standing

PREFIX = "ops_"
FRESH, CHECKED = timedelta(minutes=3), timedelta(minutes=30)
"""Older rounds, and older checks of recoverability, measure nothing any more."""
ROUND = "watch_last_round_timestamp_seconds"
HELP: Mapping[str, str] = {
    ROUND: "when the watcher measured last",
    "metric_exceeded": "1: over its limit for long enough to be an alarm",
    "objective_rpo_seconds": "the most that may be lost",
    "objective_rto_seconds": "the longest that a recovery may take",
    "recovery_checked_timestamp_seconds": "when check-recovery-objectives read the recovery points last",
    "recovery_point_timestamp_seconds": "the newest moment that can be restored",
    "recovery_loss_seconds": "what would be lost if it were restored now",
    "recovery_estimate_seconds": "how long that would take, by recoveries that were measured",
    "recovery_proven": "1: a restore has proven this recovery point",
    "backup_age_seconds": "age of the newest backup",
    "backup_verified_age_seconds": "age of the newest backup that a restore has verified",
    "drill_last_timestamp_seconds": "when the last drill ended",
    "drill_last_ok": "1: it succeeded",
    "drill_last_rto_seconds": "seconds until users were served again in it",
    "drill_next_timestamp_seconds": "when the next drill is scheduled",
}
Known = Callable[[], tuple[datetime | None, Mapping[str, Reading], Mapping[str, bool]]]


def exported(metric: str) -> str:
    """`api.error_ratio` → `ops_api_error_ratio`."""
    return PREFIX + metric.replace(".", "_")


def names() -> set[str]:
    """Every name that can be exported: what rules and dashboards may use."""
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
    """The metrics of one environment, as of the moment of the question."""

    def __init__(self, find: Callable[[], Environment], known: Known, now: Callable[[], datetime]) -> None:
        self._find, self._known, self._now = find, known, now

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Called for each scrape. Where the environment's TOML is wrong nothing is served: its rules notice that."""
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
    """Families that are filled sample by sample."""

    def __init__(self, environment: str) -> None:
        self._environment, self._families = environment, dict[str, GaugeMetricFamily]()

    def families(self) -> Iterator[GaugeMetricFamily]:
        """All that were set."""
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
        """A sample where there is a value; and whether there is one."""
        if value is not None:
            self.set(name, value, **labels)
        self.set(f"{name}_measured", float(value is not None), "1: measured, 0: not", **labels)


METRICS_HELP = {name.replace(".", "_"): f"{one.title} (付録B)" for name, one in ALARMS.items()}


def _recovery(gauges: Gauges, found: Standing, now: datetime) -> None:
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
    """What the rounds of an environment have found, whichever watcher took them."""

    def known() -> tuple[datetime | None, Mapping[str, Reading], Mapping[str, bool]]:
        kept = state.load(env().reports_directory)
        readings = {name: Reading(one.value, one.told) for name, one in kept.standings.items()}
        return kept.at, readings, {name: one.exceeded for name, one in kept.standings.items()}

    return known


def serve(exposition: Exposition, host: str, port: int) -> Callable[[], None]:
    """Answer GET /metrics in a thread; returns what ends it.

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
            "correct [monitoring] metrics_address, or end what uses it",
        ) from None

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
