"""Backups that are due by the RPO are taken, on a real server: no earlier, and no backup that fails goes unnoticed."""

from __future__ import annotations

import contextvars
import os
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from flows.database.backup import backup_database
from flows.recovery.objectives.due import take_due_backups
from runbook.errors import RunbookFailed
from runbook.guard.lock import hold
from runbook.report import Status
from tests.database.conftest import NAME, Trial, trial
from tests.database.restore.test_restore import newest_path, reseal
from tests.fixtures.reports import bad

__all__ = ["trial"]


@pytest.fixture(autouse=True)
def no_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs no Prefect server."""
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")


def backups(trial: Trial) -> int:
    return len(list(trial.store.glob("*/manifest.json")))


def test_one_is_taken_when_the_next_run_would_be_too_late(trial: Trial) -> None:
    report = take_due_backups.fn(NAME)
    assert report.outcome == "taken: database"
    assert report.facts["backup due: database"] == f"server lost: everything of {trial.database} is lost"
    assert backups(trial) == 1
    assert take_due_backups.fn(NAME).outcome == "taken: nothing was due"
    assert backups(trial) == 1
    assert take_due_backups.fn(NAME, minutes=60).outcome == "taken: database", "in an hour it will be an hour old"
    assert backups(trial) == 2
    path = Path(os.environ["OPS_ENVIRONMENT_FILE"])
    path.write_text(path.read_text().replace('rpo = "1h"', 'rpo = "24h"'))
    assert "the daily backups meet this RPO" in take_due_backups.fn(NAME, minutes=1440).outcome


@pytest.mark.parametrize(("minutes_old", "took", "due"), [(44.5, 1, True), (43, 1, False), (36, 540, True)])
def test_a_backup_is_there_before_the_rpo_has_passed_not_begun_then(
    trial: Trial, minutes_old: float, took: float, due: bool
) -> None:
    """A schedule's run begins seconds late, and a dump lasts: taken when the hour was over, it held no RPO of an hour."""
    backup_database.fn(NAME)
    taken = datetime.now(UTC) - timedelta(minutes=minutes_old)
    reseal(newest_path(trial), lambda m: m.update(taken=taken.isoformat(), seconds=took))
    assert take_due_backups.fn(NAME).outcome == ("taken: database" if due else "taken: nothing was due")


def test_a_place_of_another_machine_s_counts_and_the_copies_follow(trial: Trial) -> None:
    path = Path(os.environ["OPS_ENVIRONMENT_FILE"])
    copies = trial.store.parent.parent / "copies"
    places = "".join(f'{kind} = "{copies}/{kind}"\n' for kind in ("postgres", "redis", "files", "cluster", "wal"))
    path.write_text(
        path.read_text().replace("[logs]", f"survives = 'server'\n[copies]\nsurvives = 'server'\n{places}[logs]")
    )
    assert take_due_backups.fn(NAME).outcome == "taken: database; copied to the replica store"
    assert len(list((copies / "postgres").glob("*/manifest.json"))) == 1
    assert take_due_backups.fn(NAME).outcome == "taken: nothing was due"
    path.write_text(path.read_text().replace('rpo = "1h"', 'rpo = "24h"'))
    assert take_due_backups.fn(NAME).outcome == "taken: nothing was due"
    shutil.rmtree(copies)
    told = take_due_backups.fn(NAME).outcome
    assert told == "taken: nothing was due; copied to the replica store", "by whom else, where the RPO is a day?"
    assert len(list((copies / "postgres").glob("*/manifest.json"))) == 1


def test_one_that_cannot_be_taken_is_told(trial: Trial) -> None:
    elsewhere = contextvars.copy_context()
    with hold(NAME, trial.reports, "Nightly work", "maintenance"):
        report = elsewhere.run(take_due_backups.fn, NAME)
    assert report.status is Status.WARN, "the next run tries again"
    assert "held by “Nightly work”" in bad(report)["backup of database"]
    shutil.rmtree(trial.store, ignore_errors=True)
    trial.store.parent.mkdir(parents=True, exist_ok=True)
    trial.store.write_text("no directory")
    with pytest.raises(RunbookFailed) as failed:
        take_due_backups.fn(NAME)
    assert "backup of database" in bad(failed.value.report)
    assert backups(trial) == 0
