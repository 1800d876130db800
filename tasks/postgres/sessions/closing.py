"""The end of sessions that only hold things up (§1.5): which may be ended, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psycopg

from blocks.postgres.server import Connection, Postgres, execute
from runbook.errors import OpsError, Unreachable
from runbook.failpoint import failpoint
from runbook.guard.permit import Permit
from runbook.kinds import action
from tasks.postgres.sessions.connections import IN_TRANSACTION, Session

CLOSE = "close session"
# Between their statements these hold a snapshot for their workers, or a lock for the run: idle by design.
ALWAYS_KEPT = frozenset(
    ("interview-ops", "pg_dump", "pg_dumpall", "pg_restore", "pg_basebackup", "pg_receivewal", "vacuumdb", "reindexdb")
)
END_MILLISECONDS = 5000


@dataclass(frozen=True)
class Closed:
    """What became of a session: closed, or why it was left alone."""

    session: Session
    closed: bool
    why: str


def why_kept(session: Session, applications: Sequence[str], pools: Sequence[str]) -> str:
    """Why an idle session is not to be closed; empty where it may be."""
    if session.superuser:
        return "a superuser's: maintenance"
    if session.application in ALWAYS_KEPT or session.application in applications:
        return f"application {session.application}"
    if session.is_idle_in_transaction:
        return ""
    if session.application in pools:
        return f"a pool's idle connection ({session.application})"
    if session.advisory:
        return "holds an advisory lock"
    if session.statement.lstrip().upper().startswith("LISTEN"):
        return "listens for notifications"
    return ""


@action(idempotent=True)
def close_sessions(
    permit: Permit, postgres: Postgres, sessions: Sequence[Session], min_seconds: float
) -> tuple[Closed, ...]:
    """End sessions, each judged again in the statement that ends it: the same backend, idle as it was, and long enough.
    Those of other databases are other environments' and are never ended.

    Between that look and the signal lie microseconds in which a client may begin to work; it gets a restart's error.

    Raises:
        NotConfirmed: a session is not in the permit.
        OpsError: this login has not the right.
        Unreachable: the server went away.
    """
    for session in sessions:
        permit.require(CLOSE, session.target)
    try:
        with postgres.connect() as connection:
            done = []
            for session in sessions:
                done.append(_close(connection, postgres.database, session, min_seconds))
                failpoint("connections: closed one")
            return tuple(done)
    except psycopg.errors.InsufficientPrivilege:
        raise OpsError(f"{postgres.admin_user} may not end these sessions", "GRANT pg_signal_backend to it") from None
    except Unreachable as error:
        raise Unreachable(f"while sessions were closed: {error.message}", "launch it again: it looks anew") from None


def _close(connection: Connection, database: str, session: Session, min_seconds: float) -> Closed:
    if session.database != database:
        return Closed(session, False, f"left alone: in {session.database}, another environment's")
    states = list(IN_TRANSACTION) if session.is_idle_in_transaction else ["idle"]
    found = execute(connection, _CLOSE, END_MILLISECONDS, session.pid, session.started, states, min_seconds)
    if found:
        ended = bool(found[0][0])
        return Closed(session, ended, "closed" if ended else f"does not end within {END_MILLISECONDS // 1000} s")
    now = execute(connection, _STATE, session.pid, session.started)
    return Closed(session, False, f"left alone: now {now[0][0]}" if now else "gone by itself")


_STATE = "SELECT state FROM pg_stat_activity WHERE pid = %s AND backend_start = %s"
_CLOSE = """
SELECT pg_terminate_backend(pid, %s) FROM pg_stat_activity
WHERE pid = %s AND backend_start = %s AND backend_type = 'client backend' AND state = ANY(%s)
  AND clock_timestamp() - state_change >= make_interval(secs => %s)
"""
