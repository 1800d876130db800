"""weekly_check: what the last reports say, what is on the disk, and what is served."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from flows.database.backup import backup_database, verify_backup
from flows.routine.weekly import weekly_check
from runbook.files import chain
from runbook.page import render
from runbook.report import NOT_CONFIGURED, Finding, Report, Status
from tasks.certificates import schedules
from tests.database.restore.test_restore import flip
from tests.fixtures.application.broken import reported
from tests.fixtures.workday import NAME, Day, app_line, finding, rows
from tests.infrastructure.authority import Authority


def check() -> Report:
    return reported(lambda: weekly_check.fn(NAME))


def file(
    day: Day,
    title: str,
    days: float,
    *,
    bad: str = "",
    good: str = "",
    table: tuple[str, list[tuple[str, ...]]] | None = None,
    **facts: str,
) -> Path:
    """A report of some days ago, as that runbook would have left it."""
    at = datetime.now(UTC) - timedelta(days=days)
    report = Report(title, NAME, started=at, finished=at, facts=dict(facts), outcome="done")
    if bad:
        report.findings.append(Finding(bad, Status.CRITICAL, "it is bad", "", "look"))
    if good:
        report.findings.append(Finding(good, Status.OK, "all pass"))
    if table:
        report.table(table[0], [""] * len(table[1][0] if table[1] else "x"), table[1])
    return chain.append(day.base / "reports", render.key(report), report.as_json())[0]


def vulnerability(severity: str, new: str = "") -> tuple[str, ...]:
    return (severity, "jinja2", "3.0", "CVE-2024-1", "", "3.1", new, "venv", "sandbox")


def test_a_week_in_which_all_was_done_is_well(day: Day, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(schedules, "ROOT", tmp_path / "host")
    authority = Authority()
    (day.base / "root.pem").write_bytes(authority.root.chain)
    authority.issue("app.test").write(day.base / "live" / "app.test")
    day.write(
        f'[certificates]\ndirectory = "{day.base}/live"\nauthorities = "{day.base}/root.pem"\ndomains = ["app.test"]\n'
    )
    day.log(app_line("x"), name="audit.log")
    day.log("2026-01-01 backup\n", name="db_backup.log")
    for name in ("backup_20260101_030000", "dump_20260101_030000"):
        file(day, "Verify backup", 3, backup=f"{name}, snapshot of 2026")
    file(day, "Scan vulnerabilities", 2, table=("Vulnerabilities", [vulnerability("LOW")]))
    file(day, "Check Docker usage", 1)
    report = check()
    assert {one.name for one in report.findings if one.hint} == {"app.test: served"}, "nobody serves it in this test"
    assert len(rows(report, "Logs")) == 3
    assert report.facts["certificates"] == "1 certificates in files, 0 servers"
    assert finding(report, "high and critical vulnerabilities").value == "none of 1"


def test_what_was_never_done_is_not_measured(day: Day) -> None:
    report = check()
    for name, flow in (
        ("restore of a postgres backup", "verify-backup"),
        ("restore of a redis backup", "verify-backup"),
        ("vulnerability scan", "scan-vulnerabilities"),
    ):
        found = finding(report, name)
        assert found.status is Status.WARN
        assert found.value.startswith("not measured")
        assert f"launch {flow}/{NAME}" in found.hint
    assert report.facts[NOT_CONFIGURED] == "certificates, docker", "said once, and no finding"
    assert finding(report, "size of audit.log").value.startswith("not measured: there is no log")


def test_a_backup_that_did_not_restore_is_critical_until_one_does(day: Day) -> None:
    file(day, "Verify backup", 3, backup="backup_20260101_030000, snapshot of 2026")
    assert finding(check(), "restore of a postgres backup").status is Status.OK
    backup_database.fn(NAME)
    (path,) = (day.base / "backups" / "postgresql").glob("backup_*")
    flip(path / "dump" / "toc.dat")
    assert reported(lambda: verify_backup.fn(NAME)).status is Status.CRITICAL
    found = finding(check(), "restore of a postgres backup")
    assert found.status is Status.CRITICAL
    assert "files of backup_" in found.value


def test_a_verification_of_another_kind_or_week_says_nothing_of_this_one(day: Day) -> None:
    file(day, "Verify backup", 9, backup="backup_20260101_030000, snapshot of 2026")
    file(day, "Verify backup", 1, backup="app_20260101_030000, snapshot of 2026")
    report = check()
    found = finding(report, "restore of a postgres backup")
    assert found.status is Status.WARN
    assert "check its schedule" in found.hint
    assert (
        finding(report, "restore of a redis backup").value == "not measured: no backup of this kind was ever verified"
    )
    file(day, "Verify backup", 0.1, bad="no backup there")
    assert "no backup there" in finding(check(), "the last verify-backup").value


def test_a_kind_without_any_backup_is_not_hidden_by_the_kinds_after_it(day: Day) -> None:
    """Every Sunday each kind is verified behind the other: the last run says nothing of those before."""
    file(day, "Verify backup", 7, kind="redis", backup="dump_20260101_030000, snapshot of 2026")
    shutil.rmtree(day.base / "backups", ignore_errors=True)
    assert reported(lambda: verify_backup.fn(NAME, kind="redis")).status is Status.CRITICAL
    file(day, "Verify backup", 0, kind="files", backup="app_20260101_030000, snapshot of 2026")
    assert finding(check(), "restore of a redis backup").status is Status.CRITICAL


def test_backups_of_prefect_itself_are_asked_for_where_there_are_any(day: Day) -> None:
    file(day, "Verify backup", 1, kind="prefect", backup="prefect_20260101_030000, snapshot of 2026")
    name, described = "restore of a prefect backup", day.base / "trial.toml"
    assert name not in {one.name for one in check().findings}
    described.write_text(described.read_text().replace("[backups]\n", f'[backups]\nprefect = "{day.base}/prefect"\n'))
    assert finding(check(), name).status is Status.OK


def test_what_is_of_the_future_is_not_fresh(day: Day) -> None:
    """The clock was set back: what was reported before that is of tomorrow, and stays so for as long."""
    file(day, "Verify backup", -2, backup="backup_20260101_030000, snapshot of 2026")
    file(day, "Scan vulnerabilities", -2, table=("Vulnerabilities", [vulnerability("LOW")]))
    report = check()
    for name in ("restore of a postgres backup", "vulnerability scan"):
        found = finding(report, name)
        assert found.status is Status.WARN
        assert "in the future" in found.value
        assert "correct the clock" in found.hint


def test_high_vulnerabilities_and_scanners_without_an_answer_are_told(day: Day) -> None:
    found = [vulnerability("CRITICAL", "new"), vulnerability("HIGH"), vulnerability("MODERATE")]
    path = file(day, "Scan vulnerabilities", 3, bad="vulnerabilities, high", table=("Vulnerabilities", found))
    report = check()
    loud = finding(report, "high and critical vulnerabilities")
    assert loud.status is Status.CRITICAL
    assert loud.value.startswith("2, 1 of them new: jinja2 CVE-2024-1")
    assert "patch-vulnerability" in loud.hint
    assert str(path) in report.facts["last scan-vulnerabilities"]
    silent = Report("Scan vulnerabilities", NAME)
    silent.warn("Python packages", "install pip-audit", value="not known: pip-audit is not there")
    chain.append(day.base / "reports", "scan-vulnerabilities", silent.as_json())
    report = check()
    assert finding(report, "scan of Python packages").value == "not measured: not known: pip-audit is not there"
    assert finding(report, "high and critical vulnerabilities").value == "not measured: 1 scanners did not answer"


def test_an_engine_that_does_not_answer_is_not_an_empty_one(day: Day) -> None:
    day.write(f'[docker]\nhost = "unix://{day.base}/nothing"\n')
    assert finding(check(), "unused Docker resources").value.startswith("not measured: Docker at unix:")


def test_a_certificate_that_ends_soon_is_critical(day: Day, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(schedules, "ROOT", tmp_path / "host")
    authority = Authority()
    authority.issue("app.test", days=5).write(day.base / "live" / "app.test")
    day.write(f'[certificates]\ndirectory = "{day.base}/live"\ndomains = ["app.test", "gone.test"]\n')
    report = check()
    assert finding(report, "app.test (file): expiry").status is Status.CRITICAL
    assert finding(report, "gone.test (file)").status is Status.CRITICAL
