"""What vacuum and reindex need alike: a session that waits for no lock for ever, free space for its files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg import errors

from blocks.postgres import Connection, Postgres, execute, first_line
from runbook.errors import OpsError, Unreachable
from runbook.kinds import probe
from runbook.progress import Done
from runbook.render import size
from tasks.host import disk_of

LOCK_SECONDS = 10
MOST_SHOWN = 50
LOCAL = ("localhost", "127.0.0.1", "::1", "")
# The last one ends the work of a run that was killed: else it would hold its locks until it is done.
SESSION = {
    "statement_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
    "transaction_timeout": "0",
    "search_path": "",
    "TimeZone": "UTC",
    "client_connection_check_interval": "2s",
}
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
        settings = {**SESSION, "lock_timeout": f"{int(lock_seconds * 1000)}ms"}
        execute(
            connection,
            "SELECT set_config(s.name, p.value, false) FROM unnest(%s::text[], %s::text[]) AS p(name, value) "
            "JOIN pg_catalog.pg_settings s ON s.name = p.name",
            list(settings),
            list(settings.values()),
        )
        try:
            yield connection
        except psycopg.Error as error:
            raise as_ops_error(error, lock_seconds) from None


def as_ops_error(error: psycopg.Error, lock_seconds: float = 0) -> OpsError:
    """What PostgreSQL said, as something an operator can act on."""
    said = first_line(error)
    match error:
        case errors.LockNotAvailable():
            return OpsError(f"a lock was not to be had within {lock_seconds or LOCK_SECONDS:g} s: {said}", LOCKED_HINT)
        case errors.QueryCanceled() | errors.AdminShutdown():
            return OpsError(f"somebody ended it: {said}", "ask why, and launch it again: it ends well")
        case psycopg.OperationalError():
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
    try:
        if postgres.host not in LOCAL or not Path(path).exists():
            return Space(path, -1)
        return Space(path, disk_of(Path(path)).free_bytes)
    except (OSError, OpsError):
        return Space(path, -1)


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
