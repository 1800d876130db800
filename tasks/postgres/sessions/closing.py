"""Ending idle sessions (§1.5): which ones are kept, and how the others are ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psycopg

from blocks.postgres.server import Connection, Postgres, execute
from runbook.errors import OpsError, Unreachable
from runbook.failpoint import failpoint
from runbook.guard.permit import Act
from runbook.kinds import action
from tasks.postgres.sessions.connections import IN_TRANSACTION, ClientSession

CLOSE = "close session"
# Idle by design: between their statements they hold a snapshot for their workers, or a lock for the run.
ALWAYS_KEPT = frozenset(
    ("interview-ops", "pg_dump", "pg_dumpall", "pg_restore", "pg_basebackup", "pg_receivewal", "vacuumdb", "reindexdb")
)
END_MILLISECONDS = 5000


@dataclass(frozen=True)
class Closed:
    """The result for one session: closed, or the reason why not. `is_stuck`: it did not end in time."""

    session: ClientSession
    closed: bool
    why: str
    is_stuck: bool = False


def why_kept(session: ClientSession, applications: Sequence[str], pools: Sequence[str]) -> str:
    """The reason to keep an idle session; empty if it can be closed."""
    if session.superuser:
        return "a superuser's session: maintenance"
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


@action(of=lambda sessions: [Act(CLOSE, session.target) for session in sessions], idempotent=True)
def close_sessions(postgres: Postgres, sessions: Sequence[ClientSession], min_seconds: float) -> tuple[Closed, ...]:
    """End sessions. The statement that ends one checks again that it is the same backend, still idle, long enough.

    Sessions of other databases belong to other environments and are never ended. A client that starts to work in the
    microseconds between check and signal gets the error of a restart.

    Raises:
        OpsError: this login lacks the privilege.
        Unreachable: the server stopped answering.
    """
    try:
        with postgres.connect() as connection:
            done = []
            for session in sessions:
                done.append(_close(connection, postgres.database, session, min_seconds))
                failpoint("connections: closed one")
            return tuple(done)
    except psycopg.errors.InsufficientPrivilege:
        hint = f"GRANT pg_signal_backend TO {postgres.admin_user}"
        raise OpsError(f"{postgres.admin_user} cannot end these sessions", hint) from None
    except Unreachable as error:
        raise Unreachable(f"while closing sessions: {error.message}", "run this again: it starts over") from None


def _close(connection: Connection, database: str, session: ClientSession, min_seconds: float) -> Closed:
    if session.database != database:
        return Closed(session, False, f"kept: in {session.database}, of another environment")
    states = list(IN_TRANSACTION) if session.is_idle_in_transaction else ["idle"]
    found = execute(connection, _CLOSE, END_MILLISECONDS, session.pid, session.started, states, min_seconds)
    if found:
        if found[0][0]:
            return Closed(session, True, "closed")
        return Closed(session, False, f"does not end within {END_MILLISECONDS // 1000} s", is_stuck=True)
    now = execute(connection, _STATE, session.pid, session.started)
    return Closed(session, False, f"kept: now {now[0][0]}" if now else "ended before")


_STATE = "SELECT state FROM pg_stat_activity WHERE pid = %s AND backend_start = %s"
_CLOSE = """
SELECT pg_terminate_backend(pid, %s) FROM pg_stat_activity
WHERE pid = %s AND backend_start = %s AND backend_type = 'client backend' AND state = ANY(%s)
  AND clock_timestamp() - state_change >= make_interval(secs => %s)
"""
