"""What belongs to the server and does not come back with its databases is named before the cluster is replaced."""

from __future__ import annotations

import pytest

from flows.database.base_backup import backup_cluster
from flows.recovery.full_restore import full_restore
from flows.recovery.point.restore import restore_to_point
from runbook.errors import RunbookFailed
from runbook.report import Status
from tasks.cluster.replaced import ReplacedSlot, read_slots
from tasks.postgres.server.server import has_tables
from tests.fixtures.postgres.clusters import NAME, Cluster, Template, running_cluster
from tests.fixtures.reports import values as findings


@pytest.fixture(autouse=True)
def no_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recovery needs no Prefect server."""
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")


def test_slots_prepared_transactions_and_settings_are_named(
    cluster_template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_cluster(
        cluster_template, settings=("wal_level = logical", "max_prepared_transactions = 5")
    ) as cluster:
        for name, value in cluster.variables.items():
            monkeypatch.setenv(name, value)
        postgres = cluster.environment.postgres
        cluster.sql("postgres", "CREATE TABLE accounts (id int)")
        backup_cluster.fn(NAME)
        cluster.sql("postgres", "SELECT pg_create_logical_replication_slot('feed', 'pgoutput')")
        cluster.sql("postgres", "SELECT pg_create_physical_replication_slot('other', true)")
        cluster.sql("postgres", "BEGIN; INSERT INTO accounts VALUES (1); PREPARE TRANSACTION 'in doubt'")
        ((lsn,),) = cluster.sql("postgres", "SELECT pg_current_wal_insert_lsn()::text")
        cluster.sql("postgres", "ALTER DATABASE grc_db SET work_mem = '7MB'")
        slots = read_slots.work(postgres)
        assert {ReplacedSlot("feed", True), ReplacedSlot("other", False)} < set(slots)
        plan = restore_to_point.fn(NAME, by="lsn", target=lsn)
        assert plan.status is Status.PLANNED
        assert findings(plan)["replication slots"] == "feed (logical), other (physical)"
        report = restore_to_point.fn(NAME, by="lsn", target=lsn, confirm=NAME)
        told = findings(report)
        assert told["replication slots"] == "feed (logical), other (physical)"
        assert told["prepared transactions at the target"] == "in doubt"
        assert told["settings of databases and roles"] == "database grc_db work_mem=7MB (no longer set)"
        assert cluster.sql("postgres", "SELECT gid FROM pg_prepared_xacts") == [("in doubt",)]
        (kept,) = cluster.node("postgres").data.parent.glob("data.superseded_*")
        replaced = postgres.model_copy(update={"port": 1, "data_directory": str(kept)})
        assert read_slots.work(replaced) == slots, "by its files, where no server answers"


def test_a_database_postgres_with_tables_is_another_database(cluster: Cluster) -> None:
    postgres = cluster.environment.postgres
    backup_cluster.fn(NAME)
    assert not has_tables.work(postgres, "postgres"), "views of an extension do not count"
    assert full_restore.fn(NAME, method="cluster").status is Status.PLANNED
    cluster.sql("postgres", "CREATE TABLE jobs (id int)", database="postgres")
    with pytest.raises(RunbookFailed, match="other databases of the cluster: postgres"):
        full_restore.fn(NAME, method="cluster")
    assert full_restore.fn(NAME, method="cluster", databases=["postgres"]).status is Status.PLANNED
    plan = full_restore.fn(NAME)
    assert plan.facts["other databases, not changed"].startswith("postgres")
