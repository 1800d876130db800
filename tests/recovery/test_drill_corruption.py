"""The drill of corrupted data: a bug rewrites every interview, and the cluster goes back to the transaction before."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from flows.recovery import point_target
from flows.recovery.drill import SCENARIOS
from flows.recovery.drills import control
from flows.recovery.drills.data_corruption import DataCorruption
from runbook.report import Status
from tests.recovery.conftest import System
from tests.recovery.drills import base_backup, critical, environment, finding, hold, process, table

NAME = "data_corruption"
PLACES = ("fault: transaction noted", "drill: decided", "drill: restored", "rejoin: copied")
CORRUPT = "SELECT count(*) FROM interview_sessions WHERE position = ''"


@pytest.fixture(scope="module", autouse=True)
def verified(system: System) -> None:
    base_backup(system)


def archived(system: System) -> dict[str, int]:
    """What the archive holds."""
    return {str(path): path.stat().st_size for path in Path(environment(system).backups.wal).rglob("*.gz")}


def test_what_was_before_the_bug_is_back_and_every_sabotaged_archive_is_refused(system: System) -> None:
    before = archived(system)
    report = hold(system, NAME)
    assert report.status in (Status.OK, Status.WARN), report.sentence()
    assert report.facts["detected by"].startswith("content after")
    assert "wrote" in report.facts["diagnosis"]
    assert finding(report, "the diagnosis is right").startswith("OK")
    assert finding(report, "破損前の状態に復旧").startswith("OK")
    assert report.facts["RPO"].startswith("0 acknowledged writes")
    controls = table(report, "Negative controls")
    assert [row[1] for row in controls] == ["restore-to-point"] * 3
    assert "missing" in controls[0][0]
    assert "SHA-256 right again" in controls[2][0]
    assert not [row for row in controls if row[2].startswith("NO")]
    assert system.sql(CORRUPT) == [(0,)]
    assert system.healthy()
    after = archived(system)
    assert {path: after.get(path) for path in before} == before, "only copies were spoiled"
    assert [row[5] for row in table(report, "Phases (§8.4)")] == ["yes"] * 6


def test_a_runbook_that_would_take_a_spoiled_archive_makes_the_drill_critical(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of a runbook that plans whatever it finds; the system is healthy all the same."""
    real = control.try_sabotaged

    def blind(*args: object, **kwargs: object) -> object:
        with monkeypatch.context() as patch:
            patch.setattr(point_target, "judge_target", lambda report, origin, target, found: found.stop)
            patch.setattr("flows.recovery.point_in_time.point_target", point_target)
            return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(control, "try_sabotaged", blind)
    scenario = SCENARIOS[NAME]
    assert isinstance(scenario, DataCorruption)
    report = critical(system, NAME)
    assert finding(report, "negative controls").startswith("CRITICAL restore-to-point")
    assert system.healthy()


def test_killed_after_the_bug_it_is_healed_by_the_next_launch(system: System) -> None:
    killed_and_launched_again(system, "drill: struck")


@pytest.mark.soak
@pytest.mark.parametrize("place", PLACES)
def test_killed_anywhere_it_is_healed_by_the_next_launch(system: System, place: str) -> None:
    killed_and_launched_again(system, place)


def killed_and_launched_again(system: System, place: str) -> None:
    done = process(system, NAME, OPS_FAILPOINT=place)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    report = hold(system, NAME)
    assert report.status is Status.WARN, report.sentence()
    assert finding(report, "healthy at the end").startswith("OK")
    assert system.sql(CORRUPT) == [(0,)]
    assert system.healthy()
