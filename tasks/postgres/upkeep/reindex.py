"""REINDEX CONCURRENTLY, and the leftovers of failed ones.

A build that fails leaves an invalid index: `…_ccnew` (the new one) or `…_ccold` (the replaced one). But an index is
invalid *during* a live build too, and every live build holds SHARE UPDATE EXCLUSIVE on its table until it is done.
https://www.postgresql.org/docs/current/sql-reindex.html
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import psycopg
from psycopg import errors, sql

from blocks.postgres.server import Connection, Postgres, execute
from runbook.errors import OpsError, Unreachable
from runbook.guard.permit import Act
from runbook.kinds import action
from runbook.progress import WorkDone, progress
from runbook.wait import until
from tasks.postgres.upkeep.indexes import BUILDS, Index, read
from tasks.postgres.upkeep.session import as_ops_error, done_of, upkeep_session

REBUILD = "rebuild index"
DROP_LEFTOVER = "drop leftover index"
ATTEMPTS = 3


@dataclass(frozen=True)
class Rebuilt:
    """The result for one index: bytes before and after, or the failure."""

    name: str
    before_bytes: int
    after_bytes: int
    seconds: float
    attempts: int
    failed: str = ""
    hint: str = ""


@action(of=lambda index: Act(DROP_LEFTOVER, index.name), idempotent=True)
def drop_leftover(postgres: Postgres, index: Index, lock_seconds: float) -> str:
    """Drop an invalid index concurrently. Returns the reason if it was kept, otherwise empty text.

    Raises:
        Unreachable, OpsError.
    """
    return _drop(postgres, index, lock_seconds)


@action(of=lambda indexes: [Act(REBUILD, index.name) for index in indexes])
def rebuild_in_turn(postgres: Postgres, indexes: Sequence[Index], lock_seconds: float) -> tuple[Rebuilt, ...]:
    """Rebuild indexes one after the other without blocking reads or writes. A lock timeout is retried, leftovers are
    dropped.

    Raises:
        Unreachable: the server stopped; the next run drops the leftover.
        OpsError: somebody cancelled it.
    """
    with progress(lambda: read_progress(postgres)):
        return tuple(_one(postgres, index, lock_seconds) for index in indexes)


def _one(postgres: Postgres, index: Index, lock_seconds: float) -> Rebuilt:
    started = time.monotonic()
    failed, attempts = _rebuild(postgres, index, lock_seconds), 1
    while isinstance(failed, errors.LockNotAvailable | errors.DeadlockDetected) and attempts < ATTEMPTS:
        failed, attempts = _rebuild(postgres, index, lock_seconds), attempts + 1
    seconds = time.monotonic() - started
    if failed:
        error = as_ops_error(failed, lock_seconds)
        return Rebuilt(index.name, index.bytes, index.bytes, seconds, attempts, error.message, error.hint)
    return Rebuilt(index.name, index.bytes, _bytes(postgres, index), seconds, attempts)


def _rebuild(postgres: Postgres, index: Index, lock_seconds: float) -> psycopg.Error | None:
    """One attempt; returns an error that concerns this index only, and raises one that ends the run."""
    name = sql.Identifier(index.schema, index.relation)
    try:
        with upkeep_session(postgres, lock_seconds) as connection:
            try:
                connection.execute(sql.SQL("REINDEX INDEX CONCURRENTLY {}").format(name))
            except (errors.QueryCanceled, errors.AdminShutdown):
                raise
            except psycopg.Error as error:
                if connection.broken:
                    raise
                failed = error
            else:
                return None
    except Unreachable:
        raise
    except OpsError as error:
        raise OpsError(error.message, f"{error.hint}; {_clean(postgres, index, lock_seconds)}") from None
    _clean(postgres, index, lock_seconds)
    return failed


def _clean(postgres: Postgres, index: Index, lock_seconds: float) -> str:
    """Drop an attempt's leftovers on this index's table; the next run drops those that cannot be dropped now."""
    try:
        with upkeep_session(postgres, lock_seconds) as connection:
            end = "the end of the session that was building"
            until(lambda: not _is_building(connection, index), what=end, seconds=5)
            left = [one for one in read(connection) if one.table == index.table and one.is_transient]
        kept = [reason for one in left if (reason := _drop(postgres, one, lock_seconds))]
    except OpsError as error:
        kept = [error.message]
    return "the next run drops the leftover" if kept else "there is no leftover"


def _drop(postgres: Postgres, index: Index, lock_seconds: float) -> str:
    with upkeep_session(postgres, lock_seconds) as connection:
        try:
            if reason := _in_use(connection, index):
                return reason
            name = sql.Identifier(index.schema, index.relation)
            connection.execute(sql.SQL("DROP INDEX CONCURRENTLY IF EXISTS {}").format(name))
        except errors.LockNotAvailable:
            return f"the lock was not available within {lock_seconds:g} s"
        return ""


def _in_use(connection: Connection, index: Index) -> str:
    """Why the index cannot be dropped. Every running build holds this lock, so without one an invalid index is a
    leftover."""
    if _is_building(connection, index):
        return "another session builds an index of its table"
    if index.schema != "pg_toast":  # a TOAST table cannot be locked by name: the check above must suffice
        with connection.transaction():
            table = sql.Identifier(index.table_schema, index.table_relation)
            connection.execute(sql.SQL("LOCK TABLE {} IN SHARE UPDATE EXCLUSIVE MODE").format(table))
            found = execute(connection, _STILL_INVALID, index.oid)
    else:
        found = execute(connection, _STILL_INVALID, index.oid)
    return "" if found else "it was dropped, or is valid now"


_STILL_INVALID = "SELECT 1 FROM pg_index WHERE indexrelid = %s AND NOT (indisvalid AND indisready AND indislive)"


def _is_building(connection: Connection, index: Index) -> bool:
    return bool(execute(connection, _BUILT_NOW, index.oid))


_BUILT_NOW = f"SELECT 1 FROM pg_index WHERE indexrelid = %s AND indrelid IN ({BUILDS})"  # noqa: S608 (our own text)


def _bytes(postgres: Postgres, index: Index) -> int:
    """The size, by name: a rebuilt index has the old name and a new OID.

    Raises:
        OpsError: it is not valid.
    """
    with upkeep_session(postgres) as connection:
        rows = execute(connection, _VALID, index.schema, index.relation)
    if not rows:
        raise OpsError(f"{index.name} is not valid after its rebuild", "run check-indexes, then run this again")
    return int(rows[0][0])


_VALID = """
SELECT pg_relation_size(c.oid) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
     JOIN pg_index i ON i.indexrelid = c.oid
WHERE n.nspname = %s AND c.relname = %s AND i.indisvalid AND i.indisready AND i.indislive
"""


def read_progress(postgres: Postgres) -> WorkDone:
    """The progress of the builds in this database."""
    with upkeep_session(postgres, 1) as connection:
        rows = execute(connection, _PROGRESS)
    return done_of(rows)


_PROGRESS = """
SELECT coalesce(c.relname, p.relid::text), p.phase, p.blocks_done * b.bytes, p.blocks_total * b.bytes
FROM pg_stat_progress_create_index p LEFT JOIN pg_class c ON c.oid = nullif(p.index_relid, 0),
     (SELECT current_setting('block_size')::bigint AS bytes) AS b
WHERE p.datname = current_database()
"""
