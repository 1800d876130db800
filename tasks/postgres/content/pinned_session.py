"""Sessions in which a row has the same text on every server: pinned settings, no timeouts except for locks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import psycopg

from blocks.postgres.server import Connection, Postgres, execute
from tasks.postgres.dump.printed import SQL_ASCII
from tasks.postgres.upkeep.session import refusals, set_known

Item = TypeVar("Item")
LOCK_SECONDS = 60
BATCH = 25

# extra_float_digits ≥ 1 prints the shortest text that is read back exactly.
PINNED = {
    "TimeZone": "UTC",
    "DateStyle": "ISO, MDY",
    "IntervalStyle": "postgres",
    "extra_float_digits": "1",
    "bytea_output": "hex",
    "lc_monetary": "C",
    "search_path": "",
    "row_security": "off",
    "xmloption": "content",
    "lock_timeout": f"{LOCK_SECONDS}s",
    "default_transaction_read_only": "on",
}


@contextmanager
def pinned(postgres: Postgres, database: str, options: str = "") -> Iterator[Connection]:
    """A read-only REPEATABLE READ transaction under the pinned settings. `options`: as `Postgres.connect`.

    Raises:
        OpsError: a lock was not available within `LOCK_SECONDS`, or the server refused a statement.
    """
    with postgres.connect(database, options=options) as connection, refusals(connection, LOCK_SECONDS):
        pin(connection)
        execute(connection, "BEGIN ISOLATION LEVEL REPEATABLE READ")
        yield connection
        execute(connection, "COMMIT")


def in_batches(connection: Connection, items: Sequence[Item], most: int = BATCH) -> Iterator[Item]:
    """The items, each batch in a savepoint that is rolled back, which releases its locks but keeps the snapshot.

    Thousands of tables with their indexes would otherwise fill the server's lock table.
    """
    for start in range(0, len(items), most):
        with connection.transaction(force_rollback=True):
            yield from items[start : start + most]


def pin(connection: Connection) -> None:
    """Set the `PINNED` settings that this server's version has, and call `read_names`."""
    set_known(connection, PINNED)
    read_names(connection)


def read_names(connection: Connection) -> str:
    """If names of a SQL_ASCII database are not valid UTF-8, let this session use Latin-1, byte by byte.

    Returns Python's name of the session's encoding.
    """
    if connection.info.parameter_status("server_encoding") == SQL_ASCII:
        try:
            execute(connection, _NAMES)
        except psycopg.errors.CharacterNotInRepertoire:
            execute(connection, "SET client_encoding = 'LATIN1'")
    return connection.info.encoding


_NAMES = """
SELECT nspname FROM pg_namespace UNION SELECT relname FROM pg_class UNION SELECT attname FROM pg_attribute
UNION SELECT description FROM pg_shdescription
"""
