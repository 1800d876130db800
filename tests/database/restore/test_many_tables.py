"""More tables than the server has room for the locks of: backed up, restored, one of them brought back alone."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from flows.database.backup import backup_database, verify_backup
from flows.database.restore import restore_database
from flows.database.tables import restore_tables
from runbook.errors import RunbookFailed
from runbook.report import Status
from tasks.backups.catalogue import open_all
from tasks.postgres.tables.scratch import drop_tables_scratch, open_schema
from tasks.stores.store import store_of
from tests.database.conftest import NAME, Trial, write_environment
from tests.fixtures.servers import ADMIN_PASSWORD, ROLE_PASSWORD, running_postgres

GOOD = (Status.OK, Status.WARN)
MANY = """
DO $$ BEGIN FOR i IN {first}..{last} LOOP
    EXECUTE format('CREATE TABLE t_%s (id {key})', i);
    IF i % 40 = 0 THEN COMMIT; END IF;
END LOOP; END $$
"""
FEW = """
CREATE TYPE mood AS ENUM ('sad', 'happy');
CREATE FUNCTION twice(int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT 2 * $1';
CREATE TABLE few (id serial PRIMARY KEY, mood mood, n int GENERATED ALWAYS AS (twice(1)) STORED, other t_1);
INSERT INTO few (mood) SELECT 'sad' FROM generate_series(1, 5);
CREATE TABLE parts (id int) PARTITION BY LIST (id);
CREATE TABLE part_1 PARTITION OF parts FOR VALUES IN (1);
CREATE TABLE part_2 PARTITION OF parts DEFAULT;
INSERT INTO parts VALUES (1), (2), (3);
"""


@pytest.fixture
def crowded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trial]:
    """A server with room for about 550 locks, and a database of 300 tables, with as many keys and sequences."""
    settings = ("max_connections=20", "max_locks_per_transaction=12", "max_wal_senders=2", "autovacuum=off")
    with crowd(tmp_path, monkeypatch, *settings, "max_worker_processes=2", "wal_level=replica") as trial:
        trial.sql(MANY.format(first=1, last=300, key="serial PRIMARY KEY"))
        trial.sql(FEW)
        yield trial


@contextlib.contextmanager
def crowd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *settings: str) -> Iterator[Trial]:
    """A server with these settings, and an empty database of it."""
    for name, value in {
        "OPS_ENVIRONMENT": NAME,
        "TRIAL_PASSWORD": ROLE_PASSWORD,
        "TRIAL_ADMIN_PASSWORD": ADMIN_PASSWORD,
    }.items():
        monkeypatch.setenv(name, value)
    with running_postgres(settings=settings) as server:
        monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(write_environment(server, "crowded", tmp_path)))
        server.create_database("crowded")
        yield Trial(server, "crowded", tmp_path / "backups" / "postgresql", tmp_path / "reports")


@pytest.fixture
def thousands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trial]:
    """5,000 tables with keys and sequences on a server with PostgreSQL's own numbers: 100 connections, 64 locks each."""
    with crowd(tmp_path, monkeypatch, "max_connections=100", "autovacuum=off") as trial:
        trial.sql(MANY.format(first=1, last=5000, key="serial PRIMARY KEY"))
        trial.sql(FEW)
        yield trial


@contextlib.contextmanager
def coming_and_going(trial: Trial) -> Iterator[list[int]]:
    """A table, a sequence and a view are made and dropped all the time."""
    stop, done = threading.Event(), list[int]()

    def work() -> None:
        with trial.server.connect(trial.database) as connection:
            connection.autocommit = True
            while not stop.wait(0.1):
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS passing (id serial); CREATE OR REPLACE VIEW seen AS SELECT 1 AS one"
                )
                stop.wait(0.1)
                # It may be the one that gives way to pg_dump's locks.
                with contextlib.suppress(psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
                    connection.execute("DROP VIEW seen; DROP TABLE passing")
                done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield done
    finally:
        stop.set()
        thread.join()


def test_more_tables_than_locks_are_backed_up_and_one_comes_back_alone(crowded: Trial) -> None:
    with coming_and_going(crowded) as done:
        report = backup_database.fn(NAME)
    assert report.status in GOOD
    assert next(one for one in report.findings if one.name.startswith("postgres.locks.dump_ratio")).status is Status.OK
    assert done
    before = crowded.sql("SELECT * FROM few ORDER BY id")
    crowded.sql("DELETE FROM few WHERE id > 2; DELETE FROM parts")
    assert restore_tables.fn(NAME, ["few", "public.parts"], confirm=NAME).status in GOOD
    assert crowded.sql("SELECT * FROM few ORDER BY id") == before
    assert crowded.sql("SELECT count(*) FROM parts") == [(3,)]
    postgres, (backup,) = (
        crowded.environment.postgres,
        open_all(store_of(crowded.environment, "postgres"), "postgres")[0],
    )
    for typed, tables in ((["few"], {"few", "t_1"}), (["parts"], {"parts", "part_1", "part_2"})):
        scratch = open_schema.work(postgres, backup, typed)
        made = {str(name) for (name,) in crowded.sql(TABLES, database=scratch.database)}
        assert made == tables, "no other table is made for it"
    assert open_schema.work(postgres, backup, ["no_such"]).seconds >= 0
    assert crowded.sql("SELECT count(*) > 300 FROM pg_class WHERE relkind = 'r'", database=scratch.database) == [
        (True,)
    ]
    drop_tables_scratch.work(postgres)
    assert backup_database.fn(NAME, kind="sql.gz").status in GOOD
    assert verify_backup.fn(NAME).status in GOOD, (
        "a script is run without one transaction, and a copy is read in batches"
    )
    crowded.sql(MANY.format(first=1001, last=2400, key="int"))
    with pytest.raises(RunbookFailed) as caught:
        backup_database.fn(NAME)
    locks = next(found for found in caught.value.report.findings if found.name.startswith("postgres.locks.dump_ratio"))
    assert locks.status is Status.WARN, "judged before the dump begins"
    assert "max_locks_per_transaction = 12" in locks.name
    assert "max_locks_per_transaction = 12" in str(caught.value)
    assert "ALTER SYSTEM SET max_locks_per_transaction" in str(caught.value)


TABLES = "SELECT relname FROM pg_class WHERE relkind IN ('r', 'p') AND relnamespace = 'public'::regnamespace"


@pytest.mark.soak
def test_5000_tables_on_a_server_with_default_settings(thousands: Trial, capsys: pytest.CaptureFixture[str]) -> None:
    """The figures are printed: what grows with the tables concerned, and what with all."""
    seconds = dict[str, float]()

    @contextlib.contextmanager
    def timed(what: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        seconds[what] = time.monotonic() - started
        with capsys.disabled():
            print(f"{what}: {seconds[what]:.1f} s", flush=True)

    with coming_and_going(thousands) as done:
        for number in range(5):
            with timed(f"backup {number + 1} while tables come and go"):
                assert backup_database.fn(NAME).status in GOOD
    assert done
    before = thousands.sql("SELECT * FROM few ORDER BY id")
    for table, lost in (("few", "DELETE FROM few WHERE id > 2"), ("t_7", "INSERT INTO t_7 DEFAULT VALUES")):
        thousands.sql(lost)
        with timed(f"restore-tables {table}"):
            assert restore_tables.fn(NAME, [table], confirm=NAME).status in GOOD
    assert thousands.sql("SELECT * FROM few ORDER BY id") == before
    with timed("backup sql.gz"):
        assert backup_database.fn(NAME, kind="sql.gz").status in GOOD
    with timed("verify-backup sql.gz"):
        assert verify_backup.fn(NAME).status in GOOD
    with timed("restore-database sql.gz"):
        assert restore_database.fn(NAME, confirm=NAME).status in GOOD
    assert seconds["restore-tables few"] < seconds["backup 1 while tables come and go"]
