"""Writes of other clients kept out of a database while its replacement is built, by a lock that ends with its session.

https://www.postgresql.org/docs/current/explicit-locking.html#LOCKING-TABLES
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psycopg
from psycopg import sql

from blocks.postgres.server import Postgres, execute, first_line
from runbook.errors import OpsError


@contextlib.contextmanager
def held_writes(postgres: Postgres, database: str) -> Iterator[str]:
    """Hold a SHARE lock on every table: readers go on, writers wait. Yields "", or why writes are not held.

    The lock is gone with this process, however it ends; the swap ends this session like all others of the database.
    """
    with contextlib.ExitStack() as stack:
        problem = ""
        try:
            connection = stack.enter_context(postgres.connect(database))
            execute(connection, "SET idle_in_transaction_session_timeout = 0")
            execute(connection, "SET lock_timeout = '20s'")
            tables = [sql.Identifier(str(schema), str(name)) for schema, name in execute(connection, _TABLES)]
            connection.execute("BEGIN")
            if tables:
                connection.execute(sql.SQL("LOCK TABLE {} IN SHARE MODE").format(sql.SQL(", ").join(tables)))
        except psycopg.Error as error:
            problem = first_line(error)
        except OpsError as error:
            problem = error.message
        try:
            yield problem
        finally:
            with contextlib.suppress(psycopg.Error, OpsError):  # the swap has ended it
                stack.close()


_TABLES = """
SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p') AND c.relpersistence <> 't' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
"""
