"""Transactions that were prepared for a two-phase commit, and are in doubt at the target of a recovery."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flows.database.base_backup import backup_cluster
from flows.recovery.point.restore import restore_to_point
from runbook.errors import OpsError, RunbookFailed
from tests.fixtures.postgres.clusters import NAME, Cluster, Template, running_cluster
from tests.fixtures.reports import values as findings

IDS = "SELECT array_agg(id ORDER BY id) FROM accounts"


@pytest.fixture
def cluster(cluster_template: Template, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    with running_cluster(cluster_template, settings=["max_prepared_transactions = 4"]) as running:
        for name, value in {**running.variables, "PREFECT_API_URL": "http://127.0.0.1:9/api"}.items():
            monkeypatch.setenv(name, value)
        yield running


def test_one_in_doubt_at_the_target_is_named_and_older_base_backups_still_recover(cluster: Cluster) -> None:
    cluster.sql("postgres", "CREATE TABLE accounts (id int)")
    backup_cluster.fn(NAME)
    cluster.sql("postgres", "INSERT INTO accounts VALUES (1)")
    with cluster.connect("postgres") as connection:
        ((xid,),) = (
            connection.execute(b"BEGIN; INSERT INTO accounts VALUES (2); SELECT pg_current_xact_id()::text::int")
            .set_result(-1)
            .fetchall()
        )
        connection.execute(b"PREPARE TRANSACTION 'transfer'")
    cluster.sql("postgres", "INSERT INTO accounts VALUES (3)")
    cluster.sql("postgres", "COMMIT PREPARED 'transfer'")
    plan = restore_to_point.fn(NAME, by="before_transaction", target=str(xid))
    done = restore_to_point.fn(NAME, by="before_transaction", target=str(xid), confirm=NAME)
    assert cluster.sql("postgres", "SELECT gid FROM pg_prepared_xacts") == [("transfer",)]
    assert cluster.sql("postgres", IDS) == [([1, 3],)]
    for report in (plan, done):
        assert findings(report)["prepared transactions at the target"] == "transfer"
    again = restore_to_point.fn(NAME, by="latest")
    assert findings(again)["prepared transactions at the target"] == "transfer"
    cluster.sql("postgres", "ROLLBACK PREPARED 'transfer'")
    cluster.sql("postgres", "INSERT INTO accounts VALUES (4)")
    again = restore_to_point.fn(NAME, by="latest", confirm=NAME)
    assert "prepared transactions at the target" not in findings(again)
    assert cluster.sql("postgres", IDS) == [([1, 3, 4],)]


def test_tables_that_cannot_be_replaced_are_refused_in_the_plan(cluster: Cluster) -> None:
    """Before a copy is built for minutes."""
    cluster.sql("postgres", "CREATE TABLE accounts (id int); CREATE TABLE dropped (id int)")
    backup_cluster.fn(NAME)
    cluster.sql("postgres", "INSERT INTO accounts VALUES (1)")
    cluster.sql("postgres", "BEGIN; INSERT INTO accounts VALUES (2); PREPARE TRANSACTION 'transfer'")
    target = {"by": "latest", "mode": "tables"}
    with pytest.raises(RunbookFailed, match="prepared transaction transfer has locked rows of public.accounts"):
        restore_to_point.fn(NAME, **target, tables=["accounts"])
    cluster.sql("postgres", "ROLLBACK PREPARED 'transfer'")
    cluster.sql("postgres", "DROP TABLE dropped")
    with pytest.raises(OpsError, match="the live database has no such table: dropped"):
        restore_to_point.fn(NAME, **target, tables=["dropped"])
