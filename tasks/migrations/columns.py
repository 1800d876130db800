"""Columns that a migration drops, and the number of rows with a value in them."""

from __future__ import annotations

from collections.abc import Mapping

from psycopg import sql

from blocks.postgres.server import Postgres, execute
from runbook.kinds import probe
from tasks.postgres.content.pinned_session import pinned

# (table, its columns), the table quoted as PostgreSQL prints it.
Columns = tuple[tuple[str, tuple[str, ...]], ...]


@probe
def count_filled(postgres: Postgres, database: str, columns: Columns) -> Mapping[str, int]:
    """Rows by table in which one of these columns is not NULL. Generated columns do not count: they can be computed.

    Raises:
        Unreachable: the server does not answer.
    """
    counts = dict.fromkeys((table for table, _ in columns), 0)
    with pinned(postgres, database) as connection:
        for table, names in columns:
            for schema, relation, partitioned, stored in execute(connection, _STORED, table, list(names)):
                query = sql.SQL("SELECT count(*) FROM {}{} WHERE num_nonnulls({}) > 0").format(
                    sql.SQL("" if partitioned else "ONLY "),  # inheritance children are counted as separate tables
                    sql.Identifier(schema, relation),
                    sql.SQL(", ").join(map(sql.Identifier, stored)),
                )
                counts[table] += int(execute(connection, query)[0][0])
    return counts


_STORED = """
SELECT n.nspname, c.relname, c.relkind = 'p', array_agg(a.attname::text ORDER BY a.attnum)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
WHERE format('%%I.%%I', n.nspname, c.relname) = %s AND c.relkind IN ('r', 'p') AND a.attname = ANY(%s)
GROUP BY 1, 2, 3
"""
