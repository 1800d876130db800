"""What a restore from a dump, or its undo, loses is counted from WAL when nobody can write any more."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from psycopg.conninfo import make_conninfo

from flows.database import restore_steps, tables
from flows.database import undo_restore as database_undo
from flows.database.backup import backup_database
from flows.database.gate import gate_of_backup
from flows.database.restore import restore_database
from flows.database.tables import restore_tables, undo_restore_tables
from flows.database.undo_restore import undo_restore
from runbook.errors import LossExceeded, RunbookFailed
from runbook.guard.effect import Effect
from runbook.guard.loss import Loss
from runbook.report import Report
from tasks.postgres.restore.superseded import find_superseded
from tasks.postgres.restore.swap import advisory_lock, exchange
from tasks.postgres.server.server import read_identity
from tasks.postgres.tables.swap import TableOrder
from tests.database.backup.test_backup import newest
from tests.database.conftest import NAME, Trial
from tests.fixtures.postgres.writes import TABLE, Writes, writing
from tests.fixtures.servers import ADMIN, ADMIN_PASSWORD


@pytest.fixture
def ledger(trial: Trial) -> Trial:
    """A backup without rows in `writes`; two are committed after it, one of which began before."""
    trial.sql(TABLE)
    with trial.server.connect(trial.database) as early, early.transaction():
        early.execute("INSERT INTO writes (id) VALUES (-1)")
        backup_database.fn(NAME)
    trial.sql("INSERT INTO writes (id) VALUES (-2)")
    return trial


@contextlib.contextmanager
def client(trial: Trial) -> Iterator[Writes]:
    dsn = {"host": "127.0.0.1", "port": trial.server.port, "user": ADMIN, "password": ADMIN_PASSWORD}
    with writing(make_conninfo(**dsn, dbname=trial.database), 2) as writes:
        writes.wait(20)
        yield writes


def rows(trial: Trial, database: str = "", table: str = "writes") -> set[Any]:
    return {row[0] for row in trial.sql(f"SELECT id FROM {table}", database=database)}


def kept(trial: Trial) -> str:
    return find_superseded(trial.environment.postgres)[0].name


def test_every_commit_until_the_swap_is_counted(ledger: Trial) -> None:
    """A client writes before the plan, after it, and until its session is ended."""
    with client(ledger) as writes:
        plan = restore_database.fn(NAME)
        assert " commits as of " in plan.headline, plan.headline
        report = restore_database.fn(NAME, confirm=NAME)
        writes.wait(5)
    loss, lost = report.losses[ledger.database], rows(ledger, kept(ledger))
    assert {-1, -2} < lost
    assert loss.count == len(lost), loss
    assert loss.since == newest(ledger).manifest.taken
    assert writes.lost([(number,) for number in rows(ledger) | lost]) == set()
    assert f"is lost: {len(lost):,} commits" in report.facts["lost"]


def test_commits_that_did_not_wait_for_their_wal_are_counted(ledger: Trial) -> None:
    with ledger.server.connect(ledger.database) as connection:
        connection.execute("SET synchronous_commit = off")
        swapping = restore_steps.swapping

        @contextlib.contextmanager
        def late(report: Report) -> Iterator[None]:
            for number in range(100):
                connection.execute("INSERT INTO writes (id) VALUES (%s)", [number])
            with swapping(report):
                yield

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(restore_steps, "swapping", late)
            report = restore_database.fn(NAME, confirm=NAME)
    assert report.losses[ledger.database].count == 102


def test_without_the_wal_since_the_backup_only_its_time_is_known(ledger: Trial) -> None:
    """Nothing archives it, and the server has used its segments again."""
    for _ in range(2):
        ledger.sql("INSERT INTO notes VALUES (1); SELECT pg_switch_wal()")
        ledger.sql("CHECKPOINT")
    loss = restore_database.fn(NAME, confirm=NAME).losses[ledger.database]
    assert (loss.count, loss.since) == (None, newest(ledger).manifest.taken)


def test_a_restored_database_lacks_what_it_wrote_since_its_own_swap(ledger: Trial) -> None:
    """The commits that filled the copy are later than the backup too, and none of a client."""
    restore_database.fn(NAME, confirm=NAME)
    ledger.sql("INSERT INTO writes (id) VALUES (5)")
    report = restore_database.fn(NAME, confirm=NAME)
    assert report.losses[ledger.database].count == 1
    undo_restore.fn(NAME, confirm=NAME)
    ledger.sql("INSERT INTO writes (id) VALUES (6)")
    report = restore_database.fn(NAME, confirm=NAME)
    assert report.losses[ledger.database].count is None, (
        "nothing says when the one that an undo gave back was first live"
    )


def test_a_copy_older_than_the_confirmed_one_is_not_swapped_in(ledger: Trial) -> None:
    """The plan said what is lost since a newer backup."""
    env, older = ledger.environment, newest(ledger)
    backup_database.fn(NAME)
    live = read_identity(env.postgres, ledger.database)
    report = Report("Restore database", NAME)
    gate = gate_of_backup(report, env, older, live.oid)
    report.effect = Effect("", "", (Loss.everything_since(ledger.database, newest(ledger).manifest.taken, 0),))
    moves = [(ledger.database, f"{ledger.database}_aside", live.oid)]
    with advisory_lock(env.postgres) as guard, pytest.raises(LossExceeded, match=r"2 commits, but the plan said"):
        exchange(env.postgres, guard, moves, by="test", gate=gate.judge)
    assert ledger.oid() == live.oid
    assert rows(ledger) == {-1, -2}


def test_undo_counts_the_commits_since_the_swap(ledger: Trial) -> None:
    restore_database.fn(NAME, confirm=NAME)
    with client(ledger):
        plan = undo_restore.fn(NAME)
        assert " are lost (" in plan.headline, plan.headline
        assert "later writes are added" in plan.headline
        report = undo_restore.fn(NAME, confirm=NAME)
    loss = report.losses[ledger.database]
    assert (loss.count, loss.unit) == (len(rows(ledger, kept(ledger))), "commit")


def test_an_undo_that_can_no_longer_count_swaps_nothing(ledger: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan had counted one commit."""
    restore_database.fn(NAME, confirm=NAME)
    ledger.sql("INSERT INTO writes (id) VALUES (7)")
    oid, spool = ledger.oid(), ledger.store.parent / "spool"
    lock = database_undo.advisory_lock

    @contextlib.contextmanager
    def full_disk(*arguments: Any) -> Iterator[Any]:
        with lock(*arguments) as guard:
            shutil.rmtree(spool)
            spool.write_text("no directory any more")
            yield guard

    monkeypatch.setattr(database_undo, "advisory_lock", full_disk)
    with pytest.raises(RunbookFailed, match=r"unknown, because .*but the plan said: 1 commit of .* is lost"):
        undo_restore.fn(NAME, confirm=NAME)
    assert ledger.oid() == oid
    assert rows(ledger) == {7}


def test_only_the_commits_of_the_replaced_tables_are_counted(ledger: Trial) -> None:
    """One comes in after everything was judged, just before the tables are locked."""
    ledger.sql("INSERT INTO notes VALUES (1)")
    judge = tables.table_order

    def late(*arguments: Any) -> TableOrder:
        order = judge(*arguments)
        ledger.sql("INSERT INTO writes (id) VALUES (9)")
        return order

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "table_order", late)
        report = restore_tables.fn(NAME, tables=["writes"], confirm=NAME)
    assert report.losses["public.writes"].count == 3
    ledger.sql("INSERT INTO writes (id) VALUES (10)")
    ledger.sql("INSERT INTO notes VALUES (2)")
    plan = undo_restore_tables.fn(NAME)
    assert "are lost: 1 commit as of" in plan.headline, plan.headline
    undone = undo_restore_tables.fn(NAME, confirm=NAME)
    assert undone.losses["public.writes"].count == 1
    assert rows(ledger) == {-1, -2, 9}


def test_a_rewritten_table_is_not_counted(ledger: Trial) -> None:
    """WAL names files, and the earlier one of a table is not known."""
    ledger.sql("TRUNCATE writes")
    loss = restore_tables.fn(NAME, tables=["writes"], confirm=NAME).losses["public.writes"]
    assert (loss.count, loss.since) == (None, newest(ledger).manifest.taken)
