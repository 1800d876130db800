"""One object for each change: what was planned is carried out, each once and in order, and nothing else."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from runbook.change import BegunLine, Change, Check, Line, Miscarried, State, carrying_out
from runbook.current import use_report
from runbook.errors import NotConfirmed, OpsError, RunbookFailed
from runbook.guard.effect import Effect
from runbook.guard.permit import Act, PlannedStep, PlanOnly
from runbook.kinds import action
from runbook.report import Report
from runbook.submitted import require_wanted
from runbook.wait import until

EFFECT = Effect("the house is moved", "move it back")
done: list[str] = []


@action(of=lambda house: Act("move", house))
def move(house: str, to: str) -> str:
    done.append(f"{house} → {to}")
    return to


@action(of=lambda house: Act("stop", house))
def stop(house: str) -> None:
    done.append(f"{house} stopped")


@action(of=lambda house: Act("burn", house))
def burn(house: str) -> None:
    raise OpsError(f"{house} does not burn", "dry it")


STOPPING = Change(stop.bind("a"), "stop", "a")
MOVING = Change(move.bind("a"), "move", "a to the hill", seconds=2)
LOOKING = Check(lambda: "seen", "look", "at a")


@pytest.fixture(autouse=True)
def _nothing_done() -> None:
    done.clear()


@contextlib.contextmanager
def running(confirm: str = "lab") -> Iterator[Report]:
    report = Report("Move", "lab", confirm)
    with use_report(report):
        yield report


def carry_out(report: Report, lines: Sequence[Line[..., Any]], *begun: Line[..., Any]) -> None:
    """Carry out some of the planned lines; the house goes to the hill."""
    with carrying_out(report, *lines, effect=EFFECT) as carry:
        for line in begun:
            carry(line, *(["the hill"] if line.step == "move" else []))


def test_without_a_confirm_there_is_a_plan() -> None:
    with running("") as report, pytest.raises(PlanOnly), carrying_out(report, STOPPING, MOVING, effect=EFFECT):
        raise AssertionError("the block is not entered")
    assert [(one.step, one.detail, one.seconds) for one in report.plan_steps] == [
        ("stop", "a", 0.0),
        ("move", "a to the hill", 2),
    ]
    assert report.acts == (Act("stop", "a"), Act("move", "a"))
    assert report.effect == EFFECT
    assert not done


def test_what_was_planned_is_carried_out_and_logged_in_order(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="ops")
    with running() as report, carrying_out(report, STOPPING, LOOKING, MOVING, effect=EFFECT) as carry:
        carry(STOPPING)
        assert carry(LOOKING) == "seen"
        assert carry(MOVING, "the hill") == "the hill"
    assert done == ["a stopped", "a → the hill"]
    begun = [line for line in caplog.messages if line.startswith("Step ") and "done in" not in line]
    assert begun == ["Step 1/3: stop: a", "Step 2/3: look: at a", "Step 3/3: move: a to the hill, about 2 s"]
    assert report.permitted_steps == ["stop", "move"]


@pytest.mark.parametrize(
    ("order", "told"),
    [
        ([MOVING], "“move” comes before stop"),
        ([STOPPING, STOPPING], "“stop” is carried out twice"),
        ([STOPPING], "planned and not carried out: move"),
        ([replace(STOPPING)], "“stop” is not planned"),
    ],
    ids=["out of order", "twice", "forgotten", "unplanned"],
)
def test_anything_else_is_an_error(order: list[Line[..., Any]], told: str) -> None:
    with running() as report, pytest.raises(Miscarried, match=told):
        carry_out(report, [STOPPING, MOVING], *order)


def test_only_what_is_optional_is_skipped_and_why_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="ops")
    optional = replace(STOPPING, is_optional=True)
    with running() as report, carrying_out(report, optional, MOVING, effect=EFFECT) as carry:
        carry.skip(optional, "it is stopped")
        with pytest.raises(Miscarried, match="“move” is not optional"):
            carry.skip(MOVING, "nobody asked")
        carry(MOVING, "the hill")
    assert "Step 1/2: stop: skipped: it is stopped" in caplog.messages


def test_what_is_optional_is_carried_out_or_skipped_but_not_forgotten() -> None:
    optional = replace(STOPPING, is_optional=True)
    with running() as report, pytest.raises(Miscarried, match="“move” comes before stop"):
        carry_out(report, [optional, MOVING], MOVING)
    with running() as report, pytest.raises(Miscarried, match="planned and not carried out: stop"):
        carry_out(report, [MOVING, optional], MOVING)


def test_an_action_is_carried_out_by_a_change_that_states_it_alone() -> None:
    """Nobody calls it directly, and no other change does it as well."""
    with pytest.raises(NotConfirmed, match="“move” is not carried out by a plan"):
        move.bind("a")("the hill")
    smuggling = Change(lambda: move.bind("b")("the hill"), "smuggle", "b", by=[stop.bind("b")])
    with running() as report, pytest.raises(NotConfirmed, match="“move b” is not in this run's permit"):
        carry_out(report, [smuggling], smuggling)
    assert not done


def test_a_function_of_several_actions_is_one_line() -> None:
    stopping, moving = stop.bind("a"), move.bind("a")

    def both(to: str) -> str:
        stopping()
        return moving(to)

    change = Change(both, "move", "a, stopped", by=[stopping, moving])
    with running() as report, carrying_out(report, change, effect=EFFECT) as carry:
        assert carry(change, "the hill") == "the hill"
    assert report.acts == (Act("stop", "a"), Act("move", "a"))


def test_several_lines_are_carried_out_by_one_call(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="ops")
    stopping = replace(STOPPING, more=[PlannedStep("stop", "b"), PlannedStep("stop", "c")])
    with running() as report:
        carry_out(report, [stopping, MOVING], stopping, MOVING)
    begun = [line for line in caplog.messages if line.startswith("Step ") and "done in" not in line]
    assert begun == [
        "Step 1/4: stop: a",
        "Step 2/4: stop: b",
        "Step 3/4: stop: c",
        "Step 4/4: move: a to the hill, about 2 s",
    ]
    assert len([line for line in caplog.messages if "done in" in line]) == 4


def test_what_a_change_needs_is_judged_for_the_plan_and_again_just_before_it() -> None:
    asked = list[bool]()

    def is_empty(report: Report) -> None:
        report.require("the house is empty", not done, "empty it", value="people" if done else "nobody")
        asked.append(bool(done))

    moving = replace(MOVING, needs=[is_empty])
    with running() as report, pytest.raises(RunbookFailed, match="the house is empty: people"):
        carry_out(report, [STOPPING, moving], STOPPING, moving)
    assert asked == [False, True]
    assert done == ["a stopped"]


def test_what_is_found_again_takes_the_place_of_what_the_plan_found() -> None:
    rooms = iter([3, 2])
    moving = replace(MOVING, needs=[lambda report: report.require("rooms", True, "build", value=str(next(rooms)))])
    with running() as report:
        carry_out(report, [STOPPING, moving], STOPPING, moving)
    assert [(one.name, one.value) for one in report.findings] == [("rooms", "2")]


def test_what_several_changes_need_is_judged_once_for_the_plan() -> None:
    asked = list[Report]()
    stopping, moving = (replace(one, needs=[asked.append]) for one in (STOPPING, MOVING))
    with running("") as report, pytest.raises(PlanOnly), carrying_out(report, stopping, moving, effect=EFFECT):
        raise AssertionError("the block is not entered")
    assert asked == [report]


def test_what_else_was_found_does_not_keep_a_change_from_being_carried_out() -> None:
    """A procedure says itself where it ends: what it broke must be repaired, whatever else is wrong."""
    with running() as report, carrying_out(report, STOPPING, MOVING, effect=EFFECT) as carry:
        carry(STOPPING)
        report.fail("the cellar", "pump it out", value="is full of water")
        carry(MOVING, "the hill")
    assert done == ["a stopped", "a → the hill"]


def test_the_state_is_told_by_what_was_begun_and_done() -> None:
    moving = replace(
        MOVING,
        begun=State("a may be anywhere", "find it"),
        done=lambda to: State(f"a is on {to}", "do not move it again"),
    )
    with running() as report, carrying_out(report, moving, effect=EFFECT) as carry:
        carry(moving, "the hill")
        assert report.state
        assert (report.state.value, report.state.hint) == ("a is on the hill", "do not move it again")
    burning = Change(
        burn.bind("a"),
        "burn",
        "a",
        begun=State("a may burn", "look"),
        failed=lambda error: State(f"a does not burn: {error.hint}", "try again"),
    )
    with running() as report, pytest.raises(OpsError), carrying_out(report, burning, effect=EFFECT) as carry:
        carry(burning)
    assert report.state
    assert report.state.value == "a does not burn: dry it"


@pytest.mark.parametrize(("is_final", "again"), [(False, ["a started again"]), (True, [])])
def test_what_a_failed_run_stopped_is_put_back_until_the_new_state_is_final(is_final: bool, again: list[str]) -> None:
    stopping = replace(STOPPING, reverse=lambda: done.append("a started again"))
    moving = replace(MOVING, is_final=is_final)
    burning = Change(burn.bind("a"), "burn", "a")
    with running() as report, pytest.raises(OpsError):
        carry_out(report, [stopping, moving, burning], stopping, moving, burning)
    assert done == ["a stopped", "a → the hill", *again]


def test_a_reverse_has_the_permit_of_its_change() -> None:
    """And no other: it puts back what that change may do."""
    again, other = stop.bind("a"), stop.bind("b")
    stopping, burning = replace(STOPPING, reverse=again), Change(burn.bind("a"), "burn", "a")
    stopping_b = replace(STOPPING, step="stop again", reverse=other)
    with running() as report, pytest.raises(OpsError, match="does not burn"):
        carry_out(report, [stopping, stopping_b, burning], stopping, stopping_b, burning)
    assert done == ["a stopped", "a stopped", "a stopped"]
    (found,) = report.findings
    assert found.name == "not put back: stop again"
    assert "“stop b” is not in this run's permit" in found.value


def test_what_was_skipped_or_refused_is_not_put_back() -> None:
    again = list[str]()
    skipped = replace(STOPPING, is_optional=True, reverse=lambda: again.append("skipped"))

    def is_dry(report: Report) -> None:
        report.require("the road", not report.permitted, "wait", value="is under water")

    refused = replace(MOVING, needs=[is_dry], reverse=lambda: again.append("refused"))

    def leave(report: Report) -> None:
        with carrying_out(report, skipped, refused, effect=EFFECT) as carry:
            carry.skip(skipped, "it is stopped")
            carry(refused, "the hill")

    with running() as report, pytest.raises(RunbookFailed, match="the road"):
        leave(report)
    assert not again


def test_what_cannot_be_put_back_is_reported_and_hides_nothing() -> None:
    def fail() -> None:
        raise OpsError("a does not start", "look into its log")

    stopping, burning = replace(STOPPING, reverse=fail), Change(burn.bind("a"), "burn", "a")
    with running() as report, pytest.raises(OpsError, match="a does not burn"):
        carry_out(report, [stopping, burning], stopping, burning)
    (found,) = report.findings
    assert (found.name, found.value, found.hint) == ("not put back: stop", "a does not start", "look into its log")


def test_what_is_put_back_may_do_what_its_change_may_and_nothing_else() -> None:
    def reverse(house: str) -> Callable[[], str]:
        return lambda: move.bind(house)("the valley")

    moving = replace(MOVING, reverse=reverse("a"))
    smuggling = replace(STOPPING, reverse=reverse("b"))
    burning = Change(burn.bind("a"), "burn", "a")
    with running() as report, pytest.raises(OpsError, match="a does not burn"):
        carry_out(report, [smuggling, moving, burning], smuggling, moving, burning)
    assert done == ["a stopped", "a → the hill", "a → the valley"]
    (found,) = report.findings
    assert (found.name, found.value) == ("not put back: stop", "“move b” is not in this run's permit")


def test_a_procedure_that_goes_on_puts_back_once() -> None:
    stopping = replace(STOPPING, reverse=lambda: done.append("a started again"))
    tidying, burning = Change(lambda: done.append("tidied"), "tidy", "a"), Change(burn.bind("a"), "burn", "a")

    def go_on(report: Report) -> None:
        with carrying_out(report, stopping, MOVING, tidying, burning, effect=EFFECT) as carry:
            carry(stopping)
            assert carry.put_back()
            carry.instead(tidying, burning, why="nobody moves")
            carry(tidying)
            carry(burning)

    with running() as report, pytest.raises(OpsError, match="a does not burn"):
        go_on(report)
    assert done == ["a stopped", "a started again", "tidied"]


def test_pins_are_noted_with_the_plan() -> None:
    moving = replace(MOVING, pins=[lambda report: report.pin_state("house", "a")])
    with running("") as report, pytest.raises(PlanOnly), carrying_out(report, moving, effect=EFFECT):
        pass
    assert report.states["house"].value == "a"


def test_other_lines_take_the_place_of_those_that_are_left(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="ops")
    other = Change(move.bind("b"), "move", "b to the valley")
    with (
        running() as report,
        carrying_out(report, STOPPING, MOVING, effect=EFFECT, may_follow=other.acts) as carry,
    ):
        carry(STOPPING)
        carry.instead(LOOKING, other, why="a does not move")
        carry(LOOKING)
        carry(other, "the valley")
    assert done == ["a stopped", "b → the valley"]
    assert [one.detail for one in report.plan_steps] == ["a", "at a", "b to the valley"]
    assert report.facts["plan changed"] == "a does not move"
    assert "Step 3/3: move: b to the valley" in caplog.text


def test_what_the_plan_did_not_permit_takes_no_place() -> None:
    other = Change(move.bind("b"), "move", "b to the valley")
    with running() as report, carrying_out(report, STOPPING, effect=EFFECT) as carry:
        carry(STOPPING)
        with pytest.raises(NotConfirmed, match="“move b” is no part of the plan"):
            carry.instead(other, why="a does not move")


@action(of=lambda house: Act("build", house), staged=True)
def build(house: str, go_on: threading.Event) -> str:
    while not go_on.wait(0.01):
        require_wanted()
    done.append(f"{house} built")
    return house


BUILDING = Change(build.bind("c"), "build", "c", done=State("c stands", "move in"))


def test_a_line_is_carried_out_beside_others(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="ops")
    go_on = threading.Event()
    with running() as report, carrying_out(report, BUILDING, STOPPING, effect=EFFECT) as carry:
        building = carry.begin(BUILDING, go_on)
        carry(STOPPING)
        assert report.state is None
        go_on.set()
        assert building.result() == "c"
    assert done == ["a stopped", "c built"]
    assert report.state
    assert report.state.value == "c stands"
    assert [line for line in caplog.messages if line.startswith("Step 1/2: build: done")]


def test_an_attempt_that_failed_ends_before_other_lines_take_its_place() -> None:
    """What it stopped runs again, once, and nothing that it began is still at work."""
    go_on = threading.Event()

    def start() -> None:
        done.append("a started again")
        go_on.set()

    stopping = replace(STOPPING, reverse=start)
    with running() as report, carrying_out(report, BUILDING, stopping, effect=EFFECT) as carry:
        carry.begin(BUILDING, go_on)
        carry(stopping)
        carry.abandon()
        assert done == ["a stopped", "a started again", "c built"]
        carry.instead(LOOKING, why="c does not stand")
        carry(LOOKING)


def test_nobody_forgets_a_line_that_runs() -> None:
    with running() as report, pytest.raises(Miscarried, match="nobody waited for build"):
        begin_building(report)


def begin_building(report: Report) -> None:
    go_on = threading.Event()
    go_on.set()
    with carrying_out(report, BUILDING, effect=EFFECT) as carry:
        carry.begin(BUILDING, go_on)


def test_a_step_beside_a_failed_run_ends_before_the_run_does() -> None:
    """What it writes is removed next."""
    stopped: list[str] = []
    stopping = replace(STOPPING, reverse=lambda: stopped.append("started again"))
    burning = Change(burn.bind("a"), "burn", "a")
    pending: list[BegunLine[str]] = []

    def carry_out_all(report: Report) -> None:
        with carrying_out(report, BUILDING, stopping, burning, effect=EFFECT) as carry:
            pending.append(carry.begin(BUILDING, threading.Event()))
            carry(stopping)
            until(lambda: report.submitted[0].is_running, what="the building begins", seconds=5)
            carry(burning)

    with running() as report, pytest.raises(OpsError, match="does not burn"):
        carry_out_all(report)
    assert not report.submitted[0].is_running
    assert stopped == ["started again"]
    with pytest.raises(OpsError, match="the run that began this step ended"):
        pending[0].pending.result()
    assert "c built" not in done
