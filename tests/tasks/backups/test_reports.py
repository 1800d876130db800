"""Reports of the past: newest first, of one runbook and one environment; what is no report is passed over."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from runbook.files import chain
from runbook.report import Report
from tasks.reports import past

BEGIN = datetime(2026, 3, 1, 3, tzinfo=UTC)


def file_report(directory: Path, title: str, hours: int, *, environment: str = "lab", planned: bool = False) -> None:
    at = BEGIN + timedelta(hours=hours)
    report = Report(title, environment, started=at, finished=at + timedelta(minutes=1), planned=planned)
    report.fact("hours", hours)
    report.table("numbers", ("n",), [(hours,)])
    chain.append(directory, title.lower().replace(" ", "-"), report.as_json())


def hours_of(found: past.FiledReport) -> int:
    assert found.rows("numbers") == [[found.facts["hours"]]]
    return int(found.facts["hours"])


def test_newest_first_of_one_runbook_and_environment(tmp_path: Path) -> None:
    for hours in (1, 3, 2):
        file_report(tmp_path, "Verify backup", hours)
    file_report(tmp_path, "Backup", 4)
    file_report(tmp_path, "Verify backup", 5, environment="staging")
    assert [hours_of(one) for one in past.filed(tmp_path, "lab", "verify-backup")] == [3, 2, 1]
    assert [hours_of(one) for one in past.filed(tmp_path, "lab", "backup")] == [4]
    assert [hours_of(one) for one in past.filed(tmp_path, "lab")] == [4, 3, 2, 1]
    since = BEGIN + timedelta(hours=2)
    assert [hours_of(one) for one in past.filed(tmp_path, "lab", "verify-backup", since=since)] == [3, 2]


def test_the_last_one_that_did_something(tmp_path: Path) -> None:
    file_report(tmp_path, "Run drill", 1)
    file_report(tmp_path, "Run drill", 2, planned=True)
    found, plan = (past.last(tmp_path, "lab", "run-drill", planned=planned) for planned in (False, True))
    assert found
    assert plan
    assert (hours_of(found), hours_of(plan)) == (1, 2)
    assert past.last(tmp_path, "lab", "verify-backup") is None


def test_what_is_no_report_is_passed_over(tmp_path: Path) -> None:
    assert list(past.filed(tmp_path / "absent", "lab")) == []
    file_report(tmp_path, "Run drill", 1)
    whole = '{"environment": "lab", "status": "OK", "started": "2027-01-01", "finished": "2027-01-01", "facts": {}, '
    strange = (
        whole + '"findings": [{}], "evidence": []}',
        whole + '"findings": []}',
        whole + '"findings": [], "evidence": []}',
    )
    for number, text in enumerate(("", "[]", "{}", "nonsense", '{"environment": "lab"}', *strange)):
        (tmp_path / f"20270101T00000{number}Z-host-000009-run-drill.json").write_text(text)
    assert [hours_of(one) for one in past.filed(tmp_path, "lab", "run-drill")] == [1]
