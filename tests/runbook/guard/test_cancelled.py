"""A run that is cancelled says by whom, what changed and what is left; after a kill -9 the next run says it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.exceptions import TerminationSignal
from prefect.states import Cancelling

from runbook.current import leaves, removed
from runbook.files import journal
from runbook.guard.permit import Act, Permit
from runbook.kinds import action
from runbook.report import Report, Status
from runbook.run import runbook
from tests.fixtures.killed import exit_code_at
from tests.runbook.processes import Actor
from tests.runbook.system import EFFECT, System

DROP, KEPT = Act("drop", "old"), "database app__new"


@action(staged=True)
def build(permit: Permit) -> None:
    leaves(KEPT, "the next restore drops it")


@action
def swap_in(permit: Permit) -> None:
    removed(KEPT)


@action
def tidy(permit: Permit) -> None:
    """A second step that changes live data."""


def carry_out(system: System, error: BaseException | None = None, after: str = "", title: str = "Restore") -> Report:
    """Its steps; `error` comes after the step `after`, "" before all of them."""
    with runbook(title, system, system.name, changes=True) as report:
        permit = report.permit(DROP, effect=EFFECT)
        for name, step in (("", None), ("build", build), ("swap_in", swap_in), ("tidy", tidy)):
            if step:
                step(permit)
            if error and name == after:
                raise error
    return report


def newest(directory: Path) -> dict[str, Any]:
    return dict(json.loads(max(directory.glob("*.json")).read_text(encoding="utf-8")))


def findings(report: dict[str, Any]) -> dict[str, tuple[str, str, str]]:
    return {one["name"]: (one["status"], one["value"], one["hint"]) for one in report["findings"]}


@pytest.mark.parametrize(
    ("after", "status", "changed", "left"),
    [
        ("", "WARN", journal.UNCHANGED, "nothing"),
        ("build", "WARN", journal.UNCHANGED, KEPT),
        ("swap_in", "CRITICAL", "irreversible steps done: swap in", "nothing"),
        ("tidy", "CRITICAL", "irreversible steps done: swap in, tidy", "nothing"),
    ],
)
def test_a_cancelled_run_says_how_far_it_came(system: System, after: str, status: str, changed: str, left: str) -> None:
    with pytest.raises(TerminationSignal):
        carry_out(system, TerminationSignal(signal.SIGTERM), after)
    content = newest(system.reports_directory)
    found = findings(content)
    assert content["status"] == status
    assert found["cancelled"][1].startswith("ended by SIGTERM")
    assert found["state of the system"][:2] == (status, changed)
    assert found["left behind"][1] == left
    assert ("drops it" in found["left behind"][2]) == (left == KEPT), "and who removes it"
    assert "fix the findings" not in json.dumps(content)
    assert list(journal.find_dead(system.reports_directory, system.name)) == []
    assert "an earlier run died" not in carry_out(system).facts


@pytest.mark.parametrize(
    ("point", "changed"),
    [
        ("after build", f"{journal.UNCHANGED}; left behind: {KEPT} (the next restore drops it)"),
        ("before tidy", "irreversible steps done: swap in; nothing was left behind"),
        ("after tidy", "irreversible steps done: swap in, tidy; nothing was left behind"),
    ],
)
def test_after_a_kill_the_next_runs_say_it_until_one_succeeds(system: System, point: str, changed: str) -> None:
    assert exit_code_at(point, lambda: carry_out(system)) == -signal.SIGKILL
    with runbook("Take backup", system, changes=True) as backup:
        pass
    again = carry_out(system)
    for report in (backup, again):
        assert report.facts["an earlier run died"].startswith("Restore of ")
        assert changed in report.facts["an earlier run died"]
        assert report.status is Status.OK, "a fact: the run itself went well"
    assert "an earlier run died" not in carry_out(system).facts
    assert not list(system.reports_directory.glob(".unfinished-*"))


def test_a_run_that_lives_or_cannot_be_judged_is_not_called_dead(system: System) -> None:
    with runbook("Restore", system, system.name, changes=True) as report:
        report.permit(DROP, effect=EFFECT)
        assert list(journal.find_dead(system.reports_directory, system.name)) == []
        elsewhere = system.reports_directory / journal.NAME.format(system.name, "0" * 12)
        elsewhere.write_text(
            '["run", "Restore", "[\\"0123456789abcdef-1-1-0123456789abcdef\\", \\"\\", \\"2026-1\\"]"]\n'
        )
        assert list(journal.find_dead(system.reports_directory, system.name)) == [], "on another host"
        elsewhere.write_text('["run", "Resto')
        assert list(journal.find_dead(system.reports_directory, system.name)) == [], "torn"


def test_prefect_says_who_cancelled(system: System, actors: list[Actor], tmp_path: Path, prefect_server: str) -> None:
    actors.append(Actor(tmp_path, "holder", "flow", system.name, system.reports_directory, "maintenance"))
    actors[0].says("held")
    (written,) = system.reports_directory.glob(".unfinished-*")
    run = json.loads(json.loads(written.read_text().splitlines()[0])[2])[1]
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(UUID(run), Cancelling(message="山田: the wrong backup"), force=True)
    actors[0].process.terminate()
    assert actors[0].process.wait(120) == -signal.SIGTERM
    found = findings(newest(system.reports_directory))
    assert found["cancelled"][:2] == ("WARN", "cancelled in Prefect: 山田: the wrong backup")
    assert found["state of the system"][1] == journal.UNCHANGED
    assert not written.exists()
