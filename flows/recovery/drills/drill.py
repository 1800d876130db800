"""run-drill (§8.4): a real fault, the real runbook, and the loss by a ledger outside of the failed system."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from blocks.environment import Environment
from flows.database import expectations
from flows.recovery.drills import (
    alerting,
    checklist,
    control,
    detection,
    leftovers,
    past_drills,
    record,
    steady,
    summary,
)
from flows.recovery.drills import page as html
from flows.recovery.drills.lines import HOLD_AGAIN, TABLE, DrillLines, cleaning, healing
from flows.recovery.drills.record import UnfinishedDrill
from flows.recovery.drills.scenario import NOBODY, Drill, Refusal, Scenario, Symptom, now
from flows.recovery.drills.scenarios.bad_release import BadRelease
from flows.recovery.drills.scenarios.data_corruption import DataCorruption
from flows.recovery.drills.scenarios.database_failure import DatabaseFailure
from flows.recovery.drills.scenarios.declared import Declared, left_behind, read_declaration
from flows.recovery.drills.scenarios.full_restore import FullRestore
from flows.recovery.drills.scenarios.region_outage import RegionOutage
from flows.recovery.objectives import board
from runbook.change import Carrier, carrying_out
from runbook.current import leaves
from runbook.errors import OpsError, RunbookFailed
from runbook.failpoint import failpoint
from runbook.flow import flow
from runbook.guard.effect import Effect
from runbook.guard.loss import Loss
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from tasks.alerts.incident import Incident
from tasks.application.health import smoke_check, wait_healthy
from tasks.drill.clients import DrillClients, served, writing
from tasks.drill.writer import require_writes
from tasks.faults.disposable import require_disposable, where_disposable

ScenarioName = Literal[
    "database_failure", "region_outage", "data_corruption", "full_restore", "bad_release", "declared", "next"
]
SCENARIOS: dict[str, Scenario] = {
    one.name: one for one in (DatabaseFailure(), RegionOutage(), DataCorruption(), FullRestore(), BadRelease())
}

DETECT_SECONDS, HEALTH_SECONDS, SERVED_SECONDS = 15 * 60.0, 120.0, 120.0
STEADY_WRITES, AFTER_WRITES = 20, 10


@flow(name="run-drill", flow_run_name=RunName("run-drill {environment} {scenario}"))
def run_drill(
    environment: str,
    scenario: ScenarioName = "database_failure",
    declaration: str = "",
    page: bool = False,
    participants: tuple[str, ...] = (),
    plan: str = "",
    confirm: str = "",
) -> Report:
    """災害復旧訓練 (§8.4)

    Runs one of the manual's drills with a real fault. Run it every quarter.

    1. Clients write through the application and to the database.
    2. It breaks the system and waits until the monitoring notices.
    3. It launches the runbook that an on-call engineer would use, and checks the application as a user.
    4. The clients' ledger counts the acknowledged writes that are lost.
    5. The same runbook gets a sabotaged copy. If it accepts that, the drill is CRITICAL.

    The six phases are measured against the manual's minutes, RPO and RTO against the scenario's targets. A drill needs
    a disposable environment: one that is not `disposable` has its drills in its `drill_environment`, whose name is then
    the confirm. `next` chooses the scenario after that of the last drill. `declared` reads a drill from a file
    (`drills` in the TOML): slow or refused connections, a failing AI provider, a full disk, a wrong clock. With `page`
    the on-call person is really paged and must acknowledge (acknowledge-incident) within 15 minutes; otherwise a test
    channel is used.

    It changes what the scenario breaks. At the end the system is healthy again, also if the drill fails. Old data that
    its recoveries kept is deleted if the drill succeeds and a new base backup was taken; otherwise it is listed. If a
    drill is killed, run it again: that run heals the system, and holds no new drill. An empty confirm shows the plan.

    Undo: none; the data is as after a recovery. Evidence: the ledger, the timeline, the checklist of §8.4 with its open
    boxes, and earlier drills; also as an HTML page.

    Args:
        environment: Environment. If it is not disposable, the drill runs in its drill_environment
        scenario: database_failure, region_outage, data_corruption, full_restore (everything lost), bad_release,
            declared (a drill defined in a file) or next (the one after the last drill's)
        declaration: For scenario=declared: name of the drill's definition file, without its extension. Empty for other
            scenarios
        page: Really page the on-call engineer, and measure the response time
        participants: Participants, for the report. May be empty
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the name of the environment where the drill runs to carry it out. Empty: only show the plan
    """
    env = where_disposable(Environment.find(environment))
    work = runbook("DR drill", env, confirm, plan, changes=True, rank="recovery", name="run-drill")
    with board.rebuilt(env), html.written_at_end() as pages, work as report:
        pages.append(report)
        require_disposable(env)
        if env.name != environment:
            report.fact("held in", f"{env.name}, the drill_environment of {environment}")
        report.fact("participants", ", ".join(participants) or NOBODY)
        if left := record.find(env.reports_directory):
            _end_half_done(report, env, left)
            return report
        name = past_drills.next_scenario(report, env, SCENARIOS) if scenario == "next" else scenario
        if name not in SCENARIOS and name != "declared":
            raise OpsError(f"there is no scenario “{name}”", f"choose one of {', '.join(SCENARIOS)}")
        require_writes(env.application)
        expectations.prepare(env)
        chosen = Declared(read_declaration(env, declaration)) if name == "declared" else SCENARIOS[name]
        report.pin_state("scenario", name)
        effect = Effect(
            f"{name}: {env.name} is broken on purpose and recovered",
            "not needed, the drill recovers it",
            (Loss.not_known("the drill's client", "the drill measures it"),),
            float("nan"),
        )
        _hold(report, env, chosen, page, effect)
    return report


def _hold(report: Report, env: Environment, scenario: Scenario, page: bool, effect: Effect) -> None:
    """Play the scenario, run its negative controls, and report."""
    directory = env.reports_directory / "drills" / f"{report.started:%Y%m%dT%H%M%S}"
    report.fact("scenario", f"{scenario.title}: {scenario.situation}")
    report.fact("goal", scenario.goal)
    drill = _drill(report, env, directory, UnfinishedDrill.now(scenario.name, directory), page=page)
    lines = DrillLines.of(drill, scenario)
    with carrying_out(report, *lines.in_order, effect=effect) as carry:
        drill.note(breaks=" | ".join(act.target for act in lines.breaking.acts), **scenario.notes())
        leftovers.note(drill)
        report.fact("ledgers", directory)
        leaves(TABLE, "the next run-drill drops it")
        seconds, controls = dict[str, float](), list[Refusal]()
        with _healed(carry, drill, lines):
            play(carry, drill, scenario, lines)
            with _timed(seconds, "return to the steady state"):
                if lines.settling:
                    carry(lines.settling)
            with _timed(seconds, "negative controls"):
                controls = carry(lines.controlling)
        with _timed(seconds, "report"):
            _end(drill, scenario, controls)
            carry(lines.cleaning)
    summary.report_overhead(report, drill, seconds)
    report.outcome = f"{scenario.title}: the system recovered within its targets"


def _drill(
    report: Report, env: Environment, directory: Path, half_done: UnfinishedDrill, *, page: bool = False
) -> Drill:
    return Drill(env, report, directory, DrillClients.at(directory, f"{directory.name}-"), half_done, page)


def play(carry: Carrier, drill: Drill, scenario: Scenario, lines: DrillLines) -> None:
    """From the clients' first write to their last.

    Raises:
        OpsError: a phase could not be completed.
    """
    env, clients = drill.env, drill.clients
    url, database = scenario.address(env), env.postgres.database
    with writing(clients, env.application, url, lambda: scenario.servers(env), database):
        clients.wait(STEADY_WRITES)
        carry(lines.breaking)
        taken = _detect(drill, scenario)
        with drill.phases.phase(2):
            alerting.declare(drill, taken)
            _scope(drill, scenario)
            scenario.decide(drill)
        failpoint("drill: decided")
        carry(lines.recovering)
        failpoint("drill: restored")
        live = scenario.live(env)
        live.forget_roles()
        _serve(drill, live)
        with drill.phases.phase(5):
            _check(drill, live)
            scenario.verify(drill)
            clients.wait(AFTER_WRITES)
            assert drill.fault
            assert drill.recovered
            drill.served = served(clients, drill.fault.struck, drill.recovered, SERVED_SECONDS)


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


@contextlib.contextmanager
def _healed(carry: Carrier, drill: Drill, lines: DrillLines) -> Iterator[None]:
    """If a step fails, heal the system and leave out the steps that follow; the error is a finding. If the drill is
    cancelled, the carrier heals as far as the grace period allows; the record stays for the next run."""
    try:
        yield
    except OpsError as error:
        reason = error.message
        if isinstance(error, RunbookFailed) and error.report is not drill.report:
            drill.keep(error.report)
            reason = f"{error.report.runbook}: {reason}"
        drill.report.fail("every phase completed", error.hint or "read its runbooks' reports", value=reason)
        if not carry.put_back():
            raise RunbookFailed(drill.report) from error
        carry.instead(lines.cleaning, why="a step of the drill failed, and those after it are left out")


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        seconds[name] = time.monotonic() - started


def _end(drill: Drill, scenario: Scenario, controls: list[Refusal]) -> None:
    """Phase 6: the ledger and the verdict."""
    report, live = drill.report, scenario.live(drill.env)
    live.forget_roles()
    steady.wait_settled(drill, live)
    with drill.phases.phase(6):
        outcome = summary.report_ledger(drill, live)
        if outcome:
            summary.report_verdict(report, drill, scenario, outcome)
            summary.judge_stated_loss(report, drill, live, outcome)
            summary.report_timeline(report, drill)
        control.report_results(report, controls)
        summary.report_problems(report, drill)
        checklist.report_results(report, drill.done)
        past_drills.report_trend(report, drill.env.reports_directory, scenario.name)
    drill.phases.report_results(report)
    summary.report_measured(report, drill, outcome)


def _end_half_done(report: Report, env: Environment, left: UnfinishedDrill) -> None:
    """After a killed drill: heal the system and report its ledger. No new drill is held."""
    scenario = SCENARIOS.get(left.scenario) or left_behind(left)
    if scenario is None:
        raise OpsError(
            f"a drill of {left.scenario} did not end, and this version has no such scenario",
            "heal the system by hand, then delete .drill-half-done in the reports directory",
        )
    report.pin_state("left by", left.scenario)
    drill = _drill(report, env, Path(left.ledgers), left)
    mending = healing(drill, scenario, left)
    clean = cleaning(drill, scenario, "the clients' table", leftovers.report_results)
    effect = Effect(f"what the killed drill of {left.scenario} broke is repaired", "not needed")
    with carrying_out(report, mending, clean, effect=effect) as carry:
        expectations.prepare(env)
        carry(mending)
        live = scenario.live(env)
        live.forget_roles()
        steady.wait_settled(drill, live)
        summary.report_ledger(drill, live)
        summary.report_problems(report, drill)
        carry(clean)
    report.warn("an earlier drill did not end", HOLD_AGAIN, value=left.text)
    report.outcome = "the half-done drill was ended, and the system is healthy"
