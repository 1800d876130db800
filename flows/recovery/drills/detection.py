"""How a drill detects its fault: from the readings of watch-metrics, never from knowledge of the fault.

It uses the monitoring's readings and its rule for an exceeded metric, with a shorter minimum duration: two readings in
a row. One sensor is not monitored every minute: the content of the data. A new sensor in `SENSORS` is used by every
drill.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

from blocks.environment import Environment
from flows.database.expectations import FACT, NONE
from flows.monitoring.sources import STREAMS, Reading, Readings, find_primary, read_application, read_database
from flows.monitoring.table import ALARMS
from flows.recovery.drills.scenario import Drill, Symptom, now
from runbook import metrics
from runbook.errors import OpsError, Unreachable
from runbook.kinds import probe
from runbook.wait import until
from tasks.integrity import run_expectations
from tasks.monitoring.hysteresis import AlarmBounds, AlarmState, Timing, step

Sensor = Callable[[Environment, Path], str]
EVERY_SECONDS = 0.25
IN_A_ROW = 2
"""One bad reading is no alarm."""


def application(env: Environment, _: Path) -> str:
    """Health of backend and frontend now, as a load balancer queries it."""
    return exceeded(env, read_application(env, now(), timedelta()), metrics.API_ERRORS.name)


def database(env: Environment, _: Path) -> str:
    """A server accepts writes, and has the application's database."""
    try:
        find_primary(env)
    except OpsError as error:
        return error.message
    return ""


def replication(env: Environment, _: Path) -> str:
    """Every configured standby and receiver streams from the primary."""
    return exceeded(env, read_database(env), STREAMS)


def exceeded(env: Environment, readings: Readings, name: str) -> str:
    """The text of a metric that exceeds its limit or was not measured; "" if it is healthy or not monitored here."""
    found = readings.get(name, Reading(0.0, ""))
    is_healthy = found.value is not None and found.value <= ALARMS[name].limit(env.limits)
    return "" if is_healthy else found.told


def content(env: Environment, evidence: Path) -> str:
    """The data satisfies the expectations, if there are any. Other sensors report a database that is down."""
    if not env.suites:
        return ""
    env.forget_roles()
    try:
        found = run_expectations.work(env.postgres, env.postgres.database, evidence, env.suites)
    except Unreachable:
        return ""
    except OpsError as error:
        return error.message
    return "; ".join(found.failed[:3])


def require_expectations(drill: Drill) -> None:
    """The live data satisfies the expectations after the recovery, if there are any."""
    if not drill.env.suites:
        drill.report.fact(FACT, NONE)
        return
    broken = content(drill.env, drill.directory / "evidence")
    drill.report.require(
        "expectations after the recovery",
        not broken,
        "compare these rows with the backup: the recovered data violates the application's rules",
        value=broken or "all satisfied",
    )


def expectations_text(env: Environment) -> str:
    """For the checklist, after what else was proven."""
    return ", expectations satisfied" * bool(env.suites)


SENSORS: Mapping[str, Sensor] = {
    "application": application,
    "database": database,
    "replication": replication,
    "content": content,
}
SLOW = ("content",)
ALARM = AlarmBounds(0, 0)
"""A sensor that reports a problem counts as 1."""


@probe
def ask_all(env: Environment, evidence: Path, sensors: Mapping[str, Sensor] = SENSORS) -> dict[str, str]:
    """The text of every sensor now, "" if healthy. A sensor with a problem is queried `IN_A_ROW` times."""
    return {name: _confirmed(sensor, env, evidence) for name, sensor in sensors.items()}


def _confirmed(sensor: Sensor, env: Environment, evidence: Path) -> str:
    for _ in range(IN_A_ROW):
        text = sensor(env, evidence)
        if not text:
            break
    return text


def quick(env: Environment) -> dict[str, str]:
    """Every sensor except the slow ones."""
    return {name: sensor(env, env.reports_directory) for name, sensor in SENSORS.items() if name not in SLOW}


@probe
def watch(env: Environment, evidence: Path, seconds: float, sensors: Mapping[str, Sensor] = SENSORS) -> Symptom:
    """Query all of them until one reports a problem `IN_A_ROW` times.

    Raises:
        OpsError: none did within `seconds`.
    """
    standings = dict.fromkeys(sensors, AlarmState())
    pending = dict[str, Future[str]]()
    pool = ThreadPoolExecutor(len(SLOW), thread_name_prefix="sensor")

    def find_symptom() -> Symptom | None:
        for name, sensor in sensors.items():
            text = _answer(pool, pending, name, sensor, env, evidence)
            if text is None:
                continue
            timing = Timing(1 if name in SLOW else IN_A_ROW, seconds=0)
            standings[name], change = step(standings[name], float(bool(text)), text, now(), ALARM, timing)
            if change:
                return Symptom(name, text, now())
        return None

    try:
        return _found(until(find_symptom, what="an alarm", seconds=seconds, every_seconds=EVERY_SECONDS))
    except Unreachable:
        raise OpsError(
            f"no sensor noticed the fault within {seconds:.0f} s",
            "add a sensor for this kind of fault: the monitoring does not notice it",
        ) from None
    finally:
        pool.shutdown(wait=False)


def _answer(
    pool: ThreadPoolExecutor,
    pending: dict[str, Future[str]],
    name: str,
    sensor: Sensor,
    env: Environment,
    evidence: Path,
) -> str | None:
    """A slow sensor runs in its own thread; None: not finished."""
    if name not in SLOW:
        return sensor(env, evidence)
    if name not in pending:
        pending[name] = pool.submit(sensor, env, evidence)
    return pending.pop(name).result() if pending[name].done() else None


def _found(symptom: Symptom | None) -> Symptom:
    assert symptom, "`until` returns what is true only"
    return symptom
