"""The session that replaces rows of live tables, and its errors for operators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from psycopg import errors

from blocks.postgres.server import Connection, Postgres, execute
from runbook.errors import OpsError
from tasks.postgres.content.pinned_session import pin
from tasks.postgres.server.masking import described
from tasks.postgres.upkeep.session import as_ops_error


@contextmanager
def writing(postgres: Postgres, stamp: str) -> Iterator[Connection]:
    """A session with pinned settings in which triggers and foreign keys do not fire."""
    with postgres.connect(postgres.database) as connection:
        pin(connection)
        execute(connection, "SET default_transaction_read_only = off")
        execute(connection, "SET session_replication_role = replica")
        execute(connection, "SET client_connection_check_interval = '2s'")
        with translating(connection, stamp):
            yield connection


@contextmanager
def translating(connection: Connection, stamp: str) -> Iterator[None]:
    """Translate errors in the block to an OpsError. `stamp`: the suffix of the tables with the old rows."""
    try:
        yield
    except psycopg.Error as error:
        raise _translated(error, stamp if connection.broken else "") from None


def _translated(error: psycopg.Error, stamp: str) -> OpsError:
    text = described(error)
    if stamp:  # the result of its commit is unknown
        return OpsError(
            f"the session that replaces the rows was lost: {text}",
            f"check for tables named …_old_{stamp}. If they exist, the rows were replaced: do not restore again. If "
            "not, nothing was changed: run this again",
        )
    match error:
        case errors.IntegrityError() | errors.DataError():
            return OpsError(
                f"the live database refuses rows of the backup: {text}",
                "run restore-database, or copy the rows by hand: the rule is newer. Nothing was changed",
            )
        case errors.DiskFull():
            hint = "free disk space, then run this again. Nothing was changed"
            return OpsError(f"the disk is full: {text}", hint)
    return as_ops_error(error)
