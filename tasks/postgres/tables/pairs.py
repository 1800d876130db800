"""A backup's tables and the live tables of the same names, with a comparison of their columns."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import psycopg
from psycopg import sql

from blocks.postgres.server import Connection, Postgres, execute
from runbook.errors import OpsError
from runbook.kinds import probe
from tasks.postgres.content.equivalence import ASIDE, rolled_back
from tasks.postgres.content.pinned_session import pinned
from tasks.postgres.dump.generated import COLUMN
from tasks.postgres.tables.find import NO_TABLE, FoundColumn, FoundTable, Known, find_named, known_in, resolve, table_of


@dataclass(frozen=True)
class TablePair:
    """A table in the backup and in the live database, and its number of live rows."""

    wanted: FoundTable
    live: FoundTable
    live_rows: int


@probe
def match_tables(postgres: Postgres, schema_in: str, typed: Sequence[str]) -> tuple[TablePair, ...]:
    """The named tables in a database with the backup's schema, each with the live one of its name.

    Raises:
        OpsError: a name is unknown (the hint has similar ones), or the live database has no such table.
    """
    with pinned(postgres, schema_in) as connection:
        wanted = [table_of(connection, one) for one in find_named(connection, typed)]
    with pinned(postgres, postgres.database) as connection:
        known = {one.name: one for one in known_in(connection, [table.name for table in wanted])}
        pairs = [_pair(connection, table, table.name, known.get(table.name)) for table in wanted]
    return tuple(replace(one, live=settle_generated(postgres, schema_in, one.wanted, one.live)) for one in pairs)


@probe
def pair_kept(postgres: Postgres, kept: Sequence[tuple[int, str]]) -> tuple[TablePair, ...]:
    """Tables with kept rows (OID, the live table's quoted name), each with the live one.

    Raises:
        OpsError: the live one is missing.
    """
    with pinned(postgres, postgres.database) as connection:
        known = known_in(connection)
        by_oid = {one.oid: one for one in known}
        by_name = {one.name: one for one in known}
        return tuple(
            _pair(connection, table_of(connection, by_oid[oid]), name, by_name.get(name)) for oid, name in kept
        )


def _pair(connection: Connection, wanted: FoundTable, name: str, live: Known | None) -> TablePair:
    if live is None or live.kind not in "rp" or live.root:
        what = "has no such table" if live is None else f"has it as {NO_TABLE.get(live.kind, 'a partition')}"
        raise OpsError(f"the live database {what}: {name}", _CREATE)
    table = table_of(connection, live)
    rows = execute(connection, sql.SQL("SELECT count(*) FROM {}").format(table.rows_of))[0][0]
    return TablePair(wanted, table, int(rows))


_CREATE = (
    "create it empty with its old definition (pg_restore --schema-only --table, or the migration), then launch this "
    "again; or run restore-database"
)


@probe
def find_live(postgres: Postgres, typed: Sequence[str]) -> tuple[FoundTable, ...]:
    """Find the live tables that an operator named.

    Raises:
        OpsError: the live database lacks one, or cannot be reached.
    """
    with pinned(postgres, postgres.database) as connection:
        known = known_in(connection, typed)
        for name in map(str.strip, typed):
            if not any(one.is_called(name) or one.is_called_bare(name) for one in known):
                raise OpsError(f"the live database has no such table: {name[:80]}", _CREATE)
        return tuple(table_of(connection, one) for one in resolve(typed, known))


def with_accepted(pairs: Sequence[TablePair], accepted: Collection[str]) -> tuple[TablePair, ...]:
    """Without a comparison of the generated columns that a person accepted (`GENERATED COLUMN public.orders.sum`)."""

    def accepting(pair: TablePair) -> TablePair:
        prefix = f"{COLUMN} {pair.live.schema}.{pair.live.relation}."
        given = {name.removeprefix(prefix) for name in accepted if name.startswith(prefix)}
        names = frozenset(column.name for column in pair.live.columns if column.generated and column.name in given)
        return replace(pair, wanted=replace(pair.wanted, uncompared=names), live=replace(pair.live, uncompared=names))

    return tuple(map(accepting, pairs))


def unequal_columns(wanted: FoundTable, live: FoundTable, *, kept: bool = False) -> list[str]:
    """The differences of a live table's columns from the backup's, as sentences.

    `kept`: a kept table, which has the values of generated columns but not their expressions.
    """
    ours, theirs = ({column.name: column for column in table.columns} for table in (wanted, live))
    return [
        *(f"column {name} was added since" for name in theirs if name not in ours),
        *(f"column {name} was dropped since" for name in ours if name not in theirs),
        *(
            f"column {name} was {column.type}{_by(column)}, is {theirs[name].type}{_by(theirs[name])}"
            for name, column in ours.items()
            if name in theirs and (column.type != theirs[name].type or (not kept and _by(column) != _by(theirs[name])))
        ),
    ]


def _by(column: FoundColumn) -> str:
    return f" generated as {column.generated}" if column.generated else ""


def settle_generated(postgres: Postgres, database: str, own: FoundTable, other: FoundTable) -> FoundTable:
    """The `other` table with the expressions of `own` (in `database`) for generated columns that PostgreSQL parses to
    the same expression. It reads no rows and leaves nothing behind."""
    ours = {column.name: column for column in own.columns}
    differing = [
        column
        for column in other.columns
        if column.generated and (mine := ours.get(column.name)) and mine.generated not in ("", column.generated)
    ]
    if not differing:
        return other
    with rolled_back(postgres, database) as connection:
        alike = {
            column.name: replace(column, generated=ours[column.name].generated)
            for column in differing
            if _printed(connection, own, column) == _printed(connection, own, ours[column.name])
        }
    return replace(other, columns=tuple(alike.get(column.name, column) for column in other.columns))


def _printed(connection: Connection, table: FoundTable, column: FoundColumn) -> str:
    """PostgreSQL's print of a generated column's expression; the text itself if the server refuses it."""
    clone = sql.Identifier(ASIDE, table.relation)
    like = sql.SQL("CREATE TABLE {} (LIKE {}, {} {} GENERATED ALWAYS AS ({}) STORED)").format(
        clone,
        sql.Identifier(table.schema, table.relation),
        sql.Identifier(ASIDE),
        sql.SQL(column.type),
        sql.SQL(column.generated),
    )
    try:
        with connection.transaction(force_rollback=True):
            connection.execute(like, binary=True)
            found = execute(connection, _EXPRESSION, clone.as_string(connection))
    except psycopg.Error:
        if connection.broken:
            raise
        return column.generated
    return str(found[0][0])


_EXPRESSION = "SELECT pg_get_expr(adbin, adrelid) FROM pg_attrdef WHERE adrelid = %s::regclass"
