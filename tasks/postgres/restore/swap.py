"""The swap: rename both databases in one transaction while clients keep reconnecting.

The rename comes first: its lock blocks new logins while a second session ends the old ones (measured: 15 of 15 swaps
with 40 reconnecting clients; ending sessions first failed in 6 of 15). A kill at any point rolls the transaction back.
https://www.postgresql.org/docs/current/sql-alterdatabase.html
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

import psycopg
from psycopg import sql

from blocks.postgres.server import Connection, Postgres, execute, first_line, refuse_pooler
from runbook.current import removed
from runbook.errors import Locked, OpsError, Unreachable, VerificationFailed
from runbook.failpoint import failpoint
from runbook.guard.permit import Act
from runbook.kinds import action
from runbook.wait import until
from tasks.postgres.restore.staged_copy import REPLACE, Copy, name_beside, oid_of, staged_database
from tasks.postgres.restore.superseded import UNDONE, SupersededDatabase, writes_of

UNDO = "swap back database"


@dataclass(frozen=True)
class Swapped:
    """The live database, the kept name of the old one (empty: there was none), and the clients' outage."""

    live: str
    kept: str
    outage_seconds: float


@contextmanager
def advisory_lock(postgres: Postgres) -> Iterator[Connection]:
    """A session that holds this database's advisory lock, in the maintenance database.

    The environment's lock alone is not enough: a lost lease frees it while the run continues.

    Raises:
        Locked: another session holds it.
        OpsError: a connection pooler answers instead of the server.
    """
    key = lock_key(postgres.database)
    with postgres.connect() as connection:
        refuse_pooler(connection)
        if not execute(connection, "SELECT pg_try_advisory_lock(%s)", key)[0][0]:
            holder = execute(connection, _HOLDER, key & 0xFFFFFFFF)
            who = f"process {holder[0][0]} since {holder[0][1]:%H:%M:%S}" if holder else "another session"
            raise Locked(
                f"{who} of the database server is already replacing {postgres.database}",
                "wait for its end; a session whose client died ends within seconds",
            )
        yield connection


_HOLDER = """
SELECT l.pid, a.backend_start FROM pg_locks l JOIN pg_stat_activity a USING (pid)
WHERE l.locktype = 'advisory' AND l.granted AND l.objid::bigint = %s
"""


Gate = Callable[[], None]
"""Called when the live database has no session, and before another takes its name; what it raises rolls the swap
back."""


@action(of=lambda postgres: Act(REPLACE, postgres.database))
def swap_databases(
    postgres: Postgres, live_oid: int, backup: str, gate: Gate, guard: Connection, copy: Copy
) -> Swapped:
    """Give the copy the live name, and keep the old database under another.

    Raises:
        VerificationFailed: one of the names belongs to another database than the judged one.
        OpsError: a session cannot be ended, or a prepared transaction blocks the rename.
    """
    kept = _kept_name(guard, postgres.database) if live_oid else ""
    moves = [(postgres.database, kept, live_oid), (copy.database, postgres.database, copy.oid)]
    outage = exchange(postgres, guard, moves, by=backup, gate=gate)
    removed(staged_database(copy.database))
    return Swapped(postgres.database, kept, outage)


@action(of=lambda old: Act(UNDO, old.name))
def swap_back(postgres: Postgres, old: SupersededDatabase, live_oid: int, gate: Gate, guard: Connection) -> Swapped:
    """Give a superseded database its name and comment back, and keep the current one."""
    kept = _kept_name(guard, postgres.database) if live_oid else ""
    moves = [(postgres.database, kept, live_oid), (old.name, postgres.database, oid_of(guard, old.name))]
    outage = exchange(postgres, guard, moves, by=UNDONE, comment=old.comment, gate=gate)
    return Swapped(postgres.database, kept, outage)


def _kept_name(connection: Connection, database: str) -> str:
    def free_name() -> str:
        name = name_beside(database, f"__old_{datetime.now(UTC):%Y%m%d_%H%M%S}")
        return "" if oid_of(connection, name) else name

    return until(free_name, what="a free name for the old database", seconds=5)


def exchange(
    postgres: Postgres,
    guard: Connection,
    renames: list[tuple[str, str, int]],
    *,
    by: str,
    comment: str | None = None,
    gate: Gate,
) -> float:
    """Rename databases (from, to, OID) in one transaction; returns the clients' outage in seconds.

    The one that becomes live gets `comment`, if given. If the session is lost at the commit, the names decide.

    Raises:
        OpsError: the session was lost, with its lock. Nothing was swapped.
        SwapUnknown: the session was lost at the commit, and its result is unknown.
    """
    moves = [move for move in renames if move[2]]
    session, committing = 0 if guard.closed else guard.info.backend_pid, threading.Event()
    started = time.monotonic()
    try:
        execute(guard, "SET lock_timeout = '20s'")
        with guard.transaction(), _ending_sessions(postgres, [move[0] for move in moves]):
            _exchange(guard, moves, by, comment, gate)
            committing.set()
    except psycopg.OperationalError as error:
        _, live, oid = moves[-1]
        if not (committing.is_set() and guard.closed and was_swapped(postgres, session, live, oid)):
            raise OpsError(
                f"the swapping session was lost: {first_line(error)}",
                "check the server's log, then run this again. Nothing was swapped",
            ) from None
    failpoint("swap: after commit")
    return time.monotonic() - started


def _exchange(guard: Connection, moves: list[tuple[str, str, int]], by: str, comment: str | None, gate: Gate) -> None:
    _require_identity(guard, moves)
    for number, (old, new, _) in enumerate(moves, 1):
        failpoint(f"swap: before rename {number}")
        _rename(guard, old, new)
        failpoint(f"swap: after rename {number}")
        if number == 1:
            gate()
    if len(moves) == 2:
        _label(guard, kept=moves[0][1], live=moves[1][1], by=by)
    if comment is not None:
        live = sql.Identifier(moves[-1][1])
        guard.execute(sql.SQL("COMMENT ON DATABASE {} IS {}").format(live, comment or None))
    failpoint("swap: before commit")


def _require_identity(connection: Connection, moves: list[tuple[str, str, int]]) -> None:
    for old, _, oid in moves:
        if oid_of(connection, old) != oid:
            raise VerificationFailed(
                f"{old} is another database than the judged one",
                "run this again: somebody replaced it meanwhile",
            )


def _rename(connection: Connection, old: str, new: str) -> None:
    try:
        connection.execute(sql.SQL("ALTER DATABASE {} RENAME TO {}").format(sql.Identifier(old), sql.Identifier(new)))
    except psycopg.errors.ObjectInUse as error:
        raise OpsError(
            f"{old} could not be renamed: {error.diag.message_detail or error.diag.message_primary}",
            "end the sessions or prepared transactions that use it, then run this again. Nothing was swapped",
        ) from None
    except psycopg.errors.LockNotAvailable:
        hint = "run this again. Nothing was swapped"
        raise OpsError(f"{old} could not be locked within 20 s", hint) from None


@contextmanager
def _ending_sessions(postgres: Postgres, databases: list[str]) -> Iterator[None]:
    """A second session ends every session in the databases until the end of the block."""
    stop = threading.Event()

    def end_them() -> None:
        # If the server stops, the swapping session fails too, and reports it.
        with contextlib.suppress(Unreachable), postgres.connect() as connection:
            while not stop.is_set():
                execute(
                    connection,
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = ANY(%s) AND backend_type = 'client backend'",
                    databases,
                )
                stop.wait(0.02)

    thread = threading.Thread(target=end_them, name="end sessions", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _label(connection: Connection, *, kept: str, live: str, by: str) -> None:
    """Label the kept database with the backup that replaced it and its own comment."""
    comment = execute(connection, _COMMENT, kept)[0][0]
    writes = writes_of(connection, live)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    lsn = int(execute(connection, "SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn")[0][0])
    note = {"superseded": now, "by": by, "writes": writes, "lsn": lsn, "comment": comment}
    label = json.dumps(note, ensure_ascii=False)
    connection.execute(sql.SQL("COMMENT ON DATABASE {} IS {}").format(sql.Identifier(kept), label))


_COMMENT = "SELECT coalesce(shobj_description(oid, 'pg_database'), '') FROM pg_database WHERE datname = %s"

RESULT_SECONDS = 60.0


class SwapUnknown(OpsError):
    """The session was lost at the commit, and it is unknown whether the names were swapped."""


def lock_key(database: str) -> int:
    """The key of the advisory lock under which a database is replaced."""
    return int.from_bytes(hashlib.sha256(f"interview-ops {database}".encode()).digest()[:8], "big", signed=True)


def was_swapped(postgres: Postgres, session: int, name: str, oid: int) -> bool:
    """Whether `name` belongs to the database with that OID. The lost session (a process id) is ended first: its COMMIT
    could still arrive.

    Raises:
        SwapUnknown: the server does not answer, or the session does not end.
    """

    def result() -> str:
        with postgres.connect() as connection:
            if execute(connection, _END, lock_key(postgres.database) & 0xFFFFFFFF, session):
                return ""
            return "swapped" if oid_of(connection, name) == oid else "as before"

    try:
        return until(result, what="the end of that session", seconds=RESULT_SECONDS, every_seconds=0.2) == "swapped"
    except (OpsError, psycopg.Error):
        raise SwapUnknown(
            f"the swapping session was lost and the server does not answer: it is unknown whether {name} was replaced",
            f"start the server, then read the OID of {name} in pg_database. If it is {oid}, the swap is done: do not "
            "run this again. Otherwise nothing was swapped: run this again",
        ) from None


# By its lock: the process id alone may be reused.
_END = """
SELECT pg_terminate_backend(pid) FROM pg_locks
WHERE locktype = 'advisory' AND granted AND objid::bigint = %s AND pid = %s
"""
