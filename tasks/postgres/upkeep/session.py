"""What vacuum and reindex need alike: a session that waits for no lock for ever, free space for its files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg import errors

from blocks.postgres.server import Connection, Postgres, execute, first_line
from runbook.errors import OpsError, Unreachable
from runbook.kinds import probe
from runbook.progress import Done
from runbook.units import size
from tasks.host.disk import disk_on

LOCK_SECONDS = 10
MOST_SHOWN = 50
# A database's own (ALTER DATABASE … SET) are for its clients.
NO_TIMEOUTS = {
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
    "transaction_timeout": "0",
}
# The last one ends the work of a run that was killed: else it would hold its locks until it is done.
SESSION = {**NO_TIMEOUTS, "search_path": "", "TimeZone": "UTC", "client_connection_check_interval": "2s"}
LOCKED_HINT = (
    "see who holds it: SELECT pid, mode, relation::regclass FROM pg_locks WHERE granted AND relation IS NOT NULL "
    "ORDER BY mode; end that session or wait, and launch this again"
)


def done_of(rows: Sequence[Sequence[Any]]) -> Done:
    """What PostgreSQL's progress views say (relation, phase, bytes done, bytes in all) as a line and the part done."""
    line = "; ".join(f"{name}: {phase}, {size(done)} of {size(whole)}" for name, phase, done, whole in rows) or "…"
    return Done(line, sum(row[2] for row in rows) / max(sum(row[3] for row in rows), 1))


@contextmanager
def upkeep_session(postgres: Postgres, lock_seconds: float = 0) -> Iterator[Connection]:
    """A session in the application's database without timeouts, but for locks (0: `LOCK_SECONDS`).

    Raises:
        Unreachable: the server went away, or this session was ended.
        OpsError: a lock was not to be had within `lock_seconds`, or the server refused a statement.
    """
    lock_seconds = lock_seconds or LOCK_SECONDS
    with postgres.connect(postgres.database) as connection:
        set_known(connection, {**SESSION, "lock_timeout": f"{int(lock_seconds * 1000)}ms"})
        try:
            yield connection
        except psycopg.Error as error:
            raise as_ops_error(error, lock_seconds) from None


def set_known(connection: Connection, settings: Mapping[str, str]) -> str:
    """Set what of these this server's version knows; returns the same for a program's PGOPTIONS."""
    rows = execute(
        connection,
        "SELECT s.name, p.value, set_config(s.name, p.value, false) "
        "FROM unnest(%s::text[], %s::text[]) AS p(name, value) "
        "JOIN pg_catalog.pg_settings s ON lower(s.name) = lower(p.name)",
        list(settings),
        list(settings.values()),
    )
    return " ".join(f"-c {name}={value}" for name, value, _ in rows)


@contextmanager
def refusals(connection: Connection, lock_seconds: float = 0) -> Iterator[None]:
    """What PostgreSQL refuses in the block, as something an operator can act on. That the session broke off, or that a
    standby's recovery cancelled it, is told by its own block (`Postgres.connect`).

    Raises:
        OpsError: a lock was not to be had within the session's `lock_timeout`, or a statement was refused.
    """
    try:
        yield
    except psycopg.Error as error:
        if connection.broken or isinstance(error, errors.SerializationFailure):
            raise
        raise as_ops_error(error, lock_seconds) from None


def as_ops_error(error: psycopg.Error, lock_seconds: float = 0) -> OpsError:
    """What PostgreSQL said, as something an operator can act on."""
    said = first_line(error)
    match error:
        case errors.LockNotAvailable():
            return OpsError(f"a lock was not to be had within {lock_seconds or LOCK_SECONDS:g} s: {said}", LOCKED_HINT)
        case errors.QueryCanceled() | errors.AdminShutdown():
            return OpsError(f"somebody ended it: {said}", "ask why, and launch it again: it ends well")
        case errors.DiskFull():
            return OpsError(f"the disk is full: {said}", "free space there, and launch this again")
        case errors.IoError():
            return OpsError(
                f"the server cannot read or write a file: {said}",
                "look at the disk (dmesg, the server's log); check-corruption tells what of the database is hit",
            )
        case errors.DeadlockDetected():
            return OpsError(f"another session stood in the way, and this one in its: {said}", "launch it again")
        case errors.SerializationFailure():  # by a standby's recovery
            return Unreachable(f"it was cancelled: {said}", "launch it again; hot_standby_feedback = on prevents it")
        case psycopg.OperationalError() if (error.sqlstate or "08").startswith(("08", "57P")):
            return Unreachable(f"the server went away: {said}", "start it, look at its log, and launch this again")
    return OpsError(f"PostgreSQL refuses: {said}", "correct that, and launch this again")


@dataclass(frozen=True)
class Space:
    """Free bytes on the file system of a tablespace; −1 where this host cannot see it."""

    path: str
    free_bytes: int


@probe
def read_space(postgres: Postgres, tablespaces: Sequence[str] = ()) -> tuple[Space, ...]:
    """Free space in the data directory and in these tablespaces' directories."""
    return tuple(
        _space(postgres, path) for path in dict.fromkeys((postgres.data_directory, *filter(None, tablespaces)))
    )


def _space(postgres: Postgres, path: str) -> Space:
    disk = disk_on(postgres.host, Path(path))
    return Space(path, disk.free_bytes if disk else -1)


def resolve(wanted: Sequence[str], known: Sequence[tuple[str, str, str]], what: str) -> list[str]:
    """The quoted names behind what an operator typed: `name`, `schema.name`, or quoted as PostgreSQL prints it.

    `known` are (quoted name, schema, name). An exact name goes before a bare one.

    Raises:
        OpsError: there is none, or a bare name is in several schemas.
    """
    chosen: dict[str, None] = {}
    for typed in (text.strip() for text in wanted):
        exact = [quoted for quoted, schema, name in known if typed in (quoted, f"{schema}.{name}")]
        found = exact or [quoted for quoted, _, name in known if typed == name]
        if not found:
            raise OpsError(f"there is no {what} {typed or '“”'}", "type it as schema.name; the check lists them")
        if len(found) > 1:
            raise OpsError(f"{what} {typed} is in several schemas: {', '.join(found)}", "type it with its schema")
        chosen[found[0]] = None
    return list(chosen)
