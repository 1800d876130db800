"""Sessions for vacuum and reindex: without timeouts but with a lock timeout; errors for operators; free disk space."""

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
from runbook.progress import WorkDone
from runbook.units import size
from tasks.host.disk import disk_on

LOCK_SECONDS = 10
MOST_SHOWN = 50
# The last one ends the work of a killed run: otherwise it would hold its locks until it is done.
SESSION = {"search_path": "", "TimeZone": "UTC", "client_connection_check_interval": "2s"}
LOCKED_HINT = (
    "find the holder: SELECT pid, mode, relation::regclass FROM pg_locks WHERE granted AND relation IS NOT NULL "
    "ORDER BY mode; end that session or wait, then run this again"
)


def done_of(rows: Sequence[Sequence[Any]]) -> WorkDone:
    """Rows of a progress view (relation, phase, bytes done, total bytes) as one line and a ratio."""
    line = "; ".join(f"{name}: {phase}, {size(done)} of {size(whole)}" for name, phase, done, whole in rows) or "…"
    return WorkDone(line, sum(row[2] for row in rows) / max(sum(row[3] for row in rows), 1))


@contextmanager
def upkeep_session(postgres: Postgres, lock_seconds: float = 0) -> Iterator[Connection]:
    """A session in the application's database without timeouts except for locks (0: `LOCK_SECONDS`).

    Raises:
        Unreachable: the server stopped, or ended this session.
        OpsError: a lock was not available within `lock_seconds`, or the server refused a statement.
    """
    lock_seconds = lock_seconds or LOCK_SECONDS
    with postgres.connect(postgres.database) as connection:
        set_known(connection, {**SESSION, "lock_timeout": f"{int(lock_seconds * 1000)}ms"})
        try:
            yield connection
        except psycopg.Error as error:
            raise as_ops_error(error, lock_seconds) from None


def set_known(connection: Connection, settings: Mapping[str, str]) -> str:
    """Set those settings that this server's version has; returns them for a program's PGOPTIONS."""
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
    """Translate PostgreSQL's errors in the block for operators.

    `Postgres.connect` translates a lost session, and a standby's cancellation.

    Raises:
        OpsError: a lock was not available within the session's `lock_timeout`, or a statement was refused.
    """
    try:
        yield
    except psycopg.Error as error:
        if connection.broken or isinstance(error, errors.SerializationFailure):
            raise
        raise as_ops_error(error, lock_seconds) from None


def as_ops_error(error: psycopg.Error, lock_seconds: float = 0) -> OpsError:
    """PostgreSQL's error with a next step for operators."""
    text = first_line(error)
    match error:
        case errors.LockNotAvailable():
            seconds = lock_seconds or LOCK_SECONDS
            return OpsError(f"the lock was not available within {seconds:g} s: {text}", LOCKED_HINT)
        case errors.QueryCanceled() | errors.AdminShutdown():
            return OpsError(f"somebody cancelled it: {text}", "find out why, then run this again: it is safe")
        case errors.DiskFull():
            return OpsError(f"the disk is full: {text}", "free disk space there, then run this again")
        case errors.IoError():
            return OpsError(
                f"the server cannot read or write a file: {text}",
                "check the disk (dmesg, the server's log); run check-corruption to find damaged tables",
            )
        case errors.DeadlockDetected():
            return OpsError(f"a deadlock with another session: {text}", "run this again")
        case errors.SerializationFailure():  # by a standby's recovery
            return Unreachable(f"it was cancelled: {text}", "run this again; hot_standby_feedback = on prevents it")
        case psycopg.OperationalError() if (error.sqlstate or "08").startswith(("08", "57P")):
            return Unreachable(f"the server stopped: {text}", "start it, check its log, then run this again")
    return OpsError(f"PostgreSQL refuses: {text}", "correct that, then run this again")


@dataclass(frozen=True)
class Space:
    """Free bytes on the file system of a tablespace; −1 if this host cannot measure it."""

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
    """The quoted names for an operator's input: `name`, `schema.name`, or quoted as PostgreSQL prints it.

    `known`: (quoted name, schema, name). A full name has priority over a bare one.

    Raises:
        OpsError: there is none, or a bare name is in several schemas.
    """
    chosen: dict[str, None] = {}
    for typed in (text.strip() for text in wanted):
        exact = [quoted for quoted, schema, name in known if typed in (quoted, f"{schema}.{name}")]
        found = exact or [quoted for quoted, _, name in known if typed == name]
        if not found:
            raise OpsError(f"there is no {what} {typed or '“”'}", "enter it as schema.name; the check lists them")
        if len(found) > 1:
            raise OpsError(f"{what} {typed} is in several schemas: {', '.join(found)}", "enter it with its schema")
        chosen[found[0]] = None
    return list(chosen)
