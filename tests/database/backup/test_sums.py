"""The rows of a database read in parts, by two sessions in one snapshot: the same sums as by one."""

from __future__ import annotations

import threading

import pytest

from blocks.postgres.server import Connection, execute
from runbook.wait import until
from tasks.postgres.content import sums
from tasks.postgres.content.sums import TableSums
from tasks.postgres.dump.snapshot import SecondSession, exported_snapshot
from tests.database.conftest import Trial

FILL = """
CREATE TABLE wide (number int, words text);
INSERT INTO wide SELECT n, repeat('面接', n % 50) FROM generate_series(1, 20000) AS n;
DELETE FROM wide WHERE number % 3 = 0;
CREATE TABLE empty (number int);
CREATE TABLE leaf (number int) PARTITION BY HASH (number);
CREATE TABLE leaf_0 PARTITION OF leaf FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE leaf_1 PARTITION OF leaf FOR VALUES WITH (MODULUS 2, REMAINDER 1);
INSERT INTO leaf SELECT generate_series(1, 5000);
CREATE TABLE parent (number int);
CREATE TABLE child () INHERITS (parent);
INSERT INTO child SELECT generate_series(1, 3000);
"""


@pytest.fixture
def filled(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> Trial:
    """Tables of many parts: a part has two pages."""
    monkeypatch.setattr(sums, "PART_PAGES", 2)
    with trial.server.connect(trial.database) as connection:
        connection.execute(FILL)
    return trial


def test_parts_add_up_to_what_one_session_reads(filled: Trial) -> None:
    postgres, lowered = filled.environment.postgres, list[int]()
    with exported_snapshot(postgres) as (exporter, snapshot, _):
        with filled.server.connect(filled.database) as others:
            others.execute("INSERT INTO wide SELECT generate_series(1, 500)")  # not in the snapshot
            others.execute("VACUUM wide")
        whole = TableSums.of(exporter, None)
        whole.read(exporter)
        second = SecondSession(postgres, snapshot, lowered.append)
        shared = TableSums.of(exporter, None, in_parts=True)
        parts = len(shared._waiting)
        second.start()
        with second.beside(shared):
            until(lambda: len(shared._waiting) < parts, what="a part read by the second session", seconds=20)
            shared.read(exporter)
        assert parts > 100
        assert len(lowered) == 1, "it has a lower priority from its start"
        assert list(shared.found.items()) == list(whole.found.items())
        assert whole.found["public.wide"].rows == 13334
        (rows,) = execute(exporter, "SELECT sum(rows) FROM (SELECT count(*) AS rows FROM public.leaf) AS counted")
        assert whole.found["public.leaf"].rows == rows[0]
        assert (whole.found["public.parent"].rows, whole.found["public.child"].rows) == (0, 3000)


def test_who_waits_for_a_lock_on_a_table_does_not_hang_the_dump(filled: Trial) -> None:
    """ALTER TABLE waits for the first session, and later sessions wait behind it."""
    postgres = filled.environment.postgres
    with (
        exported_snapshot(postgres) as (exporter, snapshot, _),
        filled.server.connect(filled.database) as altering,
        filled.server.connect(filled.database) as watching,
    ):
        whole = TableSums.of(exporter, None)
        whole.read(exporter)
        waiting = threading.Thread(target=altering.execute, args=["ALTER TABLE wide ADD COLUMN more int"])
        waiting.start()
        lock = "SELECT count(*) FROM pg_locks WHERE NOT granted AND pid = %s"
        pid = altering.info.backend_pid
        until(lambda: watching.execute(lock, [pid]).fetchone() == (1,), what="the ALTER TABLE to wait", seconds=20)
        shared = TableSums.of(exporter, None, in_parts=True)
        second = SecondSession(postgres, snapshot, lambda _: None)
        second.start()
        with second.beside(shared):
            pass  # the second session alone: it gives up at the locked table
        left = len(shared._waiting)
        shared.read(exporter)
        exporter.execute("ROLLBACK")
        waiting.join()
    assert left, "what it could not read is left for the first"
    assert shared.found == whole.found


def test_a_second_session_is_not_needed(filled: Trial) -> None:
    """It is never started, or there is no connection left for it."""
    postgres = filled.environment.postgres
    with exported_snapshot(postgres) as (exporter, snapshot, _):
        whole = TableSums.of(exporter, None)
        whole.read(exporter)
        for name in (snapshot, "00000000-00000000-1"):
            shared = TableSums.of(exporter, None, in_parts=True)
            second = SecondSession(postgres, name, lambda _: None)
            if name != snapshot:
                second.start()
            with second.beside(shared):
                shared.read(exporter)
            assert shared.found == whole.found


def test_the_second_session_is_one_process(filled: Trial) -> None:
    """The server's parallel workers would keep the priority of the application."""
    postgres, seen = filled.environment.postgres, list[object]()

    class Settings(TableSums):
        def read(self, connection: Connection) -> None:
            seen.extend(execute(connection, "SHOW max_parallel_workers_per_gather")[0])

    filled.sql(f"ALTER DATABASE {filled.database} SET max_parallel_workers_per_gather = 2")
    with exported_snapshot(postgres) as (exporter, snapshot, _):
        assert execute(exporter, "SHOW max_parallel_workers_per_gather") == [("2",)]
        second = SecondSession(postgres, snapshot, lambda _: None)
        with second.beside(Settings.of(exporter, None, in_parts=True)):
            second.start()
            until(lambda: seen, what="the second session", seconds=20)
    assert seen == ["0"]
