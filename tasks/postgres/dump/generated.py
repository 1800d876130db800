"""Generated columns whose values a restore cannot compute: they depend on the time, or on tables that a function finds
by `search_path`. pg_dump omits stored values, so a backup has the rows of such tables in separate files.

https://www.postgresql.org/docs/current/ddl-generated-columns.html
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from psycopg import sql
from pydantic import BaseModel, ConfigDict

from blocks.postgres.server import Connection, Postgres, execute, first_line
from runbook.errors import OTHER_BACKUPS, VerificationFailed
from tasks.backups import codec
from tasks.postgres.content import queries
from tasks.postgres.content.pinned_session import PINNED, read_names
from tasks.postgres.content.quiet import copy_options
from tasks.postgres.upkeep.session import set_known

DIRECTORY = "rows"
COLUMN = "GENERATED COLUMN"
_BLOCK_BYTES = 1 << 20
_LOADING = {**PINNED, "default_transaction_read_only": "off", "synchronous_commit": "off"}


class Uncomputable(BaseModel):
    """A stored generated column whose value a restore cannot compute, and `why`. `oid`: its table's at the backup;
    `ending`: of the file with its table's rows; a manifest without it is of a version that used gzip."""

    model_config = ConfigDict(frozen=True)
    schema_name: str
    table: str
    oid: int
    column: str
    why: str
    ending: str = ".gz"

    @property
    def name(self) -> str:
        """`public.orders.total`"""
        return f"{self.schema_name}.{self.table}.{self.column}"

    @property
    def file(self) -> str:
        """The file with its table's rows in a backup."""
        return f"{DIRECTORY}/{self.oid}.copy{self.ending}"


def find_uncomputable(connection: Connection) -> tuple[Uncomputable, ...]:
    """Stored columns whose expression fails or returns another value in a restore.

    Checked in a pinned session, whose `search_path` is empty as in a restore.
    """
    found = []
    for schema, table, oid, column, expression in execute(connection, queries.COMPUTED):
        query = sql.SQL("SELECT count(*) FROM ONLY {} WHERE ({}) IS DISTINCT FROM {}").format(
            sql.Identifier(schema, table), sql.SQL(expression), sql.Identifier(column)
        )
        try:
            with connection.transaction():
                unequal = int(execute(connection, query)[0][0])
        except psycopg.Error as error:
            if connection.broken:
                raise
            why = first_line(error)
        else:
            why = f"{unequal:,} rows have another value than it computes now" if unequal else ""
        if why:
            found.append(
                Uncomputable(schema_name=schema, table=table, oid=oid, column=column, why=why, ending=codec.ENDING)
            )
    return tuple(found)


def write_rows(connection: Connection, directory: Path, columns: Collection[Uncomputable]) -> None:
    """Write the rows of their tables with generated columns, in the session's snapshot."""
    for file, one in {one.file: one for one in columns}.items():
        path = directory / file
        path.parent.mkdir(exist_ok=True)
        name = sql.Identifier(one.schema_name, one.table)
        statement = sql.SQL("COPY (SELECT {} FROM ONLY {}) TO STDOUT (ENCODING {})").format(
            _columns(connection, name), name, _encoding(connection)
        )
        with codec.writer(path) as target, connection.cursor() as cursor, cursor.copy(statement) as rows:
            for block in rows:
                target.write(block)


def may_set_flags(postgres: Postgres) -> bool:
    """Whether this role can load such rows: only a superuser can."""
    with postgres.connect() as connection:
        return bool(execute(connection, "SELECT has_table_privilege('pg_attribute', 'UPDATE')")[0][0])


def load_rows(postgres: Postgres, directory: Path, database: str, columns: Collection[Uncomputable]) -> None:
    """Fill the empty tables of a copy with their stored rows, without computing generated columns.

    During one transaction the columns are plain ones, by a flag in `pg_attribute` that only a superuser can set
    (`may_set_flags`). DROP EXPRESSION could not be undone without computing every value.

    Raises:
        VerificationFailed: the server refuses the rows, or their file is damaged.
    """
    with postgres.connect(database, options=copy_options(postgres)) as connection:
        set_known(connection, _LOADING)
        read_names(connection)
        for file, one in {one.file: one for one in columns}.items():
            name = sql.Identifier(one.schema_name, one.table)
            statement = sql.SQL("COPY {} ({}) FROM STDIN (ENCODING {})").format(
                name, _columns(connection, name), _encoding(connection)
            )
            try:
                with (
                    codec.readable(file, OTHER_BACKUPS),
                    # A manifest has the number of the rows, not their size; they go to the server.
                    codec.reader(directory / file, codec.UNBOUNDED) as source,
                    connection.transaction(),
                    _plain(connection, name),
                    connection.cursor() as cursor,
                    cursor.copy(statement) as rows,
                ):
                    while block := source.read(_BLOCK_BYTES):
                        rows.write(block)
            except (psycopg.DataError, psycopg.IntegrityError) as error:
                message = f"{one.schema_name}.{one.table} does not restore: {first_line(error)}"
                raise VerificationFailed(message, f"{OTHER_BACKUPS}. Nothing was replaced") from None


@contextmanager
def emptied(postgres: Postgres, database: str, names: Collection[str]) -> Iterator[None]:
    """In the block these columns of a copy (`GENERATED COLUMN public.orders.total`) are NULL in new rows; other names
    are ignored."""
    wanted = [name for name in names if name.startswith(COLUMN)]
    if not wanted or not may_set_flags(postgres):
        yield
        return
    with postgres.connect(database, options=copy_options(postgres)) as connection:
        found = execute(connection, _EMPTY, wanted)
        yield
        for table, column in found:
            execute(connection, _COMPUTED_AGAIN, table, column)


def find_generated(postgres: Postgres, database: str, table: str) -> list[str]:
    """The names, as in `accept`, of the stored generated columns of tables with this name."""
    with postgres.connect(database, options=copy_options(postgres)) as connection:
        return [str(name) for (name,) in execute(connection, _OF_TABLE, table)]


@contextmanager
def _plain(connection: Connection, table: sql.Identifier) -> Iterator[None]:
    """In the block the table's stored columns accept given values."""
    name = table.as_string(connection)
    found = [int(row[0]) for row in execute(connection, _SWITCH_OFF, name)]
    yield
    execute(connection, _SWITCH_ON, name, found)


def _encoding(connection: Connection) -> sql.Literal:
    """The database's own encoding, so that rows are not converted."""
    return sql.Literal(connection.info.parameter_status("server_encoding"))


def _columns(connection: Connection, table: sql.Identifier) -> sql.Composed:
    names = execute(connection, _COLUMNS, table.as_string(connection))
    return sql.SQL(", ").join(sql.Identifier(str(name)) for (name,) in names)


# By name: a restored child table has another column order.
_COLUMNS = """
SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped
AND attgenerated IN ('', 's') ORDER BY attname
"""
_SWITCH_OFF = """
UPDATE pg_attribute SET attgenerated = '' WHERE attrelid = %s::regclass AND attgenerated = 's' RETURNING attnum
"""
_SWITCH_ON = "UPDATE pg_attribute SET attgenerated = 's' WHERE attrelid = %s::regclass AND attnum = ANY(%s)"
# With its default switched off, a column that a COPY does not name is NULL.
_EMPTY = """
UPDATE pg_attribute a SET attgenerated = '', atthasdef = false
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.oid = a.attrelid AND a.attgenerated = 's'
  AND 'GENERATED COLUMN ' || n.nspname || '.' || c.relname || '.' || a.attname = ANY(%s)
RETURNING a.attrelid, a.attnum
"""
_COMPUTED_AGAIN = """
UPDATE pg_attribute SET attgenerated = 's', atthasdef = true WHERE attrelid = %s AND attnum = %s
"""
_OF_TABLE = """
SELECT 'GENERATED COLUMN ' || n.nspname || '.' || c.relname || '.' || a.attname
FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE a.attgenerated = 's' AND NOT a.attisdropped AND c.relname = %s ORDER BY 1
"""
