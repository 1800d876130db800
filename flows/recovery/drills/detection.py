"""How a drill learns of its fault: from what watch-metrics measures, never from knowledge of the fault.

The monitoring's own readings and its own rule for when a metric is exceeded, with a shorter minimum duration: two
readings in a row. Only the content of the data is beside them, which no monitoring reads every minute.
The one place where alerts plug in: a sensor more in `SENSORS`, and every drill listens to it.
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
from tasks.monitoring.hysteresis import Bounds, Standing, Timing, step

Sensor = Callable[[Environment, Path], str]
EVERY_SECONDS = 0.25
IN_A_ROW = 2
"""One bad answer is no alarm."""


def application(env: Environment, _: Path) -> str:
    """Health of backend and frontend, as their users' load balancer asks for it: nothing of the minutes before."""
    return exceeded(env, read_application(env, now(), timedelta()), metrics.API_ERRORS.name)


def database(env: Environment, _: Path) -> str:
    """Some server takes writes, and has the application's database."""
    try:
        find_primary(env)
    except OpsError as error:
        return error.message
    return ""


def replication(env: Environment, _: Path) -> str:
    """Everybody who is to follow the primary streams from it."""
    return exceeded(env, read_database(env), STREAMS)


def exceeded(env: Environment, readings: Readings, name: str) -> str:
    """The text of a metric that is over its limit, or was not measured; "" where it is well or not watched here."""
    found = readings.get(name, Reading(0.0, ""))
    is_well = found.value is not None and found.value <= ALARMS[name].limit(env.limits)
    return "" if is_well else found.told


def content(env: Environment, evidence: Path) -> str:
    """The data keeps the application's rules (the expectations), where there are any. What cannot be asked is told by
    others."""
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


def expect_rules(drill: Drill) -> None:
    """The expectations hold on what is live after a drill's recovery, where the environment has any."""
    if not drill.env.suites:
        drill.report.fact(FACT, NONE)
        return
    broken = content(drill.env, drill.directory / "evidence")
    drill.report.require(
        "expectations after the recovery",
        not broken,
        "the data breaks the application's rules",
        value=broken or "all hold",
    )


def rules_hold(env: Environment) -> str:
    """For the checklist, behind what else was proven."""
    return ", expectations hold" * bool(env.suites)


SENSORS: Mapping[str, Sensor] = {
    "application": application,
    "database": database,
    "replication": replication,
    "content": content,
}
SLOW = ("content",)
ALARM = Bounds(0, 0)
"""A sensor that tells of something counts as 1."""


@probe
def ask_all(env: Environment, evidence: Path, sensors: Mapping[str, Sensor] = SENSORS) -> dict[str, str]:
    """What every sensor says now, "" where all is well. Whoever tells of something is asked `IN_A_ROW` times."""
    return {name: _told(sensor, env, evidence) for name, sensor in sensors.items()}


def _told(sensor: Sensor, env: Environment, evidence: Path) -> str:
    for _ in range(IN_A_ROW):
        told = sensor(env, evidence)
        if not told:
            break
    return told


def quick(env: Environment) -> dict[str, str]:
    """The sensors that answer at once."""
    return {name: sensor(env, env.reports_directory) for name, sensor in SENSORS.items() if name not in SLOW}


@probe
def watch(env: Environment, evidence: Path, seconds: float, sensors: Mapping[str, Sensor] = SENSORS) -> Symptom:
    """Listen to all of them until one says `IN_A_ROW` times that something is wrong.

    Raises:
        OpsError: none did within `seconds`.
    """
    standings = dict.fromkeys(sensors, Standing())
    pending = dict[str, Future[str]]()
    pool = ThreadPoolExecutor(len(SLOW), thread_name_prefix="sensor")

    def heard() -> Symptom | None:
        for name, sensor in sensors.items():
            told = _answer(pool, pending, name, sensor, env, evidence)
            if told is None:
                continue
            timing = Timing(1 if name in SLOW else IN_A_ROW, seconds=0)
            standings[name], change = step(standings[name], float(bool(told)), told, now(), ALARM, timing)
            if change:
                return Symptom(name, told, now())
        return None

    try:
        return _found(until(heard, what="an alarm", seconds=seconds, every_seconds=EVERY_SECONDS))
    except Unreachable:
        raise OpsError(
            f"no sensor noticed the fault within {seconds:.0f} s",
            "the monitoring is blind for it: add a sensor that sees it",
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
    """A slow sensor answers from beside; None: not yet."""
    if name not in SLOW:
        return sensor(env, evidence)
    if name not in pending:
        pending[name] = pool.submit(sensor, env, evidence)
    return pending.pop(name).result() if pending[name].done() else None


def _found(symptom: Symptom | None) -> Symptom:
    assert symptom, "`until` returns what is true only"
    return symptom
