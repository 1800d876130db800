"""Phases 1 to 5 of a drill: the fault, the alarm, the runbook and the checks, while clients write."""

from __future__ import annotations

from datetime import UTC, datetime

from blocks.environment import Environment
from flows.recovery.drills import alerting, detection
from flows.recovery.drills.scenario import Drill, Scenario, Symptom, now
from runbook.failpoint import failpoint
from tasks.alerts.incident import Incident
from tasks.application.health import smoke_check, wait_healthy
from tasks.drill.clients import served, writing

DETECT_SECONDS, HEALTH_SECONDS, SERVED_SECONDS = 15 * 60.0, 120.0, 120.0
STEADY_WRITES, AFTER_WRITES = 20, 10
AGAIN = "run run-drill again: it heals the system after a drill that did not end"


def play(drill: Drill, scenario: Scenario) -> None:
    """From the clients' first write to their last.

    Raises:
        OpsError: a phase could not be completed.
    """
    env, clients = drill.env, drill.clients
    url, database = scenario.address(env), env.postgres.database
    with writing(clients, env.application, url, lambda: scenario.servers(env), database):
        clients.wait(STEADY_WRITES)
        _strike(drill, scenario)
        taken = _detect(drill, scenario)
        with drill.phases.phase(2):
            alerting.declare(drill, taken)
            _scope(drill, scenario)
            scenario.decide(drill)
        failpoint("drill: decided")
        with drill.phases.phase(3):
            run = scenario.restore(drill)
        drill.phases.split(run)
        drill.recovered = now()
        failpoint("drill: restored")
        live = scenario.live(env)
        live.forget_roles()
        _serve(drill, live)
        with drill.phases.phase(5):
            _check(drill, live)
            scenario.verify(drill)
            clients.wait(AFTER_WRITES)
            assert drill.fault
            drill.served = served(clients, drill.fault.struck, drill.recovered, SERVED_SECONDS)


def _strike(drill: Drill, scenario: Scenario) -> None:
    """Record the fault on disk, then make it."""
    drill.note(step="the fault")
    drill.report.state_is("the drill has broken the system", AGAIN)
    failpoint("drill: noted")
    drill.fault = scenario.strike(drill)
    drill.report.fact("fault", drill.fault.what)
    failpoint("drill: struck")


def _detect(drill: Drill, scenario: Scenario) -> Incident | None:
    """Phase 1: until somebody acknowledges the alarm."""
    assert drill.fault
    with drill.phases.phase(1, drill.fault.began):
        sensors = {**detection.SENSORS, **scenario.more_sensors()}
        symptom = detection.watch(drill.env, drill.directory / "evidence", DETECT_SECONDS, sensors)
        took = (symptom.at - drill.fault.began).total_seconds()
        drill.symptoms.append(symptom)
        drill.done["alarm"] = f"{symptom.sensor}: {symptom.text}"
        drill.report.fact("detected by", f"{symptom.sensor} after {took:.1f} s: {symptom.text}")
        return alerting.answer_alarm(drill, symptom)


def _scope(drill: Drill, scenario: Scenario) -> None:
    """Which other sensors report a problem. The sensor for this kind of fault must be among them."""
    sensors = {**detection.SENSORS, **scenario.more_sensors()}
    found = detection.ask_all(drill.env, drill.directory / "evidence", sensors)
    known = {one.sensor for one in drill.symptoms}
    drill.symptoms += [Symptom(name, text, now()) for name, text in found.items() if text and name not in known]
    noticed = [one for one in drill.symptoms if one.sensor in scenario.sensors]
    drill.report.require(
        "noticed by",
        bool(noticed),
        "check that sensor: the monitoring notices a problem, but not this one",
        value=", ".join(one.sensor for one in drill.symptoms),
        expected=" or ".join(scenario.sensors),
    )
    drill.done["scope"] = "; ".join(f"{one.sensor}: {one.text}" for one in drill.symptoms)


def _serve(drill: Drill, live: Environment) -> None:
    """The end of phase 4: the started services are healthy."""
    since = datetime.now(UTC)
    health = wait_healthy(live.application, seconds=HEALTH_SECONDS)
    drill.phases.add(4, since)
    drill.done |= {"services": "started by the runbook", "health": health.answer}


def _check(drill: Drill, live: Environment) -> None:
    """Phase 5 of §8.4, as a user."""
    result = smoke_check(live.application)
    if not result.configured:
        drill.report.fact("phase 5: smoke checks", result.detail)
        return
    drill.report.table("Checks of phase 5", ("check", "works", "seconds", "detail"), result.rows)
    drill.report.require("phase 5: the application works", result.ok, "check the backend's log", value=result.detail)
    drill.done |= {row.check: row.detail for row in result.rows if row.ok}
