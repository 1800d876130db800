"""An exported snapshot of a database, for several sessions.

The tables are locked before the snapshot is taken: after a TRUNCATE in between, dump and manifest would agree on an
empty table. Reads in that session use savepoints that are rolled back, which releases the locks of indexes and TOAST
tables.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

import psycopg
from psycopg import sql

from blocks.postgres.server import Connection, Postgres, execute
from runbook.errors import OpsError
from runbook.kinds import probe
from runbook.log import logger
from tasks.postgres.content.pinned_session import pin
from tasks.postgres.content.sums import TableSums

ATTEMPTS = 10
_NO_WAIT = "SET lock_timeout = '500ms'"
_ALONE = "SET max_parallel_workers_per_gather = 0"
BATCH = 500
_Table = tuple[int, str, str]


@contextmanager
def exported_snapshot(postgres: Postgres) -> Iterator[tuple[Connection, str, datetime]]:
    """A pinned session with a lock on every table against changes of its definition, its snapshot's name and time.

    Raises:
        OpsError: another session has locked a table, tables are created and dropped all the time, or the server has not
            enough locks.
    """
    for attempt in range(ATTEMPTS):
        with postgres.connect(postgres.database) as connection, postgres.connect(postgres.database) as lister:
            pin(connection)
            pin(lister)
            execute(connection, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            try:
                _lock_all(connection, lister)
                row = execute(connection, "SELECT pg_export_snapshot(), clock_timestamp()")[0]
                held = {int(oid) for (oid,) in execute(connection, _HELD)}
                changed = not {oid for oid, _, _ in _lockable(connection)} <= held
            except psycopg.errors.LockNotAvailable:
                raise OpsError(
                    "another session has locked a table for more than a minute",
                    "find an ALTER TABLE or a long transaction in pg_stat_activity, end it, then run this again",
                ) from None
            except psycopg.errors.OutOfMemory:
                raise too_many_tables(postgres) from None
            if not changed:
                yield connection, str(row[0]), row[1].astimezone(UTC)
                return
        logger().info("tables were created or dropped while they were locked (attempt %d): again", attempt + 1)
    hint = "stop the migrations, then run this again"
    raise OpsError("tables are created and dropped all the time, so no snapshot could be taken", hint)


class SecondSession:
    """A session in the same snapshot that reads sums as well, from the moment at which `start` is called: it is for
    the time after pg_dump, whose sessions need the processors until then.

    It is only a help: if it cannot start, or if a lock that somebody waits for stops it, the first session reads the
    rest. `lower` is called with its process.
    """

    def __init__(self, postgres: Postgres, snapshot: str, lower: Callable[[int], None]) -> None:
        self._postgres, self._snapshot, self._lower = postgres, snapshot, lower
        self._changed, self._ended = threading.Event(), False

    def start(self, *_: object) -> None:
        """Read from now on."""
        self._changed.set()

    @contextmanager
    def beside(self, sums: TableSums) -> Iterator[None]:
        """While the block reads the sums. Raises nothing."""
        with ThreadPoolExecutor(1) as pool:
            pool.submit(self._read, sums)
            try:
                yield
            except BaseException:
                sums.stop()
                raise
            finally:
                self._ended = True
                self._changed.set()

    def _read(self, sums: TableSums) -> None:
        self._changed.wait()
        if self._ended:
            return
        try:
            with self._postgres.connect(self._postgres.database) as connection:
                self._lower(connection.info.backend_pid)
                pin(connection)
                execute(connection, _NO_WAIT)  # whoever waits for a lock waits for the first session, which waits here
                execute(connection, _ALONE)  # parallel workers would keep the application's priority
                execute(connection, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
                connection.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(self._snapshot))
                sums.read(connection)
        except (OpsError, psycopg.Error) as error:
            logger().debug("the second session ended: %s", error)


def _lock_all(connection: Connection, lister: Connection) -> None:
    """Lock every table before the snapshot is taken, so `connection` must not have read anything.

    A table dropped meanwhile is ignored; one created meanwhile is locked too.
    """
    locked = set[_Table]()
    for _ in range(ATTEMPTS):
        new = [one for one in _lockable(lister) if one not in locked]
        if not new:
            return
        for start in range(0, len(new), BATCH):
            locked |= _lock(connection, new[start : start + BATCH])


def _lock(connection: Connection, tables: list[_Table]) -> set[_Table]:
    """Lock tables at once, or one by one if one of them was dropped; returns the locked ones."""
    names = sql.SQL(", ").join(sql.SQL("ONLY {}").format(sql.Identifier(*table[1:])) for table in tables)
    try:
        with connection.transaction():
            connection.execute(sql.SQL("LOCK TABLE {} IN ACCESS SHARE MODE").format(names))
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName, psycopg.errors.WrongObjectType):
        return set[_Table]().union(*(_lock(connection, [one]) for one in tables)) if len(tables) > 1 else set()
    return set(tables)


_HELD = """
SELECT relation::bigint FROM pg_locks WHERE pid = pg_backend_pid() AND mode = 'AccessShareLock' AND relation IS NOT NULL
"""


_LOCKABLE = """
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p') AND c.relpersistence <> 't' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
"""


def _lockable(connection: Connection) -> list[_Table]:
    rows = execute(connection, "SELECT c.oid::bigint, n.nspname, c.relname" + _LOCKABLE + "ORDER BY 2, 3")
    return [(int(oid), str(schema), str(table)) for oid, schema, table in rows]


@dataclass(frozen=True)
class LockLimit:
    """The size of the server's shared lock table, and the number of a database's tables: a dump locks each.

    `per`: max_locks_per_transaction.
    """

    tables: int
    per: int
    processes: int

    @property
    def locks(self) -> int:
        """The approximate number of locks; spare shared memory allows a few more."""
        return self.per * self.processes

    @property
    def text(self) -> str:
        """The limit as text."""
        setting = f"max_locks_per_transaction = {self.per}"
        return f"{setting} with {self.processes} processes allows about {self.locks:,} locks"

    @property
    def remedy(self) -> str:
        """The setting that allows twice the tables."""
        wanted = max(2 * self.per, -(-2 * self.tables // self.processes))
        setting = f"ALTER SYSTEM SET max_locks_per_transaction = {wanted}"
        return f"{setting} (on the standby first), restart PostgreSQL, then run this again"


@probe
def read_lock_limit(postgres: Postgres, database: str) -> LockLimit:
    """The server's number of locks, and the database's number of tables."""
    with postgres.connect(database) as connection:
        per, processes = (int(value) for value in execute(connection, _LOCKS)[0])
        # Counted by the server: names of a database in SQL_ASCII cannot be read without pinned settings.
        tables = int(execute(connection, "SELECT count(*)" + _LOCKABLE)[0][0])
        return LockLimit(tables, per, processes)


def too_many_tables(postgres: Postgres) -> OpsError:
    """The error that the server has not enough locks for a dump, with the setting to change."""
    limit = read_lock_limit.work(postgres, postgres.database)
    return OpsError(
        f"the server's lock table is full: a dump locks each of the database's {limit.tables:,} tables; {limit.text}",
        limit.remedy,
    )


# https://www.postgresql.org/docs/current/runtime-config-locks.html: the table is shared by all processes.
_LOCKS = """
SELECT current_setting('max_locks_per_transaction')::int,
       current_setting('max_connections')::int + current_setting('max_prepared_transactions')::int
       + current_setting('max_wal_senders')::int + current_setting('max_worker_processes')::int
       + coalesce(current_setting('autovacuum_worker_slots', true), current_setting('autovacuum_max_workers'))::int
"""
