"""restore_to_point killed with -9 at its boundaries and launched again: it ends well."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from flows.database.base_backup import backup_cluster
from flows.recovery.full_restore import full_restore
from tests.fixtures import forked
from tests.fixtures.postgres.clusters import NAME, Cluster

ROOT = Path(__file__).resolve().parents[3]
# Where the state of the system changes most; the soak takes every point that a run passes.
BOUNDARIES = ("after promote_instance", "cluster: between renames", "cluster: receiver's directory aside")


TABLES = ("--mode", "tables", "--tables", "accounts")


def launch(xid: int, *more: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """As an operator launches a plan's form: with the timeline that was pinned."""
    argv = ["-m", "flows.recovery.point.restore", "--environment", NAME, "--confirm", NAME]
    words = ["--by", "before_transaction", "--target", str(xid), "--timeline", "1", *more]
    environment = {**os.environ, "PREFECT_API_URL": "http://127.0.0.1:9/api", **variables}
    return forked.run([*argv, *words], environment)


def prepared(cluster: Cluster) -> int:
    """A base backup, and a bug after it, whose transaction is returned."""
    cluster.sql("postgres", "CREATE TABLE accounts (id int PRIMARY KEY, balance int)")
    cluster.sql("postgres", "INSERT INTO accounts SELECT g, g FROM generate_series(1, 100) g")
    backup_cluster.fn(NAME)
    with cluster.connect("postgres") as connection, connection.transaction():
        connection.execute("UPDATE accounts SET balance = 0")
        row = connection.execute("SELECT pg_current_xact_id()::xid::text::bigint").fetchone()
    assert row
    return int(row[0])


def require_ends_well(cluster: Cluster, xid: int, points: Sequence[str]) -> None:
    for point in points:
        killed = launch(xid, OPS_FAILPOINT=point)
        assert killed.returncode == -signal.SIGKILL, (point, killed.stderr[-2000:])
        again = launch(xid)
        assert again.returncode == 0, (point, again.stderr[-2000:])
        assert cluster.sql("postgres", "SELECT sum(balance) FROM accounts") == [(5050,)], point
        assert cluster.streaming() == {"receiver"}, point
        cluster.sql("postgres", "INSERT INTO accounts VALUES (101, 101)")
        assert not (cluster.node("postgres").data.parent / "data.restoring").exists(), point


@pytest.mark.parametrize("point", BOUNDARIES)
def test_killed_at_a_boundary_and_launched_again(cluster: Cluster, point: str) -> None:
    require_ends_well(cluster, prepared(cluster), [point])


def test_a_full_restore_does_not_take_over_its_target(cluster: Cluster) -> None:
    """A person chose it for this runbook alone: the other one loses nothing."""
    killed = launch(prepared(cluster), OPS_FAILPOINT="cluster: before first rename")
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    plan = full_restore.fn(NAME, method="cluster")
    assert "target of a killed run" not in plan.facts
    assert "nothing is lost" in plan.headline, plan.headline


@pytest.mark.soak
def test_killed_anywhere_and_launched_again(cluster: Cluster, tmp_path: Path) -> None:
    xid, log = prepared(cluster), tmp_path / "points"
    assert launch(xid, OPS_FAILPOINT_LOG=str(log)).returncode == 0
    points = list(dict.fromkeys(log.read_text().splitlines()))
    assert set(BOUNDARIES) <= set(points)
    require_ends_well(cluster, xid, points)


def require_rows_come_back(cluster: Cluster, xid: int, points: Sequence[str]) -> None:
    """Of one table, while the cluster goes on: all of its rows are old or all are new, and others' stay."""
    cluster.sql("postgres", "CREATE TABLE others (id int)")
    for number, point in enumerate(points, 1):
        cluster.sql("postgres", "UPDATE accounts SET balance = 0")
        cluster.sql("postgres", f"INSERT INTO others VALUES ({number})")
        killed = launch(xid, *TABLES, OPS_FAILPOINT=point)
        assert killed.returncode == -signal.SIGKILL, (point, killed.stderr[-2000:])
        assert cluster.sql("postgres", "SELECT sum(balance) FROM accounts") in ([(0,)], [(5050,)]), point
        again = launch(xid, *TABLES)
        assert again.returncode == 0, (point, again.stderr[-2000:])
        assert cluster.sql("postgres", "SELECT sum(balance) FROM accounts") == [(5050,)], point
        assert cluster.sql("postgres", "SELECT count(*) FROM others") == [(number,)], point
        assert not (cluster.node("postgres").data.parent / "data.restoring").exists(), point
        assert not [name for (name,) in cluster.sql("postgres", SCRATCH)], point


SCRATCH = "SELECT datname FROM pg_database WHERE datname NOT IN ('grc_db', 'postgres', 'template0', 'template1')"


@pytest.mark.soak
def test_of_chosen_tables_killed_anywhere_and_launched_again(cluster: Cluster, tmp_path: Path) -> None:
    xid, log = prepared(cluster), tmp_path / "points"
    assert launch(xid, *TABLES, OPS_FAILPOINT_LOG=str(log)).returncode == 0
    points = list(dict.fromkeys(log.read_text().splitlines()))
    assert {"cluster: WAL placed", "after publish", "tables: before commit", "tables: after commit"} <= set(points)
    require_rows_come_back(cluster, xid, points)
