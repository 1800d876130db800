"""The last recovery and its measured loss, from the reports: no plan, no drill, no refused run."""

from __future__ import annotations

import ast
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from flows.recovery.objectives import board_page
from runbook.files import chain
from runbook.guard.loss import Loss
from runbook.report import Finding, Report, Status
from tasks.recovery_points.standing import LastRecovery, RecoveryStanding
from tasks.reports.past import RECOVERIES, recoveries
from tests.recovery.objectives.test_board import NOW

FLOWS = Path(__file__).resolve().parents[3] / "flows"
BEGIN = datetime(2026, 11, 1, 3, tzinfo=UTC)
SINCE = BEGIN - timedelta(minutes=7)
NO_REPLACEMENT = {
    *("DR drill", "Contain incident", "Release containment", "Salvage writes", "Rejoin standby", "Reattach Redis"),
    "Restore Prefect",  # the control plane's data
}


def file(directory: Path, hours: float, title: str, *losses: Loss, planned: bool = False, bad: bool = False) -> None:
    """A report of a run that took a minute."""
    at = BEGIN + timedelta(hours=hours)
    report = Report(title, "lab", started=at, finished=at + timedelta(minutes=1), planned=planned)
    report.findings += [Finding("space", Status.CRITICAL)] * bad
    if losses:
        report.loses(*losses)
    chain.append(directory, re.sub(r"\W+", "-", title.lower()), report.as_json())


def test_the_newest_one_that_replaced_data(tmp_path: Path) -> None:
    file(tmp_path, 0, "Full restore", Loss.everything_since("app", SINCE), Loss("Redis"))
    file(tmp_path, 1, "Restore to point", Loss("app", 3))
    file(tmp_path, 2, "Undo restore")
    file(tmp_path, 3, "Full restore", planned=True)
    file(tmp_path, 4, "Full restore", bad=True)
    file(tmp_path, 5, "Rejoin standby", Loss("127.0.0.1:1", 9))
    file(tmp_path, 6, "Restore to point", Loss("app", 99))
    drill = Report("DR drill", "lab", started=BEGIN + timedelta(hours=5.9), finished=BEGIN + timedelta(hours=6.5))
    chain.append(tmp_path, "dr-drill", drill.as_json())
    assert [(one.runbook, one.lost) for one in recoveries(tmp_path, "lab")] == [
        ("Undo restore", "the loss of the data is unknown, because that run measured none"),
        ("Restore to point", "3 commits of app are lost"),
        ("Full restore", "every write of app after 2026-11-01 02:53:00 +00:00 is lost"),
    ]


def test_a_failed_one_that_had_replaced_data_counts(tmp_path: Path) -> None:
    file(tmp_path, 0, "Full restore", Loss.at_most_since("Redis", SINCE), bad=True)
    (one,) = recoveries(tmp_path, "lab")
    assert (one.status, one.lost) == (
        "CRITICAL",
        "at most the writes of Redis after 2026-11-01 02:53:00 +00:00 are lost",
    )


@pytest.mark.parametrize(
    "loss",
    [
        *(Loss("app"), Loss("app", 7, "row"), Loss.everything("app"), Loss.not_known("app", "no WAL")),
        *(Loss.everything_since("app", SINCE, 5), Loss.at_most_since("app", SINCE)),
    ],
)
def test_a_filed_loss_has_the_same_words(loss: Loss) -> None:
    assert Loss.from_json(loss.as_json()) == loss


def test_the_board_shows_it() -> None:
    last = LastRecovery(NOW, "OK", "Full restore", "3 commits of app are lost")
    found = RecoveryStanding("lab", "", "Asia/Tokyo", NOW, 3600.0, 3600.0, (), (), None, None, last)
    shown = "2026-11-29 12:00:00+09:00: Full restore OK; 3 commits of app are lost"
    assert shown in board_page.html([found], NOW)


def test_every_runbook_that_replaces_live_data_is_listed() -> None:
    titles = {
        str(call.args[0].value)
        for path in FLOWS.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "runbook" and call.args
        if any(one.arg == "rank" and getattr(one.value, "value", "") == "recovery" for one in call.keywords)
        if isinstance(call.args[0], ast.Constant)
    }
    assert titles > NO_REPLACEMENT
    assert {re.sub(r"\W+", "-", one.lower()) for one in titles - NO_REPLACEMENT} == set(RECOVERIES)
