"""DROP DATABASE under a client on a real cluster: a recovery stops before its first trace, and keeps every write."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import psycopg
import pytest

from flows.database.base_backup import backup_cluster
from flows.recovery.full_restore import full_restore
from flows.recovery.point.restore import restore_to_point
from runbook.errors import RunbookFailed
from runbook.report import Status
from runbook.wait import until
from tasks.wal.format.names import lsn_text
from tasks.wal.reading.local import find_segments
from tasks.wal.reading.waldump import Commit, commits_in
from tests.fixtures.postgres.clusters import DATABASE, NAME, Cluster
from tests.fixtures.postgres.writes import Writes
from tests.fixtures.reports import values as findings

INVALID = f"SELECT datconnlimit = -2 FROM pg_database WHERE datname = '{DATABASE}'"


@pytest.fixture(autouse=True)
def no_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recovery needs no Prefect server."""
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")


@dataclass
class Dropped:
    """A cluster without its application's database: what its client was told, and the transaction that dropped it."""

    cluster: Cluster
    writes: Writes
    drop: Commit

    def lost(self) -> set[int]:
        return self.writes.lost(self.cluster.sql("postgres", "SELECT id FROM writes"))


def admin(cluster: Cluster, statement: str) -> list[tuple[object, ...]]:
    return cluster.sql("postgres", statement, database="postgres")


def drop(cluster: Cluster) -> None:
    """Under its clients, who connect again: PostgreSQL waits 5 s for the end of their sessions, and gives up."""

    def dropped() -> bool:
        with contextlib.suppress(psycopg.errors.ObjectInUse):
            admin(cluster, f"DROP DATABASE IF EXISTS {DATABASE} WITH (FORCE)")
            return True
        return False

    until(dropped, what="the drop of the database", seconds=120)


def commits(cluster: Cluster) -> list[Commit]:
    files = [(one.segment, one.path) for one in find_segments(cluster.node("postgres").data / "pg_wal")]
    return commits_in(cluster.environment.postgres, files, lambda _: None)


@contextlib.contextmanager
def written(cluster: Cluster, *, owned_by_postgres: bool) -> Iterator[Writes]:
    """A base backup, and a client that writes. Without a role of its own the database has no row in pg_shdepend: the
    drop then leaves its first trace before its transaction has an ID."""
    if owned_by_postgres:
        cluster.sql("postgres", f"ALTER DATABASE {DATABASE} OWNER TO postgres")
        cluster.sql("postgres", f"REVOKE ALL ON DATABASE {DATABASE} FROM grc_user")
        cluster.sql("postgres", f"GRANT CONNECT ON DATABASE {DATABASE} TO PUBLIC")
    backup_cluster.fn(NAME)
    with cluster.writing() as writes:
        writes.wait(20)
        yield writes


@pytest.fixture(params=[False, True], ids=["role", "postgres"])
def dropped(cluster: Cluster, request: pytest.FixtureRequest) -> Dropped:
    """As in a quiet system whose archive_timeout switches segments, which then end in zeros."""
    with written(cluster, owned_by_postgres=request.param) as writes:
        for _ in range(6):
            admin(cluster, "SELECT pg_switch_wal()")
            writes.wait(3)
        writes.wait(200)  # so that the drop lies further on in its segment than the WAL of the others reaches
        drop(cluster)
    return Dropped(cluster, writes, commits(cluster)[-1])


def test_a_restore_of_the_system_loses_nothing_after_switched_segments(dropped: Dropped) -> None:
    plan = full_restore.fn(NAME)
    assert "; 0 commits of grc_db are lost as of" in plan.headline
    done = full_restore.fn(NAME, confirm=NAME)
    assert done.status is Status.WARN, done.sentence()
    assert not [name for name in findings(done) if name.startswith("not used: base_")], findings(done)
    assert dropped.lost() == set()


@pytest.mark.parametrize("by", ["before_transaction", "time", "lsn"])
def test_a_point_in_a_drop_is_the_one_before_its_first_trace(dropped: Dropped, by: str) -> None:
    drop = dropped.drop
    assert drop.dropped
    target = {"before_transaction": drop.xid, "time": drop.at.isoformat(), "lsn": lsn_text(drop.lsn)}
    if by == "time":
        target["time"] = max(one.at for one in commits(dropped.cluster) if one.at < drop.at).isoformat()
    done = restore_to_point.fn(NAME, by=by, target=str(target[by]), confirm=NAME)  # type: ignore[arg-type]
    assert findings(done)["databases of the copy"] == ""
    assert dropped.lost() == set()


def checkpointer_of(cluster: Cluster) -> psutil.Process:
    """Sessions end meanwhile."""
    for process in psutil.Process(cluster.supervisor.services()["postgresql"].pid).children():
        with contextlib.suppress(psutil.Error):
            if "checkpointer" in " ".join(process.cmdline()):
                return process
    raise AssertionError("the server has no checkpointer")


@contextlib.contextmanager
def waiting_drop(cluster: Cluster) -> Iterator[int]:
    """A DROP DATABASE that has marked the database, and waits for a checkpoint while the block runs. Gives its
    backend."""
    checkpointer = checkpointer_of(cluster)
    checkpointer.suspend()
    try:
        with cluster.connect("postgres", "postgres") as connection:
            pid = connection.info.backend_pid

            def run() -> None:
                with contextlib.suppress(psycopg.errors.QueryCanceled):
                    connection.execute(f"DROP DATABASE {DATABASE} WITH (FORCE)".encode())

            dropping = threading.Thread(target=run)
            dropping.start()
            until(lambda: admin(cluster, INVALID) == [(True,)], what="the mark", seconds=120)
            yield pid
            checkpointer.resume()
            dropping.join()
    finally:
        checkpointer.resume()


def test_a_point_that_must_include_a_commit_inside_of_a_drop_is_refused_by_the_copy(cluster: Cluster) -> None:
    with written(cluster, owned_by_postgres=True) as writes:
        pass
    admin(cluster, "CREATE TABLE elsewhere (id int)")
    with waiting_drop(cluster):
        admin(cluster, "INSERT INTO elsewhere VALUES (1)")
    inside, drop = commits(cluster)[-2:]
    assert drop.dropped
    with pytest.raises(RunbookFailed, match="databases of the copy: invalid: grc_db") as refused:
        restore_to_point.fn(NAME, by="transaction", target=str(inside.xid), confirm=NAME)
    assert f"by=before_transaction target={drop.xid}" in str(refused.value)
    plan = restore_to_point.fn(NAME, by="before_transaction", target=str(drop.xid))
    assert plan.facts["transactions after the target"] == "2"
    done = full_restore.fn(NAME, confirm=NAME)
    assert "1 commit in" in findings(done)["data destroyed by a statement"]
    assert writes.lost(cluster.sql("postgres", "SELECT id FROM writes")) == set()


@pytest.mark.parametrize("repeated", [False, True], ids=["once", "repeated"])
def test_an_interrupted_drop_is_undone_and_every_write_kept(cluster: Cluster, repeated: bool) -> None:
    """Ctrl-C in psql, too late: nobody can connect to the database any more. A second DROP DATABASE marks it again."""
    with written(cluster, owned_by_postgres=True) as writes:
        admin(cluster, "CHECKPOINT")
        cluster.sql("postgres", "VACUUM FREEZE")  # which updates the database's row in place, too
        writes.wait(20)
    with waiting_drop(cluster) as pid:
        admin(cluster, f"SELECT pg_cancel_backend({pid})")
    assert admin(cluster, INVALID) == [(True,)]
    admin(cluster, "CREATE TABLE elsewhere ()")
    if repeated:
        drop(cluster)
    done = full_restore.fn(NAME, confirm=NAME)
    assert done.status is Status.WARN, done.sentence()
    assert findings(done)["databases of the copy"] == ""
    assert writes.lost(cluster.sql("postgres", "SELECT id FROM writes")) == set()
    assert admin(cluster, "SELECT to_regclass('elsewhere') IS NOT NULL") == [(True,)], "another database"


def test_a_target_without_the_database_is_refused_by_the_plan(cluster: Cluster) -> None:
    """It was dropped before the target and restored after it: the plan was green, and the run refused its copy."""
    with written(cluster, owned_by_postgres=False):
        pass
    drop(cluster)
    ((lsn,),) = admin(cluster, "SELECT pg_current_wal_flush_lsn()")
    admin(cluster, f"CREATE DATABASE {DATABASE}")
    admin(cluster, "CREATE TABLE after_it ()")
    with pytest.raises(RunbookFailed, match="application's database at the target") as refused:
        restore_to_point.fn(NAME, by="lsn", target=str(lsn))
    assert re.search(r"by=before_transaction target=\d+\), or one after it was restored", str(refused.value))
    ((after,),) = admin(cluster, "SELECT pg_current_wal_flush_lsn()")
    admin(cluster, "CREATE TABLE later ()")
    plan = restore_to_point.fn(NAME, by="lsn", target=str(after))
    assert findings(plan)["application's database at the target"].startswith(f"{DATABASE} was dropped by transaction")
