"""What became of a swap whose session was lost at its end: looked at, not assumed."""

from __future__ import annotations

import hashlib

import psycopg

from blocks.postgres import Postgres, execute
from runbook.errors import OpsError
from runbook.wait import until
from tasks.postgres.copy import oid_of

LOOK_SECONDS = 60.0


class SwapUnknown(OpsError):
    """The session was lost at the commit, and nobody can say whether the names were swapped."""


def lock_key(database: str) -> int:
    """The key of the advisory lock under which a database is replaced."""
    return int.from_bytes(hashlib.sha256(f"interview-ops {database}".encode()).digest()[:8], "big", signed=True)


def was_swapped(postgres: Postgres, session: int, name: str, oid: int) -> bool:
    """Whether behind `name` is the database with that OID. The lost session (its process id) is ended first: while it
    lives, its COMMIT may still come.

    Raises:
        SwapUnknown: the server does not answer, or the session does not end.
    """

    def look() -> str:
        with postgres.connect() as connection:
            if execute(connection, _END, lock_key(postgres.database) & 0xFFFFFFFF, session):
                return ""
            return "swapped" if oid_of(connection, name) == oid else "as before"

    try:
        return until(look, what="the end of that session", seconds=LOOK_SECONDS, every_seconds=0.2) == "swapped"
    except (OpsError, psycopg.Error):
        raise SwapUnknown(
            f"the swapping session was lost, and the server does not answer: nobody knows whether {name} was replaced",
            f"start it, and look which OID {name} has in pg_database: {oid} is the new one, do not launch this again; "
            "another: nothing was swapped, launch it again",
        ) from None


# By its lock: a process id alone may be another's by now.
_END = """
SELECT pg_terminate_backend(pid) FROM pg_locks
WHERE locktype = 'advisory' AND granted AND objid::bigint = %s AND pid = %s
"""
