"""A drill's plan without a system: what a failed, a cancelled and a killed drill leave, and what they report."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from prefect.exceptions import TerminationSignal
from pydantic import SecretStr

from blocks.environment import Environment
from blocks.postgres.server import Postgres
from flows.recovery.drills import alerting, drill, leftovers, lines, record, steady, summary
from flows.recovery.drills.lines import ENDED, HEALED
from flows.recovery.drills.scenario import AGAIN, RECOVERED, Drill, Refusal, Scenario, Targets
from runbook.change import State
from runbook.current import current_report
from runbook.errors import OpsError, RunbookFailed
from runbook.guard.effect import Effect
from runbook.guard.permit import Act
from runbook.kinds import Bound, action
from runbook.report import Report
from runbook.run import runbook
from tasks.faults.disposable import BREAK, Fault

NOTHING = SecretStr("")
BROKEN = State("the drill has broken the system", AGAIN)
EFFECT = Effect("a lamp is broken on purpose", "not needed")
Ending = Callable[[], object]
done: list[str] = []
states: list[State | None] = []


@action(of=lambda env: Act(BREAK, f"lamp of {env.name}"))
def smash(env: Environment) -> Fault:
    done.append("smashed")
    return Fault("the lamp is dark", datetime.now(UTC), datetime.now(UTC))


@action(of=lambda env: Act(BREAK, f"lamp of {env.name}"))
def sweep(env: Environment) -> None:
    done.append("swept")


def told() -> State | None:
    report = current_report()
    return State(report.state.value, report.state.hint) if report and report.state else None


class Lamp(Scenario):
    """A lamp. `fails`: step → what happens in it."""

    name, title, situation, goal, checks = "lamp", "Lamp", "it is dark", "a new lamp (RTO: 1 min)", "it is light"
    backups, sensors = (), ()

    def __init__(self, **fails: Ending) -> None:
        self.fails = fails

    def _step(self, name: str) -> None:
        states.append(told())
        done.append(name)
        self.fails.get(name, bool)()

    def targets(self, env: Environment) -> Targets:
        return Targets(60, 0)

    def fault(self, env: Environment) -> Bound[..., Fault]:
        return smash.bind(env)

    def judge(self, report: Report, env: Environment) -> None:
        self._step("judged")

    def decide(self, drill: Drill) -> None:
        raise AssertionError("play is replaced")

    def restore(self, drill: Drill) -> Report:
        self._step("restored")
        return drill.report

    def verify(self, drill: Drill) -> None:
        self._step("verified")

    def settled_by(self, env: Environment) -> tuple[str, ...]:
        return ("tidy-room",)

    def settle(self, drill: Drill) -> None:
        self._step("settled")

    def control(self, drill: Drill) -> list[Refusal]:
        self._step("controlled")
        return []

    def heal(self, drill: Drill) -> None:
        sweep.bind(drill.env)()
        self._step("healed")


@pytest.fixture(autouse=True)
def no_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither clients nor sensors: only the plan is carried out."""
    done.clear()
    states.clear()

    def play(carry: Any, drill: Drill, scenario: Scenario, lines: lines.DrillLines) -> None:
        carry(lines.breaking)
        carry(lines.recovering)
        scenario.verify(drill)

    def judge(report: Report, env: Environment, scenario: Scenario, evidence: Path) -> dict[str, str]:
        scenario.judge(report, env)
        return {}

    monkeypatch.setattr(drill, "play", play)
    monkeypatch.setattr(steady, "judge", judge)
    for module, name in (
        (drill, "_end"),
        (leftovers, "note"),
        (summary, "report_overhead"),
        (alerting, "close"),
        (lines, "drop_table"),
    ):
        monkeypatch.setattr(module, name, lambda *_: None)
    monkeypatch.setattr(leftovers, "clear", lambda _: done.append("cleaned"))


@pytest.fixture
def env(tmp_path: Path) -> Environment:
    found = Environment(
        name="trial", disposable=True, reports=str(tmp_path), rpo_seconds=1, rto_seconds=1, slugs={"postgres": ""}
    )
    return found.with_parts(
        {"postgres": Postgres(host="nowhere", database="grc_db", user="grc", password=NOTHING, admin_password=NOTHING)}
    )


def hold(env: Environment, scenario: Scenario, confirm: str = "trial") -> Report:
    with runbook("DR drill", env, confirm) as report:
        drill._hold(report, env, scenario, False, EFFECT)
    return report


def refuse() -> None:
    raise OpsError("the lamp does not fit", "buy another")


def cancel() -> None:
    raise TerminationSignal(15)


def test_each_line_is_carried_out_and_the_state_is_known_before_each(env: Environment) -> None:
    report = hold(env, Lamp(), confirm="")
    assert [(one.step, one.detail) for one in report.plan_steps] == [
        ("break", "lamp of trial"),
        ("recover", "a new lamp (RTO: 1 min)"),
        ("return to the steady state", "tidy-room"),
        ("sabotage a copy", "the same runbook must refuse it"),
        ("clean up", "the clients' table, and the old data that the recoveries kept"),
    ]
    assert report.acts == (Act(BREAK, "lamp of trial"),)
    assert (done, record.find(env.reports_directory)) == (["judged"], None), "a plan judges, and notes nothing"

    done.clear()
    states.clear()
    report = hold(env, Lamp())
    steps = ["judged", "judged", "smashed", "restored", "verified", "settled", "controlled", "cleaned"]
    assert done == steps, "what the fault needs is judged again just before it"
    controlled = State("the drill gives sabotaged copies to the runbook", AGAIN)
    assert states == [None, None, BROKEN, RECOVERED, RECOVERED, controlled]
    assert report.state
    assert report.state.value == ENDED.what
    assert record.find(env.reports_directory) is None


@pytest.mark.parametrize(
    ("step", "steps"),
    [
        ("restored", ["judged", "judged", "smashed", "restored"]),
        ("verified", ["judged", "judged", "smashed", "restored", "verified"]),
        ("controlled", ["judged", "judged", "smashed", "restored", "verified", "settled", "controlled"]),
    ],
)
def test_a_failed_drill_heals_once_leaves_out_the_rest_and_cleans_up(
    env: Environment, step: str, steps: list[str]
) -> None:
    with pytest.raises(RunbookFailed) as caught:
        hold(env, Lamp(**{step: refuse}))
    assert done == [*steps, "swept", "healed", "cleaned"], "the reverse may complete a half-done fault"
    report = caught.value.report
    (found,) = (one for one in report.findings if one.name == "every phase completed")
    assert (found.value, found.hint) == ("the lamp does not fit", "buy another")
    assert record.find(env.reports_directory) is None


def test_before_the_fault_there_is_nothing_to_heal(env: Environment) -> None:
    """What it needs is no longer so when the clients write."""
    judged = iter([bool, refuse])
    with pytest.raises(RunbookFailed):
        hold(env, Lamp(judged=lambda: next(judged)()))
    assert done == ["judged", "judged", "cleaned"]


def test_a_drill_that_cannot_heal_keeps_its_record_and_the_next_run_heals(
    env: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RunbookFailed) as caught:
        hold(env, Lamp(restored=refuse, healed=refuse))
    found = {one.name: one.value for one in caught.value.report.findings}
    assert found["every phase completed"] == found["not put back: break"] == "the lamp does not fit"
    assert found["state of the system"] == BROKEN.what
    assert "cleaned" not in done
    left = record.find(env.reports_directory)
    assert left
    assert left.broken == ["lamp of trial"]

    for module, name in ((steady, "wait_settled"), (summary, "report_ledger"), (summary, "report_problems")):
        monkeypatch.setattr(module, name, lambda *_: None)
    monkeypatch.setattr(leftovers, "report_results", lambda _: done.append("listed"))
    monkeypatch.setitem(drill.SCENARIOS, "lamp", Sweeping())
    for confirm, steps in (("", []), ("trial", ["swept", "healed", "listed"])):
        done.clear()
        with runbook("DR drill", env, confirm) as report:
            drill._end_half_done(report, env, left)
        assert [one.step for one in report.plan_steps] == ["heal", "clean up"]
        assert done == steps
    assert record.find(env.reports_directory) is None


def test_a_cancelled_drill_is_healed_and_its_record_stays(env: Environment) -> None:
    with pytest.raises(TerminationSignal), runbook("DR drill", env, "trial") as report:
        drill._hold(report, env, Lamp(restored=cancel), False, EFFECT)
    assert done == ["judged", "judged", "smashed", "restored", "swept", "healed"]
    found = {one.name: (one.value, one.hint) for one in report.findings}
    assert found["state of the system"] == (HEALED.what, AGAIN)
    assert found["left behind"] == (lines.TABLE, "the next run-drill drops it")
    assert record.find(env.reports_directory)


class Sweeping(Lamp):
    """A lamp whose half-done fault is completed."""

    def completing(self, env: Environment, broken: Any) -> list[Bound[[], Any]]:
        assert broken == ["lamp of trial"]
        return [sweep.bind(env)]
