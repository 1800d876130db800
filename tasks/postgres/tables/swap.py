"""Replace the rows of live tables in one transaction: readers see the old ones until its commit, writers wait.

The old rows are kept in separate, labelled tables; the table itself, its views, keys and privileges stay.
https://www.postgresql.org/docs/current/explicit-locking.html
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from psycopg import errors, sql

from blocks.postgres.server import Connection, Postgres, execute
from runbook.errors import OpsError, VerificationFailed
from runbook.failpoint import failpoint
from runbook.guard.permit import Act
from runbook.kinds import action
from runbook.log import logger
from tasks.postgres.content.pinned_session import pinned
from tasks.postgres.content.sums import TableSum
from tasks.postgres.restore.staged_copy import Copy
from tasks.postgres.restore.swap import Gate
from tasks.postgres.tables.checks import (
    advance,
    require_deferrable,
    require_equal,
    require_references,
    require_unchanged,
)
from tasks.postgres.tables.dangling import Dangling, find_dangling
from tasks.postgres.tables.find import FoundTable
from tasks.postgres.tables.kept import keep_rows
from tasks.postgres.tables.pairs import TablePair
from tasks.postgres.tables.scratch import REPLACE_ROWS
from tasks.postgres.tables.session import translating, writing
from tasks.postgres.tables.ties import Ties
from tasks.postgres.upkeep.session import upkeep_session

LOCK_SECONDS, LOCK_ATTEMPTS = 5, 4


@dataclass(frozen=True)
class TableReplacement:
    """A live table, its expected new rows, and the relation in the swapping session that has them."""

    pair: TablePair
    expected: TableSum
    schema: str
    relation: str

    @property
    def source(self) -> sql.Identifier:
        """The relation with the new rows."""
        return sql.Identifier(self.schema, self.relation)


@dataclass(frozen=True)
class Replaced:
    """One table's number of rows before and after, and the table that keeps the old ones."""

    table: str
    before: int
    after: int
    kept: str


@dataclass(frozen=True)
class Exchange:
    """The result for all tables. `writers_seconds`: the longest time that writers had to wait."""

    tables: tuple[Replaced, ...]
    writers_seconds: float
    sequences: tuple[str, ...]
    dangling: tuple[Dangling, ...]


@dataclass(frozen=True)
class TableOrder:
    """The judged ties, the label of the old rows, and the gate: called when the tables are locked, and before a row is
    replaced."""

    ties: Ties
    stamp: str
    by: str
    gate: Gate


def _acts(pairs: Sequence[TablePair]) -> list[Act]:
    return [Act(REPLACE_ROWS, pair.live.name) for pair in pairs]


@action(of=_acts)
def swap_rows(
    postgres: Postgres,
    scratch: Copy,
    pairs: Sequence[TablePair],
    guard: Connection,
    sums: Sequence[TableSum],
    order: TableOrder,
) -> Exchange:
    """Copy the scratch database's rows to temporary tables, then replace the live rows with them.

    Copied as text: in binary form a regclass or an array of an enum contains the other database's OIDs.

    Raises:
        VerificationFailed: a table changed since it was judged, rows would violate a foreign key, or the new rows
            differ from the backup's. Nothing was changed.
        OpsError: a lock was not available, the live database refuses a row, or the session was lost.
    """
    with writing(postgres, order.stamp) as connection:
        with pinned(postgres, scratch.database) as reading, translating(connection, order.stamp):
            replacements = [
                TableReplacement(pair, expected, "pg_temp", stage(connection, reading, pair, number))
                for number, (pair, expected) in enumerate(zip(pairs, sums, strict=True))
            ]
        failpoint("tables: staged")
        return _replace(connection, guard, replacements, order)


@action(of=_acts)
def swap_kept_rows(
    postgres: Postgres, pairs: Sequence[TablePair], sums: Sequence[TableSum], guard: Connection, order: TableOrder
) -> Exchange:
    """Replace the live rows with kept ones: `wanted` of each pair is the kept table."""
    with writing(postgres, order.stamp) as connection:
        found = [
            TableReplacement(pair, expected, pair.wanted.schema, pair.wanted.relation)
            for pair, expected in zip(pairs, sums, strict=True)
        ]
        return _replace(connection, guard, found, order)


def _replace(
    connection: Connection, guard: Connection, replacements: Sequence[TableReplacement], order: TableOrder
) -> Exchange:
    for attempt in range(LOCK_ATTEMPTS):
        started = time.monotonic()
        try:
            with connection.transaction():
                _lock(connection, replacements)
                order.gate()
                tables, sequences, dangling = _in_transaction(connection, replacements, order)
                execute(guard, "SELECT 1")  # the advisory lock is still held
                failpoint("tables: before commit")
            failpoint("tables: after commit")
            return Exchange(tables, time.monotonic() - started, sequences, dangling)
        except errors.LockNotAvailable:
            logger().info("another session writes to these tables (attempt %d of %d)", attempt + 1, LOCK_ATTEMPTS)
    holders = _holders(guard, connection)
    raise OpsError(
        f"the tables could not be locked in {LOCK_ATTEMPTS} attempts of {LOCK_SECONDS} s: {holders}",
        "wait for that transaction or end it, then run this again. Nothing was changed",
    )


def _lock(connection: Connection, replacements: Sequence[TableReplacement]) -> None:
    """Lock the tables: writers and SELECT … FOR UPDATE wait, plain readers do not. One order prevents deadlocks.

    EXCLUSIVE, so that foreign key checks, which lock rows, wait too: otherwise a session that deletes a referenced row
    would not see the restored row yet. So the referenced tables need no lock.
    """
    execute(connection, "SELECT set_config('lock_timeout', %s, true)", f"{LOCK_SECONDS}s")
    for table in sorted((one.pair.live for one in replacements), key=lambda table: table.oid):
        try:
            name = sql.Identifier(table.schema, table.relation)
            connection.execute(sql.SQL("LOCK TABLE {} IN EXCLUSIVE MODE").format(name))
        except errors.UndefinedTable:
            raise VerificationFailed(f"{table.name} was dropped since it was judged", "run this again") from None


def _holders(guard: Connection, connection: Connection) -> str:
    """The sessions that write or lock rows in this database, also idle ones in a transaction."""
    rows = execute(guard, _WRITERS, connection.info.dbname, connection.info.backend_pid)
    return ", ".join(f"process {pid} ({user}, {state}, since {since:%H:%M:%S})" for pid, user, state, since in rows)


_WRITERS = """
SELECT DISTINCT a.pid, a.usename, a.state, a.xact_start FROM pg_locks l JOIN pg_stat_activity a USING (pid)
WHERE l.locktype = 'relation' AND l.granted AND l.mode <> 'AccessShareLock'
  AND a.datname = %s AND a.pid <> %s AND a.xact_start IS NOT NULL ORDER BY a.xact_start LIMIT 5
"""


def _in_transaction(
    connection: Connection, replacements: Sequence[TableReplacement], order: TableOrder
) -> tuple[tuple[Replaced, ...], tuple[str, ...], tuple[Dangling, ...]]:
    require_unchanged(connection, [one.pair.live for one in replacements], order.ties)
    live, published = [one.pair.live for one in replacements], order.ties.publishes_new_tables
    names = [table.name for table in live]
    kept = [keep_rows(connection, table, order.stamp, order.by, names, published=published) for table in live]
    failpoint("tables: kept")
    for one, old in zip(replacements, kept, strict=True):
        deleted = connection.execute(sql.SQL("DELETE FROM {}").format(one.pair.live.rows_of)).rowcount
        if deleted != old.rows:
            raise VerificationFailed(f"{one.pair.live.name}: {deleted} rows deleted, {old.rows} kept", _HINT)
    failpoint("tables: deleted")
    for one in replacements:
        _insert(connection, one)
    failpoint("tables: inserted")
    dangling = tuple(find_dangling(connection, order.ties.keys))
    require_references(dangling)
    require_deferrable(connection, [one.pair.live for one in replacements])
    require_equal(connection, [(one.pair.live, one.expected) for one in replacements])
    # The last step: a rollback does not undo it.
    advanced = tuple(name for one in order.ties.sequences if (name := advance(connection, one)))
    replaced = (
        Replaced(one.pair.live.name, old.rows, one.expected.rows, old.name)
        for one, old in zip(replacements, kept, strict=True)
    )
    return tuple(replaced), advanced, dangling


def _insert(connection: Connection, one: TableReplacement) -> None:
    """A generated column that a person accepted may need the database's own `search_path` to be computed."""
    insert = _INSERT.format(
        table=sql.Identifier(one.pair.live.schema, one.pair.live.relation),
        columns=one.pair.live.written,
        source=one.source,
    )
    if one.pair.live.uncompared:
        connection.execute("SET LOCAL search_path TO DEFAULT")
    connection.execute(insert)
    if one.pair.live.uncompared:
        connection.execute("SET LOCAL search_path TO ''")


_HINT = "find the other writer in pg_stat_activity, then run this again. Nothing was changed"
_INSERT = sql.SQL("INSERT INTO {table} ({columns}) OVERRIDING SYSTEM VALUE SELECT {columns} FROM {source}")


@action(idempotent=True)
def tidy_tables(postgres: Postgres, tables: Sequence[FoundTable]) -> tuple[str, ...]:
    """VACUUM and ANALYZE the tables, whose old rows are dead and whose statistics are old; returns the failures."""
    failed = []
    for table in tables:
        try:
            with upkeep_session(postgres) as connection:
                name = sql.Identifier(table.schema, table.relation)
                connection.execute(sql.SQL("VACUUM (ANALYZE) {}").format(name))
        except OpsError as error:
            failed.append(f"{table.name}: {error.message}")
    return tuple(failed)


BLOCK_BYTES = 1 << 18


def stage(connection: Connection, reading: Connection, pair: TablePair, number: int) -> str:
    """Copy the rows to a temporary table: it ends with the session, is never published, and writes no WAL."""
    name = f"restoring_{number}"
    staged, like = sql.Identifier("pg_temp", name), sql.Identifier(pair.live.schema, pair.live.relation)
    encoding = execute(reading, "SHOW client_encoding")[0][0]
    execute(connection, "SELECT set_config('client_encoding', %s, false)", encoding)
    connection.execute(sql.SQL("CREATE TEMPORARY TABLE {} (LIKE {})").format(sql.Identifier(name), like))
    for column in pair.live.columns:
        if column.generated:  # would be NULL here
            drop = sql.SQL("ALTER TABLE {} DROP COLUMN {}").format(staged, sql.Identifier(column.name))
            connection.execute(drop)
    _copy_rows(reading, connection, pair.wanted, staged)
    return name


def _copy_rows(reading: Connection, writing: Connection, table: FoundTable, into: sql.Identifier) -> None:
    """COPY from one session to the other in blocks: a call for each row would take most of the time."""
    out = sql.SQL("COPY (SELECT {} FROM {}) TO STDOUT").format(table.written, table.rows_of)
    to = sql.SQL("COPY {} ({}) FROM STDIN").format(into, table.written)
    with reading.cursor() as source, writing.cursor() as target, source.copy(out) as rows, target.copy(to) as copy:
        block = bytearray()
        for row in rows:
            block += row
            if len(block) >= BLOCK_BYTES:
                copy.write(bytes(block))
                block.clear()
        copy.write(bytes(block))
