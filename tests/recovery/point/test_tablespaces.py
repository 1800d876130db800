"""A tablespace that was made after the base backup: a staged copy never reaches the live server's directory of it."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from flows.database.base_backup import backup_cluster
from flows.recovery.forensics.salvage import salvage_writes
from flows.recovery.full_restore import full_restore
from flows.recovery.point.restore import restore_to_point
from runbook.errors import OpsError
from runbook.report import Report, Status
from tests.fixtures.postgres.clusters import NAME, Cluster
from tests.fixtures.reports import values as findings


@pytest.fixture(autouse=True)
def no_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recovery needs no Prefect server."""
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")


@pytest.fixture
def place(cluster: Cluster) -> Path:
    """A base backup, then a tablespace with a table of 1,000 rows. Its standby is stopped: on the same host it would use
    the same directory."""
    cluster.sql("postgres", "CREATE TABLE accounts AS SELECT g AS id, g AS balance FROM generate_series(1, 100) g")
    cluster.sql("postgres", "ALTER TABLE accounts ADD PRIMARY KEY (id)")
    cluster.sql("postgres", f"ALTER SYSTEM SET recovery_end_command = 'touch {ran(cluster)}'")
    backup_cluster.fn(NAME)
    cluster.stop("standby")
    directory = cluster.root / "fast"
    cluster.account.directory(directory, 0o700)
    cluster.sql("postgres", f"CREATE TABLESPACE fast LOCATION '{directory}'")
    cluster.sql("postgres", "CREATE TABLE placed (id int PRIMARY KEY USING INDEX TABLESPACE fast) TABLESPACE fast")
    cluster.sql("postgres", "INSERT INTO placed SELECT generate_series(1, 1000)")
    return directory


def ran(cluster: Cluster) -> Path:
    """The file that the configured `recovery_end_command` makes."""
    return cluster.node("postgres").data.with_name("command-ran")


def content(directory: Path) -> dict[str, str]:
    """The SHA-256 of each file."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def settled(cluster: Cluster, directory: Path) -> dict[str, str]:
    """The files as the server leaves them: reading rows would set their hint bits."""
    cluster.sql("postgres", "VACUUM FREEZE placed")
    cluster.sql("postgres", "CHECKPOINT")
    return content(directory)


def rows(cluster: Cluster) -> tuple[int, int]:
    """The table's rows by its heap and by its index."""
    counted = []
    for method in ("indexscan", "seqscan"):
        with cluster.connect("postgres") as connection:
            connection.execute(f"SET enable_{method} = off; SET enable_bitmapscan = off".encode())
            connection.execute("SET enable_indexonlyscan = off")
            ((count,),) = connection.execute("SELECT count(*) FROM placed WHERE id > 0").fetchall()
            counted.append(int(count))
    return counted[0], counted[1]


def located(cluster: Cluster) -> Path:
    ((path,),) = cluster.sql("postgres", "SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname = 'fast'")
    return Path(path)


def test_the_rows_of_another_table_come_back_and_the_live_tablespace_is_untouched(
    cluster: Cluster, place: Path
) -> None:
    ((lsn,),) = cluster.sql("postgres", "SELECT pg_current_wal_insert_lsn()::text")
    cluster.sql("postgres", "UPDATE accounts SET balance = 0")
    cluster.sql("postgres", "INSERT INTO placed SELECT generate_series(1001, 3000)")
    before = settled(cluster, place)
    plan = restore_to_point.fn(NAME, by="lsn", target=lsn, mode="tables", tables=["accounts"])
    assert named(plan, place)
    report = restore_to_point.fn(NAME, by="lsn", target=lsn, mode="tables", tables=["accounts"], confirm=NAME)
    assert report.status in (Status.OK, Status.WARN), report.sentence()
    assert content(place) == before
    assert not ran(cluster).exists(), "a command of the live configuration, which may delete WAL"
    assert cluster.sql("postgres", "SELECT sum(balance) FROM accounts") == [(5050,)]
    cluster.stop("postgres")
    cluster.start("postgres")
    assert rows(cluster) == (3000, 3000)


def named(report: Report, place: Path) -> bool:
    """Whether it names the tablespace."""
    return str(place) in findings(report).get("tablespaces made since the base backup", "")


@pytest.mark.parametrize("missing", [False, True], ids=["there", "its directory is missing"])
def test_the_cluster_goes_back_with_every_acknowledged_row_and_the_old_directory_stays(
    cluster: Cluster, place: Path, missing: bool
) -> None:
    """With its directory missing the server is down, and nothing but the WAL has the rows: none is lost."""
    with cluster.connect("postgres") as connection:
        for number in range(1001, 1101):
            connection.execute(f"INSERT INTO placed VALUES ({number})".encode())
    before = settled(cluster, place)
    if missing:
        cluster.crash("postgres")
        shutil.rmtree(place)
        before = {}
    plan = full_restore.fn(NAME, method="cluster")
    assert plan.status is Status.PLANNED, plan.sentence()
    assert named(plan, place)
    assert ("missing" in findings(plan)["tablespaces made since the base backup"]) == missing
    report = full_restore.fn(NAME, method="cluster", confirm=NAME)
    assert report.status is Status.WARN, report.sentence()
    assert rows(cluster) == (1100, 1100)
    moved = located(cluster)
    assert moved.parent == cluster.node("postgres").data.parent
    assert str(moved) in findings(report)["tablespaces of the restored cluster"]
    assert content(place) == before

    # The WAL in the archive still has the path: a later recovery on the new timeline makes a directory again.
    cluster.sql("postgres", "INSERT INTO placed VALUES (1101)")
    again = restore_to_point.fn(NAME, by="latest", confirm=NAME)
    assert again.status is Status.WARN, again.sentence()
    assert named(again, place)
    assert rows(cluster) == (1101, 1101)
    assert located(cluster) not in (moved, place)


def test_a_kept_data_directory_that_shares_a_tablespace_with_the_live_one_is_not_started(
    cluster: Cluster, place: Path
) -> None:
    """Its crash recovery would write into live files."""
    live = cluster.node("postgres").data
    kept = live.with_name(f"{live.name}.superseded_20260101_000000")
    shutil.copytree(live / "pg_tblspc", kept / "pg_tblspc", symlinks=True)
    with pytest.raises(OpsError, match=f"use the same directory of a tablespace: {place}"):
        salvage_writes.fn(NAME, source=str(kept))
