"""The drill of a full restore: database, Redis and files lost; and dumps that look right and are not."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from flows.database.backup import verify_backup
from flows.recovery.full import build
from runbook.report import Status
from tests.fixtures.reports import rows as table
from tests.fixtures.reports import text_of as finding
from tests.recovery.conftest import System
from tests.recovery.drills.running import critical, environment, hold, process, steady

NAME = "full_restore"
PLACES = ("fault: database dropped", "drill: decided", "drill: restored")


@pytest.fixture(scope="module", autouse=True)
def verified(system: System) -> None:
    steady(system)
    for kind in ("postgres", "redis", "files"):
        verify_backup.fn(system.name, kind=kind)  # type: ignore[arg-type]


def test_all_comes_back_and_every_sabotaged_dump_is_refused(system: System) -> None:
    users = system.sql("SELECT count(*) FROM users")
    dumps = {path.name for path in Path(environment(system).backups.postgres).glob("backup_*")}
    report = hold(system, NAME)
    assert report.status in (Status.OK, Status.WARN), report.sentence()
    assert system.sql("SELECT count(*) FROM users") == users
    assert report.facts["RTO"].endswith("first successful request")
    controls = {row[0]: row[2] for row in table(report, "Negative controls")}
    assert len(controls) == 3
    assert any("every checksum right again" in name for name in controls)
    assert not [name for name, refused in controls.items() if refused.startswith("NO")]
    assert "interview_sessions" in controls["one row changed in the dump, every checksum right again"]
    boxes = {row[2]: row[1] for row in table(report, "Training checklist (§8.4)")}
    assert (
        boxes["Redis data was restored"]
        == boxes["The file system was restored"]
        == boxes["Migrations were applied"]
        == "☑"
    )
    assert {path.name for path in Path(environment(system).backups.postgres).glob("backup_*")} == dumps
    assert system.healthy()


@pytest.mark.soak
def test_a_restore_that_does_not_compare_makes_the_drill_critical_and_the_good_data_comes_back(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "prove", lambda *args, **kwargs: None)
    report = critical(system, NAME)
    assert "one row changed" in finding(report, "negative controls")
    assert system.healthy()
    assert system.sql("SELECT count(*) FROM interview_sessions WHERE position LIKE 'x%'") == [(0,)]


@pytest.mark.soak
@pytest.mark.parametrize("place", PLACES)
def test_killed_anywhere_it_is_healed_by_the_next_launch(system: System, place: str) -> None:
    done = process(system, NAME, OPS_FAILPOINT=place)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    report = hold(system, NAME)
    assert report.status is Status.WARN, report.sentence()
    assert finding(report, "healthy at the end").startswith("OK")
    assert system.healthy()
