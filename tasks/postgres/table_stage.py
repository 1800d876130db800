"""A backup's rows brought from the scratch database into the session that puts them into the live tables."""

from __future__ import annotations

from psycopg import sql

from blocks.postgres import Connection, execute
from tasks.postgres.table_pairs import Pair
from tasks.postgres.tables import Table

BLOCK_BYTES = 1 << 18


def stage(connection: Connection, reading: Connection, pair: Pair, number: int) -> str:
    """The rows in a temporary table: it is gone with the session, is no part of a publication, and writes no WAL."""
    name = f"restoring_{number}"
    staged, like = sql.Identifier("pg_temp", name), sql.Identifier(pair.live.schema, pair.live.relation)
    encoding = execute(reading, "SHOW client_encoding")[0][0]
    execute(connection, "SELECT set_config('client_encoding', %s, false)", encoding)
    connection.execute(sql.SQL("CREATE TEMPORARY TABLE {} (LIKE {})").format(sql.Identifier(name), like))
    for column in pair.live.columns:
        if column.generated:  # it would be NULL here
            drop = sql.SQL("ALTER TABLE {} DROP COLUMN {}").format(staged, sql.Identifier(column.name))
            connection.execute(drop)
    _copy_rows(reading, connection, pair.wanted, staged)
    return name


def _copy_rows(reading: Connection, writing: Connection, table: Table, into: sql.Identifier) -> None:
    """COPY from one session to the other, in blocks: a call for each row would be the most of it."""
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
