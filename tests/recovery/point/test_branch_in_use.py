"""The timeline in use is the one that acknowledged last, not the highest: after an undo the lower one goes on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from flows.database.base_backup import backup_cluster
from flows.recovery.forensics.transactions import find_transaction
from flows.recovery.full_restore import full_restore
from flows.recovery.objectives.points import read_recovery_points
from flows.recovery.point.restore import restore_to_point
from flows.recovery.postgres.failover import postgres_failover, rejoin_standby
from flows.recovery.undo_full_restore import undo_full_restore
from runbook.report import Status
from runbook.wait import until
from tasks.wal.archive.destinations import archive_of, ship_now
from tests.fixtures import forked
from tests.fixtures.postgres.clusters import NAME, Cluster

ROWS = 10


@pytest.fixture(autouse=True)
def no_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recovery needs no Prefect server."""
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")


def mistaken(cluster: Cluster) -> None:
    """A base backup, rows after it, and a restore to just before the last of them: a mistake. Timeline 2 is archived."""
    cluster.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY)")
    backup_cluster.fn(NAME)
    cluster.sql("postgres", f"INSERT INTO t SELECT generate_series(1, {ROWS})")
    with cluster.connect("postgres") as connection, connection.transaction():
        connection.execute("INSERT INTO t VALUES (11)")
        ((xid,),) = connection.execute("SELECT pg_current_xact_id()::text").fetchall()
    restore_to_point.fn(NAME, by="before_transaction", target=xid, confirm=NAME)
    cluster.sql("postgres", "INSERT INTO t VALUES (100)")  # only on the branch that will be left
    ship_now(cluster.environment)  # as the archiver does


def ids(cluster: Cluster) -> list[int]:
    role = "standby" if cluster.is_standby("postgres") else "postgres"
    return [number for (number,) in cluster.sql(role, "SELECT id FROM t WHERE id > 10 ORDER BY 1")]


def test_after_an_undo_every_reader_follows_the_lower_timeline_and_no_acknowledged_write_is_lost(
    cluster: Cluster,
) -> None:
    """Restore, undo, write, crash with the data directory removed, restore: a client's ledger keeps account."""
    mistaken(cluster)
    plan = undo_full_restore.fn(NAME)
    planned = int(plan.headline.partition(" commits of PostgreSQL are lost")[0].split()[-1])
    cluster.sql("postgres", "INSERT INTO t VALUES (101)")  # after the plan
    undone = undo_full_restore.fn(NAME, **plan.pins, confirm=NAME)
    assert undone.status is Status.WARN, undone.sentence()
    assert undone.losses["PostgreSQL"].count == planned + 1
    assert ids(cluster) == [11]
    with cluster.writing() as writes:  # commits return: the receiver follows
        until(lambda: len(writes.acknowledged) >= 50, what="writes", seconds=60)
    cluster.sql("postgres", "INSERT INTO t VALUES (200)")
    ship_now(cluster.environment)
    assert restore_to_point.fn(NAME, by="latest").facts["WAL"].split(" on ")[1].startswith("timeline 1,")
    found = find_transaction.fn(NAME, "public.writes", kinds=["DELETE"])
    assert "timeline 1," in found.facts["WAL"]
    points = [one for one in read_recovery_points(cluster.environment).points if one.means == "point in time"]
    assert points, "what check-recovery-objectives, show-recovery-options and the board judge by"
    assert all("on timeline 1;" in one.detail for one in points), points
    plan = full_restore.fn(NAME, method="cluster")
    assert "on timeline 1," in plan.facts["WAL"]
    cluster.crash("postgres")
    shutil.rmtree(cluster.node("postgres").data)
    shutil.rmtree(cluster.node("standby").data)
    cluster.crash("receiver")
    shutil.rmtree(cluster.wal)  # the archive and its records are all that is left
    done = full_restore.fn(NAME, confirm=NAME)
    assert done.facts["timeline"] == "3 (from timeline 1)"
    assert ids(cluster) == [11, 200]
    there = {row for (row,) in cluster.sql("postgres", "SELECT id FROM writes")}
    assert set(writes.acknowledged) <= there


def test_without_a_write_since_the_undo_its_record_decides_and_a_failover_takes_a_new_number(cluster: Cluster) -> None:
    """The newest commit is on the branch that was left. A promotion does not take that branch's number again."""
    mistaken(cluster)
    undo_full_restore.fn(NAME, confirm=NAME)
    rejoin_standby.fn(NAME, confirm=NAME)
    ship_now(cluster.environment)
    for role in ("postgres", "standby"):
        cluster.stop(role)
    with cluster.gone(cluster.node("postgres").data), cluster.gone(cluster.node("standby").data):
        plan = restore_to_point.fn(NAME, by="latest")
        assert "on timeline 1," in plan.facts["WAL"]
    cluster.start("postgres", "standby")
    cluster.settle()
    done = postgres_failover.fn(NAME, mode="planned", confirm=NAME)
    assert done.status is Status.WARN, done.sentence()
    ((name,),) = cluster.sql("standby", "SELECT pg_walfile_name(pg_current_wal_lsn())")
    assert name.startswith("00000003")
    assert ids(cluster) == [11]


# Where the state of the system changes most; the soak takes every point that a run passes.
BOUNDARIES = ("cluster: between renames", "cluster: receiver's directory aside", "undo: recorded")


def test_an_undo_counts_the_writes_since_a_recovery_to_before_the_one_before(cluster: Cluster) -> None:
    """PostgreSQL writes into the history of timeline 3 that it parted from timeline 2, at an LSN before timeline 2
    began, and where timeline 1 had ended: the writes behind the true place were taken for shared ones."""
    cluster.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY)")
    backup_cluster.fn(NAME)
    cluster.sql("postgres", "INSERT INTO t VALUES (11)")
    ((lsn,),) = cluster.sql("postgres", "SELECT pg_current_wal_insert_lsn()::text")
    cluster.sql("postgres", f"INSERT INTO t SELECT generate_series(100, {ROWS} * 5000)")
    full_restore.fn(NAME, method="cluster", confirm=NAME)
    restore_to_point.fn(NAME, by="lsn", target=lsn, confirm=NAME)
    assert ids(cluster) == [11]
    for number in range(12, 12 + ROWS):
        cluster.sql("postgres", f"INSERT INTO t VALUES ({number})")
    plan = undo_full_restore.fn(NAME)
    assert int(plan.headline.partition(" commits of PostgreSQL are lost")[0].split()[-1]) >= ROWS, plan.headline
    assert (undo_full_restore.fn(NAME, **plan.pins, confirm=NAME).losses["PostgreSQL"].count or 0) >= ROWS


def launch(flow: str = "undo-full-restore", *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    argv = ["-m", "flows.launch", flow, f"environment={NAME}", f"confirm={NAME}", *words]
    return forked.run(argv, {**os.environ, "PREFECT_API_URL": "", **variables})


def require_toggles(cluster: Cluster, points: Sequence[str]) -> None:
    """Each undo, killed and launched again, swaps once: the other branch is live, commits return, and it is recorded."""
    for number, point in enumerate(points):
        killed = launch(OPS_FAILPOINT=point)
        assert killed.returncode == -signal.SIGKILL, (point, killed.stderr[-2000:])
        again = launch()
        assert again.returncode == 0, (point, again.stderr[-2000:])
        assert ids(cluster) == [[11], [100]][number % 2], point
        assert cluster.streaming() == {"receiver"}, point
        cluster.sql("postgres", "UPDATE t SET id = id")  # returns: the receiver confirms
        system = cluster.node("postgres").system
        mark = archive_of(cluster.environment, "backups", system).listing().branch
        assert mark, point
        assert mark.timeline == 1 + number % 2, point


def test_an_undo_killed_at_its_boundaries_and_launched_again_swaps_once(cluster: Cluster) -> None:
    mistaken(cluster)
    require_toggles(cluster, BOUNDARIES)


def test_a_restore_that_was_killed_between_its_renames_is_undone(cluster: Cluster) -> None:
    """No directory is live, and the copy never was: nothing is lost."""
    cluster.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY)")
    backup_cluster.fn(NAME)
    cluster.sql("postgres", "INSERT INTO t VALUES (11)")
    killed = launch("restore-to-point", "by=latest", OPS_FAILPOINT="cluster: between renames")
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not cluster.node("postgres").data.exists()
    undone = undo_full_restore.fn(NAME, confirm=NAME)
    assert undone.facts["lost"] == "nothing is lost"
    assert ids(cluster) == [11]
    cluster.sql("postgres", "INSERT INTO t VALUES (12)")  # returns: the receiver confirms


@pytest.mark.soak
def test_an_undo_killed_anywhere_and_launched_again_swaps_once(cluster: Cluster, tmp_path: Path) -> None:
    mistaken(cluster)
    log = tmp_path / "points"
    assert launch(OPS_FAILPOINT_LOG=str(log)).returncode == 0
    assert launch().returncode == 0
    points = list(dict.fromkeys(log.read_text().splitlines()))
    assert set(BOUNDARIES) <= set(points)
    require_toggles(cluster, points)
