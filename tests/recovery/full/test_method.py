"""full_restore takes the option that loses least: base backup and WAL, otherwise the dump."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocks.environment import Environment
from flows.database.backup import backup_database
from flows.database.base_backup import backup_cluster
from flows.recovery.full_restore import full_restore
from runbook.report import Report, Status
from runbook.wait import until
from tasks.drill.ledger import WriteLedger
from tasks.drill.lost_writes import LedgerResult, find_lost_writes
from tasks.drill.writer import Writer
from tests.recovery.conftest import System
from tests.recovery.full.test_full_restore import newest

WRITES = 20


@pytest.fixture(scope="module")
def based(system: System) -> Iterator[System]:
    """A base backup after the dump. Afterwards the standby follows the last cluster."""
    backup_cluster.fn(system.name)
    try:
        yield system
    finally:
        backup_database.fn(system.name)
        shutil.rmtree(newest(system, "cluster").parent)
        newest(system).parent.joinpath("cluster").mkdir(exist_ok=True)


@pytest.fixture
def standby_again(based: System) -> Iterator[None]:
    """The standby is rebuilt, and the new timeline has a base backup: as the report says."""
    yield
    based.lab.renew_standby()
    backup_cluster.fn(based.name)


def write(system: System, ledger: Path) -> WriteLedger:
    """Writes that the application acknowledged."""
    account = WriteLedger(ledger)
    with Writer(Environment.find(system.name).application, account, per_second=50):
        until(lambda: len(account.acknowledged()) >= WRITES, what="the client's writes", seconds=120)
    return account


def lost(system: System, ledger: WriteLedger) -> LedgerResult:
    dsn = system.lab.status()["postgres"]["dsn"]
    return find_lost_writes(ledger, dsn, Environment.find(system.name).application)


def options(report: Report) -> dict[str, tuple[str, ...]]:
    """The rows of the options' table by kind."""
    (table,) = [one for one in report.evidence if one.name.startswith("Recovery options for the database")][-1:]
    return {row[0]: row for row in table.rows}


@pytest.mark.usefixtures("standby_again")
def test_a_dropped_database_is_restored_to_just_before_the_drop(based: System, tmp_path: Path) -> None:
    """The demo's disaster. By the ledger and by the application's log no acknowledged write is lost."""
    ledger = write(based, tmp_path / "writes.jsonl")
    based.drop()
    plan = full_restore.fn(based.name)
    assert plan.status is Status.PLANNED, plan.sentence()
    assert "DROP DATABASE by transaction" in plan.facts["target"]
    rows = options(plan)
    assert rows["base backup and WAL"][-1] == "chosen"
    assert rows["base backup and WAL"][3].startswith("0.0 s")
    assert float(rows["dump"][3].split()[0].replace(",", "")) > 0
    report = full_restore.fn(based.name, confirm=based.name)
    assert report.status is Status.WARN, report.sentence()
    assert lost(based, ledger).lost == ()
    assert report.facts["writes lost"].startswith("0 ")
    assert based.healthy()
    assert based.log_in()
    assert "rejoin-standby" in " ".join(one.next_step for one in report.findings)
