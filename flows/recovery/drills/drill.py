"""run-drill (§8.4): a real fault, the real runbook, and the loss by a ledger outside of the failed system."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from prefect import flow

from blocks.environment import Environment
from flows.database import expectations
from flows.recovery.drills import alerting, checklist, control, leftovers, record, steady, summary, trend, turns
from flows.recovery.drills import page as html
from flows.recovery.drills.course import AGAIN, play
from flows.recovery.drills.record import HalfDone
from flows.recovery.drills.scenario import NOBODY, Drill, Refusal, Scenario
from flows.recovery.drills.scenarios.bad_release import BadRelease
from flows.recovery.drills.scenarios.data_corruption import DataCorruption
from flows.recovery.drills.scenarios.database_failure import DatabaseFailure
from flows.recovery.drills.scenarios.declared import Declared, left_behind, read_declaration
from flows.recovery.drills.scenarios.full_restore import FullRestore
from flows.recovery.drills.scenarios.region_outage import RegionOutage
from flows.recovery.objectives import board
from runbook.errors import OpsError, RunbookFailed
from runbook.guard.permit import Act, Permit
from runbook.report import Report
from runbook.run import runbook
from tasks.drill.clients import Clients
from tasks.drill.direct import drop_table
from tasks.drill.writer import require_writes
from tasks.faults.disposable import BREAK, require_disposable, where_disposable

ScenarioName = Literal[
    "database_failure", "region_outage", "data_corruption", "full_restore", "bad_release", "declared", "next"
]
SCENARIOS: dict[str, Scenario] = {
    one.name: one for one in (DatabaseFailure(), RegionOutage(), DataCorruption(), FullRestore(), BadRelease())
}


@flow(name="run-drill", flow_run_name="run-drill {environment} {scenario}")
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
    (`drills` in the TOML): slow or refused connections, a failing AI provider, a full disk, a service with a wrong clock.
    With `page` the on-call person is really paged and must acknowledge (acknowledge-incident) within 15 minutes; otherwise
    a test channel is used.

    It changes what the scenario breaks. At the end the system is healthy again, also if the drill fails. Old data that
    its recoveries kept is deleted if the drill succeeds and a new base backup was taken; otherwise it is listed. If a
    drill is killed, run it again: that run heals the system, and holds no new drill. An empty confirm shows the plan.

    Undo: none; the data is as after a recovery. Evidence: the ledger, the timeline, the checklist of §8.4 with its open
    boxes, and earlier drills; also as an HTML page.

    Args:
        environment: 対象の環境。disposable でない環境では、その drill_environment で実施する
        scenario: database_failure DB障害、region_outage リージョン障害、data_corruption データ破損、
            full_restore 全喪失、bad_release 不良リリース、declared ファイルで定義した訓練、next 前回の次のシナリオ
        declaration: scenario=declared のとき、訓練の定義ファイル名 (拡張子なし)。他のシナリオでは空
        page: オンコール担当者を実際に呼び出し、応答時間を測る
        participants: 参加者 (レポートに記載)。空でもよい
        plan: 計画の指紋。計画レポートのリンクが入力する。空なら計画と照合せずに実行
        confirm: 実行するには訓練を行う環境の名前を入力。空なら計画のみ表示
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
            report.pin_state("left by", left.scenario)
            permit = report.permit(*_plan_healing(report, left))
            _end_half_done(report, permit, env, left)
            return report
        name = turns.choose(report, env, SCENARIOS) if scenario == "next" else scenario
        if name not in SCENARIOS and name != "declared":
            raise OpsError(f"there is no scenario “{name}”", f"choose one of {', '.join(SCENARIOS)}")
        require_writes(env.application)
        expectations.prepare(env)
        chosen = Declared(read_declaration(env, declaration)) if name == "declared" else SCENARIOS[name]
        directory = env.reports_directory / "drills" / f"{report.started:%Y%m%dT%H%M%S}"
        checked = _judge(report, env, chosen, directory)
        report.pin_state("scenario", name)
        permit = report.permit(*chosen.acts(env))
        _hold(report, permit, env, chosen, directory, checked, page)
    return report


def _judge(report: Report, env: Environment, scenario: Scenario, directory: Path) -> dict[str, str]:
    """The steady state, and the plan; returns the boxes of the checklist that are done."""
    report.fact("scenario", f"{scenario.title}: {scenario.situation}")
    report.fact("goal", scenario.goal)
    checked = steady.judge(report, env, scenario, directory / "evidence")
    for act in scenario.acts(env):
        report.plan("break", act.target)
    report.plan("recover", scenario.goal)
    report.plan("sabotage a copy", "the same runbook must refuse it")
    return checked


def _hold(
    report: Report,
    permit: Permit,
    env: Environment,
    scenario: Scenario,
    directory: Path,
    checked: dict[str, str],
    page: bool,
) -> None:
    """Play the scenario, run its negative controls, and report."""
    targets = " | ".join(act.target for act in permit.acts)
    half_done = HalfDone.now(scenario.name, directory).noted(env.reports_directory, breaks=targets, **scenario.notes())
    clients = Clients.at(directory, f"{directory.name}-")
    drill = Drill(env, report, permit, directory, clients, half_done, page, done=checked)
    leftovers.note(drill)
    report.fact("ledgers", directory)
    seconds, controls = dict[str, float](), list[Refusal]()
    with _healed(drill, scenario):
        play(drill, scenario)
        with _timed(seconds, "return to the steady state"):
            scenario.settle(drill)
        with _timed(seconds, "negative controls"):
            controls = scenario.control(drill)
    with _timed(seconds, "report"):
        _end(drill, scenario, controls)
    summary.report_overhead(report, drill, seconds)
    report.outcome = f"{scenario.title}: the system recovered within its targets"


@contextlib.contextmanager
def _healed(drill: Drill, scenario: Scenario) -> Iterator[None]:
    """If a step fails, heal the system; the error is a finding."""
    try:
        yield
    except OpsError as error:
        if isinstance(error, RunbookFailed) and error.report is not drill.report:
            drill.keep(error.report)
        drill.report.fail("every phase completed", error.hint or "read its runbooks' reports", value=error.message)
        scenario.heal(drill)
    except BaseException:  # cancelled: heal as far as the grace period allows; the record stays for the next run
        with contextlib.suppress(OpsError):
            scenario.heal(drill)
        raise


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        seconds[name] = time.monotonic() - started


def _end(drill: Drill, scenario: Scenario, controls: list[Refusal]) -> None:
    """Phase 6: the ledger, the verdict, and cleaning up."""
    report, live = drill.report, scenario.live(drill.env)
    live.forget_roles()
    steady.wait_settled(drill, live)
    with drill.phases.phase(6):
        outcome = summary.report_ledger(drill, live)
        if outcome:
            summary.report_verdict(report, drill, scenario, outcome)
            summary.report_timeline(report, drill)
        control.report_results(report, controls)
        summary.report_problems(report, drill)
        checklist.report_results(report, drill.done)
        trend.report_results(report, drill.env.reports_directory, scenario.name)
    drill.phases.report_results(report)
    summary.report_measured(report, drill, outcome)
    drop_table(live.postgres, live.postgres.database)
    alerting.close(drill)
    leftovers.clear(drill)
    record.forget(drill.env.reports_directory)


def _plan_healing(report: Report, left: HalfDone) -> list[Act]:
    """Returns the acts that the killed drill was permitted."""
    report.plan("heal", left.text)
    return [Act(BREAK, target) for target in left.notes["breaks"].split(" | ")]


def _end_half_done(report: Report, permit: Permit, env: Environment, left: HalfDone) -> None:
    """After a killed drill: heal the system and report its ledger. No new drill is held."""
    scenario = SCENARIOS.get(left.scenario) or left_behind(left)
    if scenario is None:
        raise OpsError(
            f"a drill of {left.scenario} did not end, and this version has no such scenario",
            "heal the system by hand, then delete .drill-half-done in the reports directory",
        )
    report.state_is(f"a half-done drill is being healed: {left.text}", AGAIN)
    expectations.prepare(env)
    _heal(report, env, scenario, permit, left)
    report.warn("an earlier drill did not end", "run run-drill again to hold a new one", value=left.text)
    report.outcome = "the half-done drill was ended, and the system is healthy"


def _heal(report: Report, env: Environment, scenario: Scenario, permit: Permit, left: HalfDone) -> None:
    directory = Path(left.ledgers)
    drill = Drill(env, report, permit, directory, Clients.at(directory, f"{directory.name}-"), left)
    scenario.heal(drill)
    live = scenario.live(env)
    live.forget_roles()
    steady.wait_settled(drill, live)
    summary.report_ledger(drill, live)
    summary.report_problems(report, drill)
    drop_table(live.postgres, live.postgres.database)
    alerting.close(drill)
    leftovers.report_results(drill)
    record.forget(env.reports_directory)
