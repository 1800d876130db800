"""search_audit_log: a user's history, and log-ins that are unlike others."""

from __future__ import annotations

import os
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from flows.logs.audit import search_audit_log
from runbook.errors import RunbookFailed
from runbook.report import Report, Status
from tests.fixtures.logfiles import NAME, NOON, every, line

DAY = timedelta(days=1)


def event(
    at: datetime,
    user: str = "u1",
    action: str = "login",
    result: str = "success",
    address: str = "10.0.0.1",
    resource: str = "",
) -> str:
    return line(
        "Audit Event", at, user_id=user, action=action, result=result, ip_address=address, resource=resource or user
    )


def usual(user: str = "u1", days: int = 12) -> str:
    """Every day at noon (UTC), from one address."""
    return "".join(event(at, user) for at in every(86_400, days, NOON - days * DAY))


def rows(report: Report, name: str) -> list[tuple[str, ...]]:
    (table,) = [item for item in report.evidence if item.name.startswith(name)]
    return list(table.rows)


def test_a_users_history_over_rotated_files(logs: Path) -> None:
    (logs / "audit.log.1").write_text(usual() + event(NOON - DAY, "u2", "create_session", resource="s 5"))
    (logs / "audit.log").write_text(event(NOON, "u1", "create_session", resource="s 6"))
    report = search_audit_log.fn(NAME, user="u1")
    assert report.facts["found"] == "13 events"
    assert [row[:2] for row in rows(report, "By action")] == [("login", "success"), ("create_session", "success")]
    assert search_audit_log.fn(NAME, resource="s 5").facts["found"] == "1 events"
    assert report.facts["searched for"] == "user_id=u1"
    assert report.facts["lines read"] == "14 lines, written 2026-02-03 21:00:00 +09:00 to 2026-02-15 21:00:00 +09:00"
    assert report.facts["time asked for"] == "the first line to now"
    assert "nothing matched" not in report.facts
    nothing = search_audit_log.fn(NAME, action="login", result="failure", since="2026-02-15 03:00")
    assert nothing.facts["found"] == "0 events"
    assert nothing.facts["searched for"] == "action=login, result=failure"
    assert nothing.facts["time asked for"] == "2026-02-15 03:00:00 +09:00 to now"
    assert nothing.facts["lines read"].startswith("14 lines, written "), "of every file, not of that time only"
    assert nothing.facts["nothing matched"].startswith("no proof that nothing happened")
    assert search_audit_log.fn(NAME, since="2026-02-15").facts["found"] == "1 events"
    assert search_audit_log.fn(NAME).status is Status.OK


def test_a_success_behind_many_failures_is_critical_and_fewer_are_not(logs: Path) -> None:
    tries = "".join(event(at, result="failure") for at in every(30, 9))
    (logs / "audit.log").write_text(usual() + tries + event(NOON + timedelta(minutes=5)))
    assert search_audit_log.fn(NAME).status is Status.OK
    (logs / "audit.log").write_text(
        usual() + tries + event(NOON + timedelta(minutes=4.6), result="failure") + event(NOON + timedelta(minutes=5))
    )
    with pytest.raises(RunbookFailed, match="log-ins after a burst of failures: u1 from 10.0.0.1") as failed:
        search_audit_log.fn(NAME, user="somebody else")
    assert rows(failed.value.report, "Failed")[0][:3] == ("address", "10.0.0.1", "10")
    spread = "".join(event(at, result="failure") for at in every(120, 30))
    (logs / "audit.log").write_text(usual() + spread + event(NOON + timedelta(hours=1)))
    assert search_audit_log.fn(NAME).status is Status.OK, "few within ten minutes"


def test_one_address_that_tries_many_users_is_told(logs: Path) -> None:
    tries = "".join(
        event(at, f"u{number}", result="failure", address="203.0.113.9") for number, at in enumerate(every(1, 40))
    )
    (logs / "audit.log").write_text(tries)
    report = search_audit_log.fn(NAME)
    assert report.status is Status.WARN
    assert rows(report, "Failed") == [
        ("address", "203.0.113.9", "40", "2026-02-15 21:00:00", "2026-02-15 21:00:39", "40")
    ]


def test_a_new_address_and_a_night_hour_are_told_only_where_something_is_usual(logs: Path) -> None:
    night = NOON + timedelta(hours=5)  # 02:00 in Tokyo
    odd = event(NOON, address="198.51.100.1") + event(night) + event(night, "newcomer", address="192.0.2.1")
    (logs / "audit.log").write_text(usual() + odd)
    report = search_audit_log.fn(NAME)
    assert [(row[1], row[3]) for row in rows(report, "Unusual")] == [
        ("u1", "from a new address, for the first time in 13 log-ins"),
        ("u1", "at night (Asia/Tokyo), for the first time in 14 log-ins"),
    ]
    assert report.status is Status.WARN
    assert rows(search_audit_log.fn(NAME, since="2026-02-16T12:00"), "Unusual") == [], "in the time that was asked for"
    (logs / "audit.log").write_text(usual("ten", 10) + event(night, "ten") + usual("nine", 9) + event(night, "nine"))
    assert [row[1] for row in rows(search_audit_log.fn(NAME), "Unusual")] == ["ten"], "ten by day show what is usual"


def test_what_is_usual_is_read_from_files_before_the_time_that_was_asked_for(logs: Path) -> None:
    (logs / "audit.log.1").write_text(usual() + "no JSON\n")
    os.utime(logs / "audit.log.1", ((NOON - DAY).timestamp(), (NOON - DAY).timestamp()))
    (logs / "audit.log").write_text(event(NOON, address="198.51.100.1"))
    report = search_audit_log.fn(NAME, since="2026-02-15T20:00")
    assert report.facts["found"] == "1 events"
    assert [row[3] for row in rows(report, "Unusual")] == ["from a new address, for the first time in 13 log-ins"]
    assert "2 files: audit.log.1, audit.log" in report.facts["files read"]
    assert [row[2] for row in rows(report, "Lines that are not JSON")] == ["no JSON"]


def test_an_empty_log_is_not_well(logs: Path) -> None:
    (logs / "audit.log").write_text("")
    report = search_audit_log.fn(NAME)
    assert report.status is Status.WARN
    assert "not measured" in report.sentence()
