"""The drill of corrupted data: a bug rewrites every interview, and the cluster goes back to the transaction before."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.recovery import gate
from flows.recovery.drills import control
from flows.recovery.drills.drill import SCENARIOS
from flows.recovery.point import target as point_target
from flows.recovery.point.restore import restore_to_point
from runbook.guard.loss import Loss
from runbook.report import Status
from tasks.cluster.target import Stop
from tasks.recovery_points.estimate import DurationSample
from tasks.recovery_points.samples import read_samples
from tests.fixtures.reports import rows as table
from tests.fixtures.reports import text_of as finding
from tests.recovery.conftest import System
from tests.recovery.drills.running import base_backup, begun, critical, environment, forget, hold, process

NAME = "data_corruption"
# Whether its standby is then copied, rewound or told whom to follow depends on how far it had replayed.
PLACES = ("fault: transaction noted", "drill: struck", "drill: decided", "drill: restored", "after make_slots")
CORRUPT = "SELECT count(*) FROM interview_sessions WHERE position = ''"


@pytest.fixture(scope="module", autouse=True)
def verified(system: System) -> None:
    base_backup(system)


def archived(system: System) -> dict[str, int]:
    """The finished segments that the archive holds: what is still written is replaced as it grows."""
    finished = [path for path in Path(environment(system).backups.wal).rglob("*.zst") if ".partial." not in path.name]
    return {str(path): path.stat().st_size for path in finished}


def samples(system: System) -> tuple[DurationSample, ...]:
    """Recoveries to a point in time that were measured."""
    return read_samples.work(environment(system).reports_directory, system.name).get("database point in time", ())


@pytest.fixture
def foreign(system: System) -> Iterator[Path]:
    """What an earlier recovery kept aside."""
    data = Path(environment(system).postgres.data_directory)
    path = data.with_name(f"{data.name}.superseded_20200101_000000")
    path.mkdir()
    yield path
    path.rmdir()


def test_what_was_before_the_bug_is_back_and_every_sabotaged_archive_is_refused(system: System, foreign: Path) -> None:
    before = archived(system)
    measured = len(samples(system))
    report = hold(system, NAME)
    assert report.status in (Status.OK, Status.WARN), report.sentence()
    assert report.facts["detected by"].startswith("content after")
    assert "wrote" in report.facts["diagnosis"]
    assert finding(report, "the diagnosis is right").startswith("OK")
    assert finding(report, "data as before the corruption").startswith("OK")
    assert re.match(r"0 of [\d,]+ acknowledged writes lost, ", report.facts["RPO"])
    ledger = {row[0]: row[1:] for row in table(report, "Ledger")}
    assert all(cell.startswith("0 of ") for cell in ledger["lost"]), "what was given up is no loss"
    given_up = sum(int(cell.split(" of ")[0]) for cell in ledger["given up after the fault"])
    assert report.facts["given up after the fault"].startswith(f"{given_up:,} of ")
    stated = finding(report, "the runbook's loss")
    assert re.search(
        rf"^OK by the ledger {given_up:,} of [\d,]+ acknowledged writes; by the runbook: [\d,]+ commits", stated
    )
    missing = {row[0] for row in table(report, "Missing writes, one by one")}
    # The table ends with how many more there are: on a slow machine many are given up.
    assert {kind for kind in missing if not kind.startswith("… ")} == {"after the fault: given up"}
    controls = table(report, "Negative controls")
    assert [row[1] for row in controls] == ["restore-to-point"] * 3
    assert "missing" in controls[0][0]
    assert "SHA-256 right again" in controls[2][0]
    assert not [row for row in controls if row[2].startswith("NO")]
    assert system.sql(CORRUPT) == [(0,)]
    assert system.healthy()
    assert foreign.exists(), "it is not the drill's"
    kept = table(report, "Old data kept by this drill's recoveries")
    assert kept
    assert {row[3] for row in kept} == {"deleted"}
    assert not [row[1] for row in kept if Path(row[1]).exists()]
    assert len(samples(system)) > measured, "its recovery counts for estimates"
    after = archived(system)
    assert {path: after.get(path) for path in before} == before, "only copies were spoiled"
    assert [row[5] for row in table(report, "Phases (§8.4)")] == ["yes"] * 6


def test_a_runbook_that_states_less_than_the_ledger_found_makes_the_drill_critical(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gate finds no lost commit: the recovery gives up the writes after the bug, and reports that it lost none."""
    monkeypatch.setattr(gate, "_counted", lambda copy, read, planned: Loss(copy.part))
    report = critical(system, NAME)
    stated = finding(report, "the runbook's loss")
    assert re.search(
        r"^CRITICAL by the ledger [1-9][\d,]* of [\d,]+ acknowledged writes; by the runbook: nothing is lost", stated
    )
    assert [one.name for one in report.findings if one.status is Status.CRITICAL] == ["the runbook's loss"]
    assert system.healthy()


def test_a_runbook_that_would_take_a_spoiled_archive_makes_the_drill_critical(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control alone, of a runbook that plans whatever it finds."""
    (row,) = system.sql(
        "UPDATE users SET updated_at = now() WHERE id = (SELECT min(id) FROM users) RETURNING xmin::text"
    )
    plan = restore_to_point.fn(system.name, by="before_transaction", target=row[0])
    drill = begun(system, NAME, tmp_path)
    drill.note(found=row[0], stops=plan.facts["stops"], **{name: str(value) for name, value in plan.pins.items()})
    taken = Stop(0, False, None, None)
    monkeypatch.setattr(point_target, "judge_target", lambda report, origin, target, found: found.stop or taken)
    try:
        control.report_results(drill.report, SCENARIOS[NAME].control(drill))
    finally:
        forget(system)
    assert finding(drill.report, "negative controls").startswith("CRITICAL restore-to-point")


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
