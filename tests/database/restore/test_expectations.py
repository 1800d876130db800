"""The expectations of an environment: none, those that apply, those that cannot be judged, and those suggested for it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import pytest

from deployments import suggest_expectations
from deployments.register import describe_expectations
from flows.database import expectations
from flows.database.backup import backup_database, verify_backup
from runbook.errors import OpsError, RunbookFailed
from runbook.report import Report, Status
from tasks.gx import process
from tasks.integrity import CheckedFiles, Expectations
from tests.database.conftest import NAME, Trial, with_expectations
from tests.tasks.test_gx_process import children


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


@dataclass(frozen=True)
class Judged:
    """A step that judged the rule `x` of each table so; None: it could not judge anything."""

    tables: dict[str, bool] | None

    def result(self) -> Expectations:
        if self.tables is None:
            raise OpsError("users.json is not a suite of expectations", "correct it")
        return Expectations(tuple(CheckedFiles(table, "x", ok, "") for table, ok in self.tables.items()), (), None)


@pytest.mark.parametrize(
    ("first", "then", "stopped", "said"),
    [
        (None, {}, False, "users.json"),
        ({"a": False}, {"a": False}, False, "a: x"),
        ({"a": True}, {"a": False}, True, "keeps this rule"),
        ({"a": True}, {"a": True, "b": False}, False, "is older than this rule's table"),
        ({"a": False}, {"a": False, "b": True}, False, "the backup already had this data"),
    ],
)
def test_only_a_rule_that_held_before_ends_a_run_that_is_not_strict(
    first: dict[str, bool] | None, then: dict[str, bool], stopped: bool, said: str
) -> None:
    report = Report("Full restore", NAME)
    before = expectations.report_results(report, Judged(first), "on the copy")
    with pytest.raises(RunbookFailed) if stopped else contextlib.nullcontext():
        expectations.report_results(report, Judged(then), "on the migrated copy", before=before)
    critical = [found for found in report.findings if found.status is Status.CRITICAL]
    assert len(critical) == 1, "it is reported once"
    assert said in f"{critical[0].value} {critical[0].hint}"
    assert report.is_stopped == stopped
    with pytest.raises(RunbookFailed):
        expectations.report_results(
            Report("Full restore", NAME), Judged({**then, "c": False}), "on the copy", strict=True
        )
