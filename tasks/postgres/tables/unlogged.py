"""Unlogged tables: the WAL has none of their rows, so PostgreSQL empties them in every recovered copy.

https://www.postgresql.org/docs/current/sql-createtable.html#SQL-CREATETABLE-UNLOGGED
"""

from __future__ import annotations

from collections.abc import Collection

from psycopg import sql

from blocks.postgres.server import Postgres, execute
from runbook.kinds import probe
from tasks.postgres.content.content import DatabaseContent

HEAD = "CREATE UNLOGGED TABLE"


@probe
def find_unlogged(postgres: Postgres, database: str, names: Collection[str]) -> tuple[str, ...]:
    """Those of these tables (quoted, with their schema) that are unlogged, or have unlogged partitions.

    Raises:
        Unreachable: the server does not answer.
    """
    with postgres.connect(database) as connection:
        return tuple(str(row[0]) for row in execute(connection, _NAMED, list(names)))


@probe
def find_filled_unlogged(postgres: Postgres) -> tuple[str, ...]:
    """The unlogged tables of every database that have rows, as `database: schema.table`.

    Raises:
        OpsError: a database refuses the log-in, or the server does not answer.
    """
    found = list[str]()
    with postgres.connect() as connection:
        databases = [str(row[0]) for row in execute(connection, _DATABASES)]
    for database in databases:
        with postgres.connect(database) as connection:
            for schema, table, name in execute(connection, _UNLOGGED):
                query = sql.SQL("SELECT EXISTS (SELECT FROM {})").format(sql.Identifier(schema, table))
                if execute(connection, query)[0][0]:
                    found.append(f"{database}: {name}")
    return tuple(found)


def unlogged_in(content: DatabaseContent) -> tuple[str, ...]:
    """The unlogged tables of which a dump has rows, as `database: schema.table`."""
    unlogged = [key for key, text in content.definitions.items() if text.lstrip().startswith(HEAD)]
    rows = [name for name, table in content.tables.items() if table.rows]
    return tuple(f"{content.database}: {name}" for name in rows if any(f" {name} (" in key for key in unlogged))


_DATABASES = "SELECT datname FROM pg_database WHERE datallowconn AND NOT datistemplate ORDER BY 1"
_UNLOGGED = """
SELECT n.nspname, c.relname, format('%I.%I', n.nspname, c.relname)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'r' AND c.relpersistence = 'u' ORDER BY 1, 2
"""
_NAMED = """
SELECT DISTINCT name FROM unnest(%s::text[]) AS named(name)
JOIN pg_class c ON c.oid = to_regclass(name) OR c.oid IN (SELECT relid FROM pg_partition_tree(to_regclass(name)))
WHERE c.relpersistence = 'u' ORDER BY 1
"""
