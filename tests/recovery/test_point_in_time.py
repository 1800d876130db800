"""Base backups and points in time, on a real cluster under a supervisor."""

from __future__ import annotations

import pytest

from flows.database.backup import verify_backup
from flows.database.base_backup import backup_cluster
from flows.recovery.point_in_time import restore_to_point
from runbook.report import Status
from tests.clusters import NAME, Cluster


@pytest.fixture(autouse=True)
def no_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recovery needs no Prefect server."""
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")


def test_a_base_backup_is_taken_verified_by_postgresql_and_restores(cluster: Cluster) -> None:
    cluster.sql(
        "postgres", "CREATE TABLE t AS SELECT g AS id, repeat('x', 100) AS body FROM generate_series(1, 5000) g"
    )
    report = backup_cluster.fn(NAME)
    print(report.sentence(), report.facts)
    name = report.facts["backup"]
    assert (cluster.root / "backups" / "cluster" / name / "base.tar.gz").is_file()
    proven = verify_backup.fn(NAME, kind="cluster")
    print(proven.sentence(), proven.facts, proven.evidence)
    assert proven.facts["backup"].startswith(name)


def bug(cluster: Cluster) -> int:
    """Rewrites every row; returns its transaction."""
    with cluster.connect("postgres") as connection:
        connection.execute("BEGIN")
        connection.execute("UPDATE accounts SET balance = 0")
        xid = connection.execute("SELECT pg_current_xact_id()::xid::text::bigint").fetchone()
        connection.execute("COMMIT")
    assert xid
    return int(xid[0])


def test_a_bug_is_undone_to_the_transaction_before_it_and_the_cluster_is_swapped(cluster: Cluster) -> None:
    cluster.sql("postgres", "CREATE TABLE accounts AS SELECT g AS id, g AS balance FROM generate_series(1, 100) g")
    name = backup_cluster.fn(NAME).facts["backup"]
    cluster.sql("postgres", "INSERT INTO accounts VALUES (101, 101)")
    xid = bug(cluster)
    cluster.sql("postgres", "INSERT INTO accounts VALUES (102, 102)")
    cluster.sql("postgres", "SELECT pg_switch_wal()")
    plan = restore_to_point.fn(NAME, by="before_transaction", target=str(xid))
    assert plan.status is Status.PLANNED
    print(plan.sentence(), plan.facts, plan.plan_steps)
    assert cluster.sql("postgres", "SELECT sum(balance) FROM accounts") == [(102,)], "a plan changes nothing"
    report = restore_to_point.fn(NAME, by="before_transaction", target=str(xid), confirm=NAME)
    print(report.sentence(), report.facts, report.evidence)
    print([(s.name, round(s.seconds, 1)) for s in sorted(report.steps, key=lambda s: s.started)])
    assert report.status is Status.WARN
    assert cluster.sql("postgres", "SELECT count(*), sum(balance) FROM accounts") == [(101, 5151)]
    assert cluster.streaming() == {"receiver"}
    with cluster.connect("postgres") as connection:
        connection.execute("INSERT INTO accounts VALUES (103, 103)")
    assert name
