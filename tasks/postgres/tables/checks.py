"""Checks of live tables inside the transaction that replaces their rows, before its commit."""

from __future__ import annotations

from collections.abc import Sequence

from psycopg import errors, sql

from blocks.postgres.server import Connection, execute
from runbook.errors import VerificationFailed
from tasks.postgres.content.sums import TableSum
from tasks.postgres.tables.dangling import Dangling
from tasks.postgres.tables.find import FoundTable, known_in, sum_of, table_of
from tasks.postgres.tables.ties import Sequenced, Ties, ties_of


def require_unchanged(connection: Connection, tables: Sequence[FoundTable], ties: Ties) -> None:
    """Require that the tables, their keys, triggers and sequences are unchanged since they were judged.

    Raises:
        VerificationFailed: one has changed.
    """
    known = {one.name: one for one in known_in(connection, [table.name for table in tables])}
    for table in tables:
        now = known.get(table.name)
        if now is None or now.oid != table.oid or table_of(connection, now).columns != table.columns:
            hint = "run this again: somebody changed the table meanwhile"
            raise VerificationFailed(f"{table.name} is another table than the judged one", hint)
    if ties_of(connection, tables).pinned != ties.pinned:
        raise VerificationFailed(
            "keys, triggers or sequences of these tables differ from the judged ones",
            "run this again: somebody changed them meanwhile",
        )


def require_references(dangling: Sequence[Dangling]) -> None:
    """Require that no row violates a validated foreign key.

    Raises:
        VerificationFailed: a row does.
    """
    broken = [one for one in dangling if one.key.validated]
    if broken:
        what = "; ".join(f"{one.key.name}: {one.rows:,} rows, such as ({'), ('.join(one.examples)})" for one in broken)
        also = ", ".join(dict.fromkeys(one.key.outside for one in broken if one.key.outside))
        raise VerificationFailed(
            f"rows would reference missing rows: {what}",
            f"add {also} to tables to restore them together. Nothing was changed"
            if also
            else "correct the rows by hand: the backup itself violates this key. Nothing was changed",
        )


def require_deferrable(connection: Connection, tables: Sequence[FoundTable]) -> None:
    """Check deferrable constraints, whose triggers do not fire while rows are replaced.

    PostgreSQL builds each over the same rows in a temporary table.

    Raises:
        VerificationFailed: rows violate one.
    """
    found = execute(connection, _DEFERRABLE, [table.oid for table in tables])
    for number, (name, definition, schema, relation, only) in enumerate(found):
        rows = sql.Identifier(f"checking_{number}")
        copy = sql.SQL("CREATE TEMPORARY TABLE {} ON COMMIT DROP AS SELECT * FROM {} {}")
        connection.execute(copy.format(rows, sql.SQL("ONLY" if only else ""), sql.Identifier(schema, relation)))
        try:
            statement = sql.SQL("ALTER TABLE pg_temp.{} ADD {}")
            connection.execute(statement.format(rows, sql.SQL(definition)))
        except errors.IntegrityError as error:
            raise VerificationFailed(
                f"rows would violate the deferrable constraint {name}: {error.diag.message_primary}",
                "drop the constraint, run this again, correct the rows, and add it again: it is newer than the "
                "rows. Nothing was changed",
            ) from None


# A partition's constraints are checked on its parent, except its own ones.
_DEFERRABLE = """
SELECT format('%%I of %%s', con.conname, con.conrelid::regclass), pg_get_constraintdef(con.oid), n.nspname, c.relname,
       c.relkind <> 'p'
FROM pg_constraint con JOIN pg_class c ON c.oid = con.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE con.condeferrable AND con.contype IN ('p', 'u', 'x') AND con.conparentid = 0 AND con.conrelid IN (
    SELECT coalesce(t.relid::oid, chosen)
    FROM unnest(%s::oid[]) AS chosen LEFT JOIN LATERAL pg_partition_tree(chosen::regclass) t ON true)
ORDER BY con.oid
"""


def require_equal(connection: Connection, wanted: Sequence[tuple[FoundTable, TableSum]]) -> None:
    """Compare the live rows with the expected ones, row by row in text form.

    Raises:
        VerificationFailed: they differ.
    """
    for table, expected in wanted:
        found = sum_of(connection, table)
        if (found.rows, found.hash) != (expected.rows, expected.hash):
            raise VerificationFailed(
                f"{table.name} would have {found.rows:,} rows that differ from the {expected.rows:,} expected ones",
                "check for a changed default, type or generated column. Nothing was changed",
            )


def advance(connection: Connection, sequence: Sequenced) -> str:
    """Advance a sequence to the column's largest number, never back; returns its name if it was advanced."""
    name = sql.Identifier(sequence.schema, sequence.name)
    query = sql.SQL("SELECT {}({}) FROM {}").format(
        sql.SQL("max" if sequence.ascending else "min"),
        sql.Identifier(sequence.column),
        sql.Identifier(*sequence.table),
    )
    reached = execute(connection, query)[0][0]
    if not isinstance(reached, int):
        return ""
    last, called = execute(connection, sql.SQL("SELECT last_value, is_called FROM {}").format(name))[0]
    behind = last < reached if sequence.ascending else last > reached
    if not behind and (last != reached or called):
        return ""
    execute(connection, "SELECT setval(%s::regclass, %s)", name.as_string(connection), reached)
    return name.as_string(connection)
