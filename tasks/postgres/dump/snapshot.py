"""A snapshot of a database that other sessions can read in.

The tables are locked before the snapshot is taken: a TRUNCATE between the two would leave dump and manifest agreeing
on an empty table. Nothing else stays locked: who reads in that session does so in savepoints that are rolled back, and
the locks of indexes and TOAST tables end with them.
"""

from __future__ import annotations

from collections.abc import Iterator
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

ATTEMPTS = 10
BATCH = 500
_Table = tuple[int, str, str]


@contextmanager
def exported_snapshot(postgres: Postgres) -> Iterator[tuple[Connection, str, datetime]]:
    """A pinned session that has every table locked against changes of definition, its snapshot's name, and its time.

    Raises:
        OpsError: a table is locked by somebody else, tables keep coming and going, or the server cannot hold a lock for
            each of them.
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
                    "a table is locked by somebody else for more than a minute",
                    "look for an ALTER TABLE or a long transaction in pg_stat_activity, end it, and try again",
                ) from None
            except psycopg.errors.OutOfMemory:
                raise too_many_tables(postgres) from None
            if not changed:
                yield connection, str(row[0]), row[1].astimezone(UTC)
                return
        logger().info("tables came or went while they were being locked (attempt %d): again", attempt + 1)
    raise OpsError("tables keep coming and going, so no snapshot could be taken", "stop the migrations, then try again")


def _lock_all(connection: Connection, lister: Connection) -> None:
    """Lock every table before the snapshot is taken, so `connection` must not read anything yet. One that is dropped
    meanwhile is none of them; one that is made meanwhile is locked too."""
    locked = set[_Table]()
    for _ in range(ATTEMPTS):
        new = [one for one in _lockable(lister) if one not in locked]
        if not new:
            return
        for start in range(0, len(new), BATCH):
            locked |= _lock(connection, new[start : start + BATCH])


def _lock(connection: Connection, tables: list[_Table]) -> set[_Table]:
    """Those that are locked now; of several one by one, where one of them was dropped."""
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
class LockRoom:
    """The table of locks that all processes of a server share, and the tables of a database: a dump locks each of them.
    `per`: max_locks_per_transaction."""

    tables: int
    per: int
    processes: int

    @property
    def locks(self) -> int:
        """For about so many objects there is room. (What is left of shared memory makes it a little more.)"""
        return self.per * self.processes

    @property
    def text(self) -> str:
        """For people."""
        setting = f"max_locks_per_transaction = {self.per}"
        return f"{setting} with {self.processes} processes makes room for about {self.locks:,}"

    @property
    def remedy(self) -> str:
        """How there will be room for twice the tables."""
        wanted = max(2 * self.per, -(-2 * self.tables // self.processes))
        setting = f"ALTER SYSTEM SET max_locks_per_transaction = {wanted}"
        return f"{setting} (on the standby first), restart PostgreSQL, and launch this again"


@probe
def read_lock_room(postgres: Postgres, database: str) -> LockRoom:
    """How many locks the server has room for, and how many tables a database has."""
    with postgres.connect(database) as connection:
        per, processes = (int(value) for value in execute(connection, _LOCKS)[0])
        # Counted by the server: names of a database in SQL_ASCII cannot be read without pinned settings.
        tables = int(execute(connection, "SELECT count(*)" + _LOCKABLE)[0][0])
        return LockRoom(tables, per, processes)


def too_many_tables(postgres: Postgres) -> OpsError:
    """That the server has no room for the locks of a dump, and the setting with which it would."""
    room = read_lock_room.work(postgres, postgres.database)
    return OpsError(
        f"the server's table of locks is full: the database has {room.tables:,} tables, a dump locks each of them, and "
        f"{room.text}",
        room.remedy,
    )


# https://www.postgresql.org/docs/current/runtime-config-locks.html: the table is shared by all processes.
_LOCKS = """
SELECT current_setting('max_locks_per_transaction')::int,
       current_setting('max_connections')::int + current_setting('max_prepared_transactions')::int
       + current_setting('max_wal_senders')::int + current_setting('max_worker_processes')::int
       + coalesce(current_setting('autovacuum_worker_slots', true), current_setting('autovacuum_max_workers'))::int
"""
