"""Sessions in which the same row has the same text everywhere: pinned settings, no timeouts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from blocks.postgres import Connection, Postgres, execute

# recovery-rules, content manifest. extra_float_digits ≥ 1 prints the shortest text that reads back exactly.
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
    "statement_timeout": "0",
    "lock_timeout": "60s",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
    "transaction_timeout": "0",
    "default_transaction_read_only": "on",
}


@contextmanager
def pinned(postgres: Postgres, database: str) -> Iterator[Connection]:
    """A read-only REPEATABLE READ transaction under the pinned settings."""
    with postgres.connect(database) as connection:
        pin(connection)
        execute(connection, "BEGIN ISOLATION LEVEL REPEATABLE READ")
        yield connection
        execute(connection, "COMMIT")


def pin(connection: Connection) -> None:
    """Set what of `PINNED` this server's version knows."""
    execute(
        connection,
        "SELECT set_config(s.name, p.value, false) FROM unnest(%s::text[], %s::text[]) AS p(name, value) "
        "JOIN pg_catalog.pg_settings s ON lower(s.name) = lower(p.name)",
        list(PINNED),
        list(PINNED.values()),
    )
