"""The session in which rows of live tables are replaced, and what its errors mean to whoever launched it."""

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
    """A session under the pinned settings in which neither triggers nor foreign keys act by themselves."""
    with postgres.connect(postgres.database) as connection:
        pin(connection)
        execute(connection, "SET default_transaction_read_only = off")
        execute(connection, "SET session_replication_role = replica")
        execute(connection, "SET client_connection_check_interval = '2s'")
        with explaining(connection, stamp):
            yield connection


@contextmanager
def explaining(connection: Connection, stamp: str) -> Iterator[None]:
    """What went wrong in the block, as an OpsError. `stamp` is in the names of the tables that keep the old rows."""
    try:
        yield
    except psycopg.Error as error:
        raise _explained(error, stamp if connection.broken else "") from None


def _explained(error: psycopg.Error, stamp: str) -> OpsError:
    said = described(error)
    if stamp:  # whether its commit came through is not known
        return OpsError(
            f"the session that replaces the rows was ended: {said}",
            f"look for tables named …_old_{stamp}: if they are there the rows were replaced, do not restore again; if "
            "not, nothing was changed, launch this again",
        )
    match error:
        case errors.IntegrityError() | errors.DataError():
            return OpsError(
                f"the live database refuses rows of the backup: {said}",
                "what refuses them is newer than the backup: restore-database, or copy by hand; nothing was changed",
            )
        case errors.DiskFull():
            return OpsError(f"the disk is full: {said}", "free space and launch this again; nothing was changed")
    return as_ops_error(error)
