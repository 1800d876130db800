"""The newest acknowledged commits are in the archive when a recovery to `latest` reads it, or the plan says that its
loss is unknown."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.database.base_backup import backup_cluster
from flows.recovery.point import choice
from flows.recovery.point.restore import restore_to_point
from runbook.errors import OpsError
from runbook.wait import until
from tasks.wal.archive import ship
from tests.fixtures.postgres.clusters import NAME, Cluster
from tests.fixtures.reports import values as findings
from tests.fixtures.stand_in import replace_step

COUNT = "SELECT count(*) FROM accounts"


@pytest.fixture(autouse=True)
def no_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recovery needs no Prefect server."""
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")


@pytest.fixture
def rows(cluster: Cluster) -> int:
    """Rows that were acknowledged after the base backup."""
    cluster.sql("postgres", "CREATE TABLE accounts (id serial)")
    backup_cluster.fn(NAME)
    for _ in range(10):
        cluster.sql("postgres", "INSERT INTO accounts DEFAULT VALUES")
    return 10


def test_a_segment_that_the_receiver_finishes_while_it_is_shipped_is_shipped(
    cluster: Cluster, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed, first = ship._files, [True]

    def outdated(directory: Path) -> list[Path]:
        found = listed(directory)
        if directory == cluster.wal and first:
            first.clear()
            (partial,) = [path for path in found if path.suffix == ".partial"]
            cluster.sql("postgres", "SELECT pg_switch_wal()")
            until(lambda: not partial.exists(), what="the end of the segment", seconds=120)
        return found

    monkeypatch.setattr(ship, "_files", outdated)
    restore_to_point.fn(NAME, by="latest", confirm=NAME)
    assert cluster.sql("postgres", COUNT) == [(rows,)]


def test_a_loss_is_unknown_where_the_archive_ends_before_what_the_primary_acknowledged(
    cluster: Cluster, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OpsError("No space left on device", "free disk space")

    whole = restore_to_point.fn(NAME, by="latest")
    assert "nothing is lost" in whole.headline
    cluster.sql("postgres", "INSERT INTO accounts SELECT FROM generate_series(1, 1000)")
    replace_step(monkeypatch, choice, "ship_now", full)
    plan = restore_to_point.fn(NAME, by="latest", mode="tables", tables=["accounts"])
    assert "is unknown, because the archived WAL ends at" in plan.headline
    assert "the archived WAL ends at" in findings(restore_to_point.fn(NAME, by="latest"))["WAL up to the newest commit"]
    with pytest.raises(OpsError, match="1 commit of grc_db is lost .* but the plan said: nothing is lost"):
        restore_to_point.fn(NAME, by="latest", confirm=NAME)
    assert cluster.sql("postgres", COUNT) == [(rows + 1000,)]
