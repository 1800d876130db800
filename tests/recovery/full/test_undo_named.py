"""Each plan and report of a recovery names the undo that exists, and what is to be done now."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from flows.database.backup import backup_database
from flows.database.base_backup import backup_cluster
from flows.database.restore import restore_database
from flows.recovery.full_restore import full_restore
from flows.recovery.postgres.failover import postgres_failover
from flows.recovery.undo_full_restore import undo_full_restore
from runbook.errors import OpsError
from runbook.page.render import markdown
from runbook.report import Report
from tests.fixtures.postgres.clusters import NAME, Cluster
from tests.fixtures.reports import finding


@pytest.fixture(autouse=True)
def no_prefect(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A recovery needs no Prefect server."""
    monkeypatch.setenv("PREFECT_API_URL", "")
    return


def first_block(report: Report) -> str:
    """What the page says before its findings."""
    return markdown(report).partition("## Findings")[0]


def test_without_a_data_directory_there_is_no_undo_and_after_the_success_nobody_is_sent_to_the_standby(
    cluster: Cluster,
) -> None:
    cluster.sql("postgres", "CREATE TABLE t AS SELECT 1 AS id")
    backup_cluster.fn(NAME)
    cluster.crash("postgres")
    shutil.rmtree(cluster.node("postgres").data)
    plan = full_restore.fn(NAME)
    assert plan.headline.count("no undo: the data directory is missing, so nothing of PostgreSQL is kept") == 1
    assert "postgres-failover" in finding(plan, "standby").next_step, "before the change it is the better way"
    done = full_restore.fn(NAME, confirm=NAME)
    page = markdown(done)
    assert "postgres-failover" not in page
    assert "**do now:** take one now: until then a recovery starts from" in first_block(done)
    assert "**undo:** none: there was no live data" in first_block(done)

    again = full_restore.fn(NAME, method="cluster", confirm=NAME)
    (kept,) = cluster.node("postgres").data.parent.glob("data.superseded_*")
    assert f"undo-full-restore environment={NAME} kept={kept.name}" in first_block(again)
    cluster.sql("postgres", "SELECT pg_create_physical_replication_slot('consumer', true)")
    plan = undo_full_restore.fn(NAME)
    assert finding(plan, "replication slots").value == "consumer (physical)"
    assert all(one.name != "database in the kept cluster" for one in plan.findings)


def test_an_undo_says_that_the_kept_cluster_lacks_the_database(cluster: Cluster) -> None:
    cluster.sql("postgres", "CREATE TABLE t AS SELECT 1 AS id")
    backup_cluster.fn(NAME)
    cluster.sql("postgres", "DROP DATABASE grc_db WITH (FORCE)", database="postgres")
    full_restore.fn(NAME, method="cluster", confirm=NAME)
    plan = undo_full_restore.fn(NAME)
    assert finding(plan, "database in the kept cluster").value == "grc_db is missing in it"
    assert "the loss of grc_db is unknown, because the kept cluster does not have it" in plan.headline
    done = undo_full_restore.fn(NAME, confirm=NAME)
    assert done.losses["grc_db"].unknown
    assert cluster.sql("postgres", "SELECT FROM pg_database WHERE datname = 'grc_db'", database="postgres") == []


def test_a_dropped_database_leaves_nothing_to_undo_and_a_replaced_one_is_named(cluster: Cluster) -> None:
    cluster.sql("postgres", "CREATE TABLE t AS SELECT 1 AS id")
    backup_database.fn(NAME)
    assert "; undo: undo-restore" in restore_database.fn(NAME).headline
    done = restore_database.fn(NAME, confirm=NAME)
    ((kept,),) = cluster.sql("postgres", "SELECT datname FROM pg_database WHERE datname LIKE '%\\_\\_old\\_%'")
    assert f"undo-restore environment={NAME} kept={kept}" in first_block(done)
    cluster.sql("postgres", "DROP DATABASE grc_db WITH (FORCE)", database="postgres")
    for plan in (restore_database.fn(NAME), full_restore.fn(NAME, method="dump")):
        assert "no undo: grc_db is missing, so nothing of it is kept" in plan.headline
    done = restore_database.fn(NAME, confirm=NAME)
    assert "**undo:** none: there was no database before" in first_block(done)


def test_a_failover_names_the_way_back(cluster: Cluster) -> None:
    done = postgres_failover.fn(NAME, mode="planned", confirm=NAME)
    old = f"127.0.0.1:{cluster.node('postgres').port}"
    assert f"postgres-failover environment={NAME} mode=planned new_primary={old}" in first_block(done)


def test_an_undo_without_anything_kept_says_so(cluster: Cluster) -> None:
    with pytest.raises(OpsError, match="nothing is kept, so there is no undo"):
        undo_full_restore.fn(NAME)
    backup_database.fn(NAME)
    restore_database.fn(NAME, confirm=NAME)
    with pytest.raises(OpsError, match="undo-restore"):
        undo_full_restore.fn(NAME)
