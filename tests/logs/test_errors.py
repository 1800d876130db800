"""summarise_errors: kinds, hours, what is new since as many hours before."""

from __future__ import annotations

import gzip
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from flows.logs.errors import summarise_errors
from flows.logs.search import search_logs
from runbook.report import Report, Status
from tests.fixtures.logfiles import NAME, NOON, every, line
from tests.fixtures.reports import values

UNTIL = (NOON + timedelta(hours=12)).isoformat()


def rows(report: Report) -> list[tuple[str, ...]]:
    (table,) = [item for item in report.evidence if item.name.startswith("Kinds of errors")]
    return list(table.rows)


def test_messages_that_differ_in_numbers_and_ids_are_one_kind_and_new_ones_are_told(logs: Path) -> None:
    day = timedelta(days=1)
    before = "".join(line(f"Timeout after {n} s", at, "ERROR") for n, at in enumerate(every(60, 10, NOON - day)))
    packed = logs / "app.log.1.gz"
    packed.write_bytes(gzip.compress((line("began", NOON - 3 * day) + before).encode()))
    os.utime(packed, ((NOON - day).timestamp(),) * 2)
    (logs / "app.log").write_text(
        "".join(line(f"Timeout after {n}.{n} s", at, "ERROR") for n, at in enumerate(every(60, 8)))
        + line("Session 6a1f0c1e-8f6b-4a51-9d3e-0123456789ab of 'taro@example.com' is broken\ntrace", NOON, "CRITICAL")
        + line("in an hour that is not asked for", NOON - 2 * day, "ERROR")
        + line("well", NOON)
    )
    report = summarise_errors.fn(NAME, until=UNTIL)
    assert [row[:5] for row in rows(report)] == [
        ("", "8", "10", "ERROR", "Timeout after <n> s"),
        ("new", "1", "0", "CRITICAL", "Session <uuid> of <text> is broken"),
    ]
    assert values(report)["new kinds of errors"] == "Session <uuid> of <text> is broken"
    assert report.status is Status.WARN
    assert "taro@" not in str(report.as_json())
    assert any(item.svg.count('id="bar-') > 1 for item in report.evidence if item.name == "Errors by hour (Asia/Tokyo)")


def test_many_more_than_before_warns_and_as_many_does_not(logs: Path) -> None:
    times = [*every(60, 30, NOON - timedelta(days=1)), *every(60, 30)]
    (logs / "app.log").write_text(
        line("began", NOON - timedelta(days=3)) + "".join(line("x", at, "ERROR") for at in times)
    )
    assert summarise_errors.fn(NAME, until=UNTIL).status is Status.OK
    with (logs / "app.log").open("a") as log:
        log.writelines(line("x", at, "ERROR") for at in every(60, 90))
    report = summarise_errors.fn(NAME, until=UNTIL)
    assert values(report)["errors against the hours before"] == "120 errors, 30 in the hours before"
    assert report.status is Status.WARN


def test_a_log_that_does_not_reach_back_says_that_it_does_not_know_what_is_new(logs: Path) -> None:
    (logs / "app.log").write_text(line("x", NOON, "ERROR"))
    report = summarise_errors.fn(NAME, until=UNTIL)
    assert "new kinds of errors" not in values(report)
    assert "does not reach back" in values(report)["what is new"]


def test_a_day_has_24_hours_where_the_clock_is_put_back(logs: Path) -> None:
    """Europe, 2026-10-25: 03:00 is 02:00 once more. By the clock on the wall 24 hours before noon were 25."""
    toml = logs.parent / "trial.toml"
    toml.write_text(toml.read_text().replace("Asia/Tokyo", "Europe/Berlin"))
    noon = datetime(2026, 10, 25, 11, tzinfo=UTC)
    moments = {"too early": 24.5, "first": 23.5, "twice, first": 10.75, "twice, then": 9.75}
    (logs / "app.log").write_text(
        line("began", noon - timedelta(days=3))
        + "".join(line(name, noon - timedelta(hours=hours), "ERROR") for name, hours in moments.items())
    )
    report = summarise_errors.fn(NAME, until="2026-10-25 12:00")
    assert sorted(row[4] for row in rows(report)) == ["first", "twice, first", "twice, then"]
    (picture,) = [item.svg for item in report.evidence if item.name == "Errors by hour (Europe/Berlin)"]
    assert "10-25 02:00 +02:00" in picture
    assert "10-25 02:00 +01:00" in picture


def test_no_error_is_dropped_for_its_time_or_for_how_its_level_is_written(logs: Path) -> None:
    shapes = {"error": "a", "FATAL": "b", "Error": "c", "ERR": "d", "critical": "e", "info": "no error", "WARN": "no"}
    undated = [json.dumps(json.loads(line("lost", NOON, "error")) | {"timestamp": text}) for text in ("", "yesterday")]
    (logs / "app.log").write_text(
        line("began", NOON - timedelta(days=3))
        + "".join(line(text, NOON, level) for level, text in shapes.items())
        + "".join(f"{text}\n" for text in undated)
        + line("of no interest", NOON).replace(NOON.isoformat(), "never")
    )
    report = summarise_errors.fn(NAME, until=UNTIL)
    assert {(row[3], row[4]) for row in rows(report)} == {
        ("ERROR", "a"),
        ("FATAL", "b"),
        ("ERROR", "c"),
        ("ERR", "d"),
        ("CRITICAL", "e"),
    }
    assert values(report)["lines without a readable time"] == "2"
    found = search_logs.fn(NAME, level=("ERROR",), since=(NOON - timedelta(days=1)).isoformat(), until=UNTIL)
    assert found.outcome == "3 lines found"
    assert values(found)["lines without a readable time"] == "2"
