"""An incident that gets worse, clocks that are set, processes that stop, files of years: nobody is missed."""

from __future__ import annotations

import fcntl
import signal
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from flows.monitoring.acknowledgement import acknowledge_incident
from flows.monitoring.escalation import escalate
from flows.monitoring.incident import due_next, incidents
from tasks.alerts import incident as kept
from tests.monitoring.duty import NAME, Duty, finding
from tests.monitoring.test_escalation_killed import program

HOUR, DAY = timedelta(hours=1), timedelta(days=1)


def rewrite(duty: Duty, **changed: object) -> None:
    """The only incident, as if this had been so."""
    (found,) = duty.incidents()
    incidents(duty.env)._write(replace(found, **changed))  # type: ignore[arg-type]


def test_what_becomes_severe_pages_again_though_somebody_has_it(duty: Duty) -> None:
    escalate.fn(NAME, what="disk", key="k")
    acknowledge_incident.fn(NAME, by="佐藤")
    rewrite(duty, since=datetime.now(UTC) - HOUR)
    before = len(duty.told)
    escalate.fn(NAME, severity="severe", what="disk", key="k")
    new, old = duty.incidents()
    assert new.waiting
    assert (new.severity, old.resolved_by) == ("severe", f"{new.id}: it has become severe")
    assert duty.told[before:] == ["oncall", "oncall"], "called, and told where it goes on; the others have 15 minutes"
    assert [letter["Subject"] for letter in duty.mail.letters[before:]] == [
        "🛑 [trial] disk",
        f"⚠️ [trial] continued as {new.id}: disk",
    ]
    assert due_next(duty.env, new) == new.since + timedelta(minutes=15)
    escalate.fn(NAME, what="disk", key="k")
    assert duty.told[before + 2 :] == [], "no less severe again"
    assert duty.incidents()[0].severity == "severe"


def test_what_becomes_severe_while_nobody_answers_does_not_begin_to_wait_again(duty: Duty) -> None:
    escalate.fn(NAME, what="disk", key="k")
    rewrite(duty, since=datetime.now(UTC) - HOUR)
    escalate.fn(NAME, severity="severe", what="disk", key="k")
    assert duty.told[1:] == ["oncall", "lead", "manager", "executives", "oncall"]


def test_killed_between_an_old_one_and_its_successor(duty: Duty, monkeypatch: pytest.MonkeyPatch) -> None:
    escalate.fn(NAME, what="disk", key="k")
    acknowledge_incident.fn(NAME, by="佐藤")
    before = len(duty.told)
    killed = program(
        "escalation", "--what", "disk", "--key", "k", "--severity", "severe", failpoint="incident is there"
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    escalate.fn(NAME)
    assert duty.told[before:] == ["oncall"]
    escalate.fn(NAME, what="disk", key="k")
    assert [one.open for one in duty.incidents()] == [True, False], "one key is one incident"


def test_a_clock_that_was_set_back(duty: Duty) -> None:
    """By a month: its levels are due after their minutes, and what happens anew is told."""
    escalate.fn(NAME, what="x", key="k")
    rewrite(duty, since=datetime.now(UTC) + 30 * DAY)
    escalate.fn(NAME)
    due = due_next(duty.env, duty.incidents()[0])
    assert due
    assert due <= datetime.now(UTC) + timedelta(minutes=15)
    acknowledge_incident.fn(NAME, by="佐藤")
    rewrite(duty, acknowledged=datetime.now(UTC) + 30 * DAY)
    before = len(duty.told)
    escalate.fn(NAME, what="x", key="k")
    assert duty.told[before] == "oncall"
    assert duty.incidents()[0].waiting


@pytest.mark.parametrize("held", [".lock", "steps"])
def test_a_process_that_stopped_with_a_lock_keeps_nobody_from_being_told(
    duty: Duty, monkeypatch: pytest.MonkeyPatch, held: str
) -> None:
    escalate.fn(NAME, what="x", key="k")
    duty.describe(minutes=(0, 0, 0))
    (found,) = duty.incidents()
    monkeypatch.setattr(kept, "LOCK_SECONDS", 0.2)
    monkeypatch.setattr(kept, "STEPS_SECONDS", 0.2)
    name = held if held == ".lock" else f".steps-{found.id}.lock"
    with (incidents(duty.env).directory / name).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        escalate.fn(NAME)
    assert duty.told == ["oncall", "lead", "manager"]


def test_what_is_over_for_months_goes_and_its_report_stays(duty: Duty) -> None:
    escalate.fn(NAME, what="old", key="a")
    acknowledge_incident.fn(NAME, by="佐藤", action="resolve")
    rewrite(duty, resolved=datetime.now(UTC) - 89 * DAY)
    escalate.fn(NAME)
    (found,) = duty.incidents()
    rewrite(duty, resolved=datetime.now(UTC) - 91 * DAY)
    escalate.fn(NAME, what="open", key="b")
    rest = [one for one in duty.incidents() if one.key == "b"]
    incidents(duty.env)._write(replace(rest[0], since=datetime.now(UTC) - 1000 * DAY))
    report = escalate.fn(NAME)
    assert [one.key for one in duty.incidents()] == ["b"], "what is open stays, however old"
    assert not list(incidents(duty.env).directory.glob(f"*{found.id}*"))
    assert found.id not in str(report.findings)
    assert f"{found.id} was resolved over 90 days ago" in duty.written()
    assert "old (normal)" in duty.written()
    assert "resolved by 佐藤" in duty.written()
    assert finding(report, "is acknowledged")
