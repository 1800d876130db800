"""Sessions: who is connected, who waits for whom, and the end of those that only hold things up (§1.5).

https://www.postgresql.org/docs/current/monitoring-stats.html#MONITORING-PG-STAT-ACTIVITY-VIEW
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import psycopg
from psycopg.rows import TupleRow

from blocks.postgres import Connection, Postgres, execute
from runbook.errors import OpsError, Unreachable
from runbook.failpoint import failpoint
from runbook.kinds import action, probe
from runbook.permit import Permit
from tasks.postgres.masking import masked

CLOSE = "close session"
IN_TRANSACTION = ("idle in transaction", "idle in transaction (aborted)")
# Between their statements these hold a snapshot for their workers, or a lock for the run: idle by design.
ALWAYS_KEPT = frozenset(
    ("interview-ops", "pg_dump", "pg_dumpall", "pg_restore", "pg_basebackup", "pg_receivewal", "vacuumdb", "reindexdb")
)
END_MILLISECONDS = 5000
# Characters of a statement.
MOST_READ, MOST_SHOWN = 1000, 300


@dataclass(frozen=True)
class Session:
    """One backend. Times in seconds: in its present state, in its transaction, waiting for a lock (0: it is not). The
    texts in its statement are masked: they may be a password, or somebody's data."""

    pid: int
    started: datetime
    kind: str
    database: str
    user: str
    application: str
    client: str
    state: str
    state_seconds: float
    transaction_seconds: float
    waited_seconds: float
    statement: str
    blocked_by: tuple[int, ...]
    superuser: bool
    advisory: bool

    @property
    def is_client(self) -> bool:
        """Whether it takes one of max_connections: WAL senders and background workers have limits of their own."""
        return self.kind == "client backend"

    @property
    def is_idle_in_transaction(self) -> bool:
        """It holds locks and snapshots, and does nothing."""
        return self.is_client and self.state in IN_TRANSACTION

    @property
    def is_idle(self) -> bool:
        """It waits for its client, outside a transaction."""
        return self.is_client and self.state == "idle"

    @property
    def target(self) -> str:
        """What a permit names: process ids are used again."""
        return f"{self.pid} since {self.started.isoformat()}"


@dataclass(frozen=True)
class Limits:
    """How many clients the server takes, how many of these places ordinary roles may use, and narrower limits
    (-1: none) of the application's database and role."""

    most: int
    reserved: int
    of_database: int
    of_role: int
    idle_session_timeout_seconds: float

    @property
    def ordinary(self) -> int:
        """Places for roles that are no superusers."""
        return self.most - self.reserved

    @property
    def application(self) -> int:
        """Places that the application may use at best."""
        return min(limit for limit in (self.ordinary, self.of_database, self.of_role) if limit >= 0)


@dataclass(frozen=True)
class Activity:
    """All sessions but the one that read them, the transactions that no session holds, and the limits."""

    sessions: tuple[Session, ...]
    prepared: tuple[str, ...]
    limits: Limits
    hidden: int
    """Sessions of which this login may not see what they do, or which do not tell (track_activities)."""

    @property
    def clients(self) -> tuple[Session, ...]:
        """Those that count against max_connections."""
        return tuple(session for session in self.sessions if session.is_client)

    @property
    def used_ratio(self) -> float:
        """Clients of max_connections, the reading session included."""
        return (len(self.clients) + 1) / self.limits.most

    @property
    def blocked(self) -> tuple[Session, ...]:
        """Those that wait for others."""
        return tuple(session for session in self.sessions if session.blocked_by)


@dataclass(frozen=True)
class Closed:
    """What became of a session: closed, or why it was left alone."""

    session: Session
    closed: bool
    why: str


@probe
def read_activity(postgres: Postgres) -> Activity:
    """Sessions and limits, of one moment.

    Raises:
        Unreachable: the server does not answer.
        OpsError: it refuses, for instance since the places for superusers are taken too.
    """
    with postgres.connect() as connection:
        rows = execute(connection, _SESSIONS, MOST_READ)
        prepared = execute(connection, "SELECT gid || ' in ' || database FROM pg_prepared_xacts ORDER BY prepared")
        limits = _limits(connection, postgres)
    sessions = tuple(_session(row) for row in rows)
    hidden = sum(bool(row[15]) for row in rows)
    return Activity(sessions, tuple(str(row[0]) for row in prepared), limits, hidden)


def _session(row: TupleRow) -> Session:
    *told, statement, blockers, superuser, advisory, _ = row
    fields = [*told, masked(statement)[:MOST_SHOWN], tuple(dict.fromkeys(blockers)), superuser, advisory]
    return Session(*fields)


# pg_blocking_pids() stops the whole lock manager for a moment: asked only for those that wait for a lock.
_SESSIONS = """
SELECT a.pid, coalesce(a.backend_start, 'epoch'), coalesce(a.backend_type, ''), coalesce(a.datname, ''),
       coalesce(a.usename, ''), coalesce(a.application_name, ''), coalesce(host(a.client_addr), 'local'),
       coalesce(a.state, ''),
       coalesce(extract(epoch FROM clock_timestamp() - a.state_change), 0)::float8,
       coalesce(extract(epoch FROM clock_timestamp() - a.xact_start), 0)::float8,
       coalesce((SELECT extract(epoch FROM clock_timestamp() - min(l.waitstart)) FROM pg_locks l
                 WHERE l.pid = a.pid AND NOT l.granted), 0)::float8,
       left(coalesce(a.query, ''), %s),
       CASE WHEN a.wait_event_type = 'Lock' THEN pg_blocking_pids(a.pid) ELSE '{}' END,
       coalesce(r.rolsuper, false),
       EXISTS (SELECT FROM pg_locks l WHERE l.pid = a.pid AND l.locktype = 'advisory' AND l.granted),
       a.query = '<insufficient privilege>' OR coalesce(a.state, '') = 'disabled'
FROM pg_stat_activity a LEFT JOIN pg_roles r ON r.oid = a.usesysid
WHERE a.pid <> pg_backend_pid() ORDER BY a.pid
"""


def _limits(connection: Connection, postgres: Postgres) -> Limits:
    return Limits(*execute(connection, _LIMITS, postgres.database, postgres.user)[0])


# reserved_connections is new in PostgreSQL 16.
_LIMITS = """
SELECT current_setting('max_connections')::int,
       current_setting('superuser_reserved_connections')::int
       + coalesce(current_setting('reserved_connections', true), '0')::int,
       coalesce((SELECT datconnlimit FROM pg_database WHERE datname = %s), -1),
       coalesce((SELECT CASE WHEN rolsuper THEN -1 ELSE rolconnlimit END FROM pg_roles WHERE rolname = %s), -1),
       (SELECT setting::float8 / 1000 FROM pg_settings WHERE name = 'idle_session_timeout')
"""


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
