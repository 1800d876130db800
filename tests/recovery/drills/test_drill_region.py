"""The drill of a region outage: every process of the lab killed while clients write; there, and back again."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from flows.application.files import backup_files
from flows.database.backup import verify_backup
from flows.database.copies import replicate_backups
from flows.recovery.region.failover import region_failover
from flows.redis.persistence import backup_redis
from runbook.report import Status
from tests.fixtures.reports import rows as table
from tests.fixtures.reports import text_of as finding
from tests.recovery.conftest import System
from tests.recovery.drills.running import base_backup, critical, hold, process

NAME = "region_outage"
PLACES = ("fault: region frozen", "drill: decided", "before send_users", "drill: restored", "cluster: between renames")

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module", autouse=True)
def verified(system: System) -> None:
    base_backup(system)
    for kind, flow in (("redis", backup_redis), ("files", backup_files)):
        flow.fn(system.name)
        verify_backup.fn(system.name, kind=kind)
    replicate_backups.fn(system.name)


def require_as_before(system: System) -> None:
    """Users are at the lab, everything streams, and nothing is left in the other region."""
    assert system.healthy()
    assert system.log_in()
    assert system.lab.endpoint() == system.lab.status()["application"]["url"]
    assert {row["running"] for row in system.lab.region().status()["services"].values()} == {False}


def test_there_and_back_and_a_sabotaged_copy_is_refused(system: System) -> None:
    report = hold(system, NAME)
    assert report.status in (Status.OK, Status.WARN), report.sentence()
    assert [row[5] for row in table(report, "Phases (§8.4)")] == ["yes"] * 6
    assert finding(report, "RTO").startswith("OK")
    assert finding(report, "negative controls").startswith("OK")
    assert {row[1] for row in table(report, "Checks of phase 5")} == {"True"}
    require_as_before(system)


def test_a_region_without_replicated_backups_is_not_broken(system: System) -> None:
    store = system.lab.region().status()["stores"]["cluster"]
    aside = Path(store).with_name("aside")
    Path(store).rename(aside)
    before = system.untouched()
    try:
        Path(store).mkdir()
        assert "replicate-backups" in finding(critical(system, NAME), "cluster in the other region")
    finally:
        Path(store).rmdir()
        aside.rename(store)
    assert system.untouched() == before


@pytest.mark.parametrize("place", PLACES)
def test_killed_anywhere_it_is_healed_by_the_next_launch(system: System, place: str) -> None:
    done = process(system, NAME, OPS_FAILPOINT=place)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    report = hold(system, NAME)
    assert "half-done drill was ended" in report.outcome, report.sentence()
    require_as_before(system)
    assert region_failover.fn(system.name, source=f"{system.name}-dr").outcome.endswith("nothing was changed")
