"""full_restore takes the option that loses least: base backup and WAL, otherwise the dump."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psycopg
import pytest

from blocks.environment import Environment
from flows.database.backup import backup_database
from flows.database.base_backup import backup_cluster
from flows.database.undo_restore import undo_restore
from flows.recovery.full import cluster
from flows.recovery.full_restore import full_restore
from flows.recovery.options import RestoreOptions
from flows.recovery.point.target import FoundTarget
from flows.recovery.stopped_services import SystemServices
from flows.redis.persistence import backup_redis
from lab import lifecycle
from runbook.errors import OpsError, RunbookFailed, VerificationFailed
from runbook.report import Report, Status
from runbook.wait import until
from tasks.drill.ledger import WriteLedger
from tasks.drill.lost_writes import find_lost_writes
from tasks.drill.writer import Writer
from tasks.wal.reading.destruction import DroppedDatabases
from tests.fixtures.reports import values as findings
from tests.recovery.conftest import System, restore

WRITES = 20


@pytest.fixture(scope="module")
def based(system: System) -> Iterator[System]:
    """A dump, then a base backup, the only one. Afterwards the standby follows the last cluster, and there is none.
    Redis serves since its newest backup: other files' tests restore it."""
    _discard_base_backups(system)  # of another file's tests
    backup_redis.fn(system.name)
    backup_database.fn(system.name)
    backup_cluster.fn(system.name)
    try:
        yield system
    finally:
        _discard_base_backups(system)
        system.lab.renew_standby()
        backup_database.fn(system.name)


def _discard_base_backups(system: System) -> None:
    for base in system.store("cluster").glob("base_*"):
        shutil.rmtree(base)


def options(report: Report) -> dict[str, tuple[str, ...]]:
    """The rows of the options' table by kind."""
    table = [one for one in report.evidence if one.name.startswith("Recovery options for the database")][-1]
    return {row[0]: row for row in table.rows}


def messages(system: System) -> int:
    ((count,),) = system.sql("SELECT count(*) FROM interview_messages")
    return int(count)


def test_a_dropped_database_is_restored_to_just_before_the_drop(based: System, tmp_path: Path) -> None:
    """The demo's disaster. By the ledger and by the application's log no acknowledged write is lost."""
    application, ledger = Environment.find(based.name).application, WriteLedger(tmp_path / "writes.jsonl")
    with Writer(application, ledger, per_second=50):
        until(lambda: len(ledger.acknowledged()) >= WRITES, what="the client's writes", seconds=120)
    based.redis(1).set("since:the-backup", "kept")
    redis_run = based.redis().info("server")["run_id"]
    based.drop()
    plan = full_restore.fn(based.name)
    assert plan.status is Status.PLANNED, plan.sentence()
    assert "DROP DATABASE by transaction" in plan.facts["target"]
    rows = options(plan)
    assert rows["base backup and WAL"][3].startswith("0 commits of "), rows
    assert rows["base backup and WAL"][-1] == "chosen"
    assert rows["dump"][3].startswith("writes of ")
    steps = {step.step: step.detail for step in plan.plan_steps}
    assert "neither stopped nor restored" in steps["keep Redis as it serves"]
    report = full_restore.fn(based.name, confirm=based.name)
    assert report.status is Status.WARN, report.sentence()
    assert based.redis().info("server")["run_id"] == redis_run
    assert based.redis(1).getdel("since:the-backup") == b"kept"
    assert findings(report)["Redis kept as it serves"].endswith("not restarted")
    assert "undo-restore-redis" not in " ".join([*report.facts.values(), *(one.next_step for one in report.findings)])
    lost = find_lost_writes(ledger, based.lab.status()["postgres"]["dsn"], application)
    assert lost.lost == ()
    assert report.facts["writes lost"].startswith("0 ")
    assert based.log_in()
    assert "rejoin-standby" in " ".join(one.next_step for one in report.findings)


def test_an_emptied_table_comes_back_and_a_killed_run_is_launched_again(based: System) -> None:
    """Killed behind its fence no server answers, and between the renames no directory is live: the next plan stops where
    the killed run wanted to stop."""
    rows = messages(based)
    based.sql("TRUNCATE interview_messages CASCADE")
    based.sql("CREATE TABLE afterwards ()")
    plan = full_restore.fn(based.name)
    assert "TRUNCATE of public.interview_messages" in findings(plan)["data destroyed by a statement"]
    assert options(plan)["base backup and WAL"][3].startswith("1 commit of ")
    kept = full_restore.fn(based.name, before="none")
    assert "target" not in kept.facts
    for point in ("full restore: cluster built", "cluster: between renames"):
        assert restore(based, "--method", "auto", OPS_FAILPOINT=point).returncode == -signal.SIGKILL
        again = full_restore.fn(based.name)
        assert again.facts["target of a killed run"].startswith("before=")
    done = restore(based, "--method", "auto")
    assert done.returncode == 0, done.stderr[-2000:]
    assert messages(based) >= rows, "the smoke checks write some"
    assert based.sql("SELECT to_regclass('afterwards')") == [(None,)]


def test_a_dropped_table_comes_back(based: System) -> None:
    rows = messages(based)
    based.sql("DROP TABLE interview_messages CASCADE")
    report = full_restore.fn(based.name, confirm=based.name)
    assert "DROP TABLE of public.interview_messages" in findings(report)["data destroyed by a statement"]
    assert messages(based) >= rows


def test_a_cluster_that_fails_its_proof_gives_way_to_the_dump(based: System, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise VerificationFailed("the copy is not at the target", "nothing live was touched")

    monkeypatch.setattr(cluster, "build_copies", fail)
    rows = messages(based)
    backup_database.fn(based.name)
    based.sql("CREATE TABLE later ()")  # only the WAL has it
    with pytest.raises(
        RunbookFailed, match="writes of grc_db of the last .* are lost, but the plan said: nothing"
    ) as it:
        full_restore.fn(based.name, confirm=based.name)
    told = findings(it.value.report)
    refused = [one for one in told if one.startswith("not used: base_")]
    assert refused, told
    assert all("the copy is not at the target" in told[one] for one in refused)
    assert based.sql("SELECT to_regclass('later') IS NOT NULL") == [(True,)], "nothing was replaced"
    report = full_restore.fn(based.name, method="dump", confirm=based.name)
    assert "copy equal to the backup" in findings(report)
    assert messages(based) >= rows, "the smoke checks write some"
    with pytest.raises(OpsError, match="nothing in the stores of"):
        full_restore.fn(based.name, method="cluster", confirm=based.name)
    assert based.log_in()


def test_a_service_that_does_not_stop_ends_the_run_and_no_other_backup_is_tried(
    based: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No backup helps against that, and the next one would lose more."""

    def refuse(*_: object) -> None:
        raise OpsError("backend did not stop", "stop it by hand, then run this again")

    based.sql("CREATE TABLE only_in_the_wal ()")
    monkeypatch.setattr(SystemServices, "_stop", refuse)
    with pytest.raises(RunbookFailed, match="^CRITICAL: backend did not stop") as it:
        full_restore.fn(based.name, confirm=based.name)
    assert not [name for name in findings(it.value.report) if name.startswith("not used")]


def test_what_another_client_writes_until_the_servers_stop_is_restored(based: System) -> None:
    """The application is stopped before; nobody can stop a person in psql."""
    with psycopg.connect(based.lab.status()["postgres"]["admin_dsn"], dbname="grc_db", autocommit=True) as hand:
        hand.execute("CREATE TABLE by_hand (id int)")
        stop = threading.Event()

        def write() -> None:
            with contextlib.suppress(psycopg.Error):
                while not stop.is_set():
                    hand.execute("INSERT INTO by_hand VALUES (1)")
                    acknowledged.append(1)

        acknowledged = list[int]()
        thread = threading.Thread(target=write)
        thread.start()
        try:
            report = full_restore.fn(based.name, method="cluster", confirm=based.name)
        finally:
            stop.set()
            thread.join(60)
    assert report.losses["grc_db"].is_none, report.losses
    assert based.sql("SELECT count(*) FROM by_hand")[0][0] >= len(acknowledged) > 0
    based.sql("DROP TABLE by_hand")
    assert based.log_in()

    # The lab does not wait for a standby that a restore by hand left on the old timeline.
    shown = list[str]()
    lifecycle.up(based.name, shown.append, runbooks=False)
    assert any("is on another timeline than the primary" in line for line in shown), shown
    assert not any("does not stream" in line for line in shown)


def test_other_databases_are_never_set_back_silently(based: System) -> None:
    """The application's database is taken out of the recovered cluster: by a run that is killed with it at hand, and by
    the next one, which finds the server down and learns of the other database from the copy. Rows that the other
    database got after the target are still there."""
    rows = messages(based)
    based.sql("CREATE DATABASE other_app", "postgres")
    try:
        based.sql("TRUNCATE interview_messages CASCADE")
        based.sql("CREATE TABLE orders AS SELECT 1 AS id", "other_app")
        plan = full_restore.fn(based.name)
        assert "other_app" in plan.facts["other databases, not changed"]
        assert options(plan)["one database from base backup and WAL"][-1] == "chosen"
        assert {"replay", "dump the database", "swap"} <= {step.step for step in plan.plan_steps}
        with pytest.raises(RunbookFailed, match="other databases of the cluster: other_app"):
            full_restore.fn(based.name, method="cluster")
        named = full_restore.fn(based.name, databases=["other_app"])
        assert options(named)["base backup and WAL"][-1] == "chosen"
        killed = restore(based, "--method", "auto", OPS_FAILPOINT="full restore: database extracted")
        assert killed.returncode == -signal.SIGKILL
        based.sql("INSERT INTO orders VALUES (2)", "other_app")
        services, _ = lifecycle.existing(based.name)
        services.supervisor.stop("postgresql")
        with pytest.raises(RunbookFailed, match=r"run this with before=\d+ to stop just before TRUNCATE") as it:
            full_restore.fn(based.name, confirm=based.name)
        (before,) = re.findall(r"before=(\d+) to stop", it.value.message)
        done = full_restore.fn(based.name, before=before, confirm=based.name)
        assert done.status is Status.WARN, done.sentence()
        assert "the cluster also has other_app" in " ".join(findings(done).values())
        assert messages(based) >= rows, "the smoke checks write some"
        assert based.sql("SELECT id FROM orders ORDER BY id", "other_app") == [(1,), (2,)]
        assert done.facts["newest point restored"].endswith("one database from base backup and WAL")
        assert "grc_db__old_" in done.facts["replaced data kept"], "undo-restore swaps it back"
        assert not list(based.store("postgres").glob(".at-hand-*")), "the dump is deleted"
    finally:
        based.sql("DROP DATABASE other_app WITH (FORCE)", "postgres")
    for parameters, sentence in (
        ({"method": "dump", "backup": "base_20260101_000000"}, "method=dump cannot restore base_"),
        ({"method": "cluster", "backup": "20260101"}, "method=cluster cannot restore 20260101"),
        ({"backup": "base_20260101_000000"}, "there is no backup “base_20260101_000000”"),
    ):
        with pytest.raises(OpsError, match=sentence):
            full_restore.fn(based.name, **parameters)  # type: ignore[arg-type]


def test_the_undo_of_an_extraction_brings_the_replaced_database_back_and_leaves_the_other_one_alone(
    based: System,
) -> None:
    """As its report says: the database that was replaced, with the mistake in it and without what was written since.
    Undone again, the recovered one is live. The other database keeps every row; Redis and files are as they were."""
    rows = messages(based)
    based.sql("CREATE DATABASE other_app", "postgres")
    try:
        based.sql("CREATE TABLE orders AS SELECT 1 AS id", "other_app")
        based.sql("TRUNCATE interview_messages CASCADE")
        plan = full_restore.fn(based.name)
        assert options(plan)["one database from base backup and WAL"][-1] == "chosen"
        assert "undo: undo-restore" in plan.headline
        done = full_restore.fn(based.name, confirm=based.name)
        assert done.status is Status.WARN, done.sentence()
        assert messages(based) >= rows
        based.sql("INSERT INTO orders VALUES (2)", "other_app")
        based.sql("CREATE TABLE written_since AS SELECT 1 AS id")
        kept = next(name for name in re.findall(r"\w+", done.facts["replaced data kept"]) if "__old_" in name)

        redis_run = based.redis().info("server")["run_id"]
        undo = undo_restore.fn(based.name, kept)
        assert undo.status is Status.PLANNED, undo.sentence()
        assert "base_" in undo.headline, "by which backup it was replaced"
        undone = undo_restore.fn(based.name, kept, confirm=based.name)
        assert undone.status is Status.OK, undone.sentence()
        assert messages(based) == 0, "the statement is in it"
        assert based.sql("SELECT to_regclass('written_since')") == [(None,)]
        assert based.log_in()
        until(based.healthy, what="the application's health after the undo", seconds=120)

        recovered = undo_restore.fn(based.name, confirm=based.name)
        assert recovered.status is Status.OK, recovered.sentence()
        assert messages(based) >= rows
        assert based.sql("SELECT id FROM written_since") == [(1,)]
        assert based.sql("SELECT id FROM orders ORDER BY id", "other_app") == [(1,), (2,)]
        assert based.redis().info("server")["run_id"] == redis_run, "not restarted"
        assert based.log_in()
    finally:
        based.sql("DROP TABLE IF EXISTS written_since")
        based.sql("DROP DATABASE other_app WITH (FORCE)", "postgres")


@pytest.mark.soak
def test_killed_at_every_boundary_of_the_cluster(based: System, tmp_path: Path) -> None:
    log, words = tmp_path / "points", ("--method", "cluster")
    assert restore(based, *words, OPS_FAILPOINT_LOG=str(log)).returncode == 0
    points = list(dict.fromkeys(log.read_text().splitlines()))
    assert {"full restore: cluster built", "full restore: cluster proven", "cluster: between renames"} <= set(points)
    for point in points:
        assert restore(based, *words, OPS_FAILPOINT=point).returncode == -signal.SIGKILL, point
        done = restore(based, *words)
        assert done.returncode == 0, f"{point}: {done.stderr[-1500:]}"
        assert based.log_in(), point


@pytest.mark.parametrize(("shipped", "damage", "warns"), [(2, "", False), (0, "", True), (2, "is damaged", True)])
def test_wal_without_a_commit_is_no_archiver_that_ships_nothing(shipped: int, damage: str, warns: bool) -> None:
    """Nobody wrote since the base backup: there is nothing to check."""
    report, found = Report("Full restore", "lab"), FoundTarget(None, (), None, 0, False, damage)
    origin = SimpleNamespace(
        chain=SimpleNamespace(links=("segment",) * shipped), content=SimpleNamespace(stop_lsn="0/8")
    )
    RestoreOptions._end_of(cast(Any, SimpleNamespace(report=report, source="lab")), cast(Any, origin), found)
    assert ("none after the base backup" in findings(report).get("WAL in the store", "")) == warns
    assert ("no commit after the base backup" in report.facts.get("readable WAL", "")) != warns


def test_a_drop_counts_only_if_it_was_committed() -> None:
    head = "rmgr: {0} len (rec/tot): 1/ 1, tx: {1}, lsn: 0/{2}, prev 0/0, desc: "
    lines = [
        head.format("Database", 7, "100") + "DROP dir 1663/16384",
        head.format("Transaction", 7, "200") + "ABORT 2026-11-29 10:00:00 UTC",
        head.format("Database", 8, "300") + "CREATE_WAL_LOG create dir 1663/16390",
        head.format("Database", 9, "400") + "DROP dir 1663/16384 1664/16384",
        head.format("Transaction", 9, "500") + "COMMIT 2026-11-29 10:00:01 UTC; dropped stats: 1/16384/0",
    ]
    read = DroppedDatabases()
    assert list(read.watch(lines)) == lines
    (only,) = read.found
    assert (only.end.xid, only.begin, only.database, read.created) == (9, 0x400, 16384, [0x300])
