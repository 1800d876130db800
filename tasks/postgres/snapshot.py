"""A snapshot of a database that other sessions can read in.

The tables are locked before the snapshot is taken: a TRUNCATE between the two would leave dump and manifest agreeing
on an empty table.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import psycopg
from psycopg import sql

from blocks.postgres import Connection, Postgres, execute
from runbook.errors import OpsError
from runbook.log import logger
from tasks.postgres.session import pin

ATTEMPTS = 3


@contextmanager
def exported_snapshot(postgres: Postgres) -> Iterator[tuple[Connection, str, datetime]]:
    """A pinned session that has every table locked against changes of definition, its snapshot's name, and its time.

    Raises:
        OpsError: a table is locked by somebody else, or tables keep coming and going.
    """
    for attempt in range(ATTEMPTS):
        with postgres.connect(postgres.database) as connection:
            pin(connection)
            before = _lockable(connection)
            execute(connection, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            try:
                for schema, table in before:
                    name = sql.Identifier(schema, table)
                    connection.execute(sql.SQL("LOCK TABLE ONLY {} IN ACCESS SHARE MODE").format(name))
                row = execute(connection, "SELECT pg_export_snapshot(), clock_timestamp()")[0]
                changed = _lockable(connection) != before
            except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
                changed = True
            except psycopg.errors.LockNotAvailable:
                raise OpsError(
                    "a table is locked by somebody else for more than a minute",
                    "look for an ALTER TABLE or a long transaction in pg_stat_activity, end it, and try again",
                ) from None
            if not changed:
                yield connection, str(row[0]), row[1].astimezone(UTC)
                return
        logger().info("tables came or went while they were being locked (attempt %d): again", attempt + 1)
    raise OpsError("tables keep coming and going, so no snapshot could be taken", "stop the migrations, then try again")


def _lockable(connection: Connection) -> list[tuple[str, str]]:
    rows = execute(
        connection,
        "SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
        "WHERE c.relkind IN ('r', 'p') AND c.relpersistence <> 't' "
        "AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' ORDER BY 1, 2",
    )
    return [(str(schema), str(table)) for schema, table in rows]
