"""The expectations of an environment: none, those that apply, those that cannot be judged, and those suggested for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments import suggest_expectations
from deployments.register import describe_expectations
from flows.database import expectations
from flows.database.backup import backup_database, verify_backup
from flows.database.restore import restore_database
from runbook.errors import OpsError, RunbookFailed
from runbook.report import Report, Status
from tasks.gx import process
from tasks.integrity import Expectations
from tests.database.conftest import NAME, Trial, with_expectations
from tests.database.test_foreign import dump, plain
from tests.tasks.test_gx_process import children

__all__ = ["plain"]  # a fixture


def suggest(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["suggest_expectations", NAME, *words])
    return suggest_expectations.main()


def test_without_a_directory_no_process_is_started_and_the_report_says_so_once(trial: Trial) -> None:
    process._process.stop()
    backup_database.fn(NAME)
    report = verify_backup.fn(NAME)
    assert report.status in (Status.OK, Status.WARN)
    assert report.facts[expectations.FACT] == expectations.NONE
    assert not any("expectation" in finding.name for finding in report.findings)
    assert children() == []
    assert describe_expectations(NAME) == [f"{NAME}: {expectations.NONE}"]


def test_suggested_ones_are_written_next_to_the_environment_checked_and_verified(
    trial: Trial, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Suites of another application apply to nothing here; those suggested hold, live and in the backup."""
    with_expectations(trial.reports.parent)
    lines = describe_expectations(NAME)
    assert "  not applicable: users: there is no table public.users" in lines
    assert not any("alembic_version" in line for line in lines)

    directory = trial.reports.parent / "expectations" / NAME
    assert suggest(monkeypatch, "--directory", str(directory)) == 0
    assert "people.json: " in capsys.readouterr().out
    path = trial.reports.parent / "trial.toml"
    path.write_text(path.read_text().partition("[expectations]")[0])
    with_expectations(trial.reports.parent, Path("expectations") / NAME)
    assert suggest(monkeypatch) == 0
    written = capsys.readouterr().out
    assert "as suggested" in written
    assert "name the directory" not in written, "it is named"
    assert suggest(monkeypatch, "--check") == 0

    backup_database.fn(NAME)
    report = verify_backup.fn(NAME)
    rules = next(finding for finding in report.findings if finding.name == "expectations on the scratch database")
    assert rules.status is Status.OK, rules.value
    trial.sql("ALTER TABLE people DISABLE TRIGGER USER; UPDATE people SET born = '1066-10-14' WHERE id = 1")
    assert suggest(monkeypatch, "--check") == 1
    assert "people: times are plausible: born: 1 rows break it" in capsys.readouterr().out


class Broken:
    """A step that could not judge anything."""

    def result(self) -> Expectations:
        raise OpsError("users.json is not a suite of expectations", "correct it")


def test_suites_that_cannot_be_judged_are_critical_and_stop_a_strict_run_only() -> None:
    report = Report("Full restore", NAME)
    assert expectations.tell(report, Broken(), "on the copy") is None
    assert report.status is Status.CRITICAL
    assert "users.json" in report.known_broken
    with pytest.raises(RunbookFailed):
        expectations.tell(report, Broken(), "on the copy", strict=True)


def test_a_dump_that_breaks_a_rule_goes_live_where_there_is_no_database(plain: Trial) -> None:
    with_expectations(plain.reports.parent)
    plain.sql("SET ROLE grc_user; CREATE TABLE users (username text); INSERT INTO users VALUES (NULL)")
    dump(plain, "a.sql")
    oid = plain.oid()
    with pytest.raises(RunbookFailed, match="username values to not be null"):
        restore_database.fn(NAME, backup="a.sql", confirm=NAME)
    assert plain.oid() == oid, "another database is live"
    plain.server.drop_database(plain.database)
    with pytest.raises(RunbookFailed, match="username values to not be null"):
        restore_database.fn(NAME, backup="a.sql", strict=True, confirm=NAME)
    assert plain.oid() is None
    with pytest.raises(RunbookFailed, match="is what it was in a.sql.*username values to not be null"):
        restore_database.fn(NAME, backup="a.sql", confirm=NAME)
    assert plain.sql("SELECT count(*) FROM users") == [(1,)]
