"""Sessions: who is connected, and who waits for whom (§1.5).

https://www.postgresql.org/docs/current/monitoring-stats.html#MONITORING-PG-STAT-ACTIVITY-VIEW
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from psycopg.rows import TupleRow

from blocks.postgres.server import Connection, Postgres, execute
from runbook.kinds import probe
from runbook.masking import masked_statement

IN_TRANSACTION = ("idle in transaction", "idle in transaction (aborted)")
# Characters of a statement.
MOST_READ, MOST_SHOWN = 1000, 300


@dataclass(frozen=True)
class ClientSession:
    """One backend. Times in seconds: in its state, in its transaction, waiting for a lock (0: it does not wait).

    Literals in its statement are masked: they can be passwords or personal data. `waits_for_standby`: its commit waits
    for a synchronous standby.
    """

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
    waits_for_standby: bool = False

    @property
    def is_client(self) -> bool:
        """Whether it counts against max_connections: WAL senders and background workers have separate limits."""
        return self.kind == "client backend"

    @property
    def is_idle_in_transaction(self) -> bool:
        """Whether it holds locks and a snapshot while it waits for its client."""
        return self.is_client and self.state in IN_TRANSACTION

    @property
    def is_idle(self) -> bool:
        """Whether it waits for its client outside a transaction."""
        return self.is_client and self.state == "idle"

    @property
    def target(self) -> str:
        """The permit's target; with the start time, because process ids are reused."""
        return f"{self.pid} since {self.started.isoformat()}"


@dataclass(frozen=True)
class ConnectionLimits:
    """The server's connection limit, the reserved connections, and the limits (-1: none) of the application's database
    and role."""

    most: int
    reserved: int
    of_database: int
    of_role: int
    idle_session_timeout_seconds: float

    @property
    def ordinary(self) -> int:
        """Connections for roles that are not superusers."""
        return self.most - self.reserved

    @property
    def application(self) -> int:
        """The most connections that the application can open."""
        return min(limit for limit in (self.ordinary, self.of_database, self.of_role) if limit >= 0)


@dataclass(frozen=True)
class SessionActivity:
    """All sessions except the reading one, the prepared transactions, and the limits."""

    sessions: tuple[ClientSession, ...]
    prepared: tuple[str, ...]
    limits: ConnectionLimits
    hidden: int
    """Sessions whose state this login cannot read, or that do not report it (track_activities)."""

    @property
    def clients(self) -> tuple[ClientSession, ...]:
        """Those that count against max_connections."""
        return tuple(session for session in self.sessions if session.is_client)

    @property
    def used_ratio(self) -> float:
        """Clients of max_connections, the reading session included."""
        return (len(self.clients) + 1) / self.limits.most

    @property
    def blocked(self) -> tuple[ClientSession, ...]:
        """Those that wait for others."""
        return tuple(session for session in self.sessions if session.blocked_by)


@probe
def read_activity(postgres: Postgres) -> SessionActivity:
    """Sessions and limits at one moment.

    Raises:
        Unreachable: the server does not answer.
        OpsError: it refuses, for example because the connections for superusers are used too.
    """
    with postgres.connect() as connection:
        rows = execute(connection, _SESSIONS, MOST_READ)
        prepared = execute(connection, "SELECT gid || ' in ' || database FROM pg_prepared_xacts ORDER BY prepared")
        limits = _limits(connection, postgres)
    sessions = tuple(_session(row) for row in rows)
    hidden = sum(bool(row[15]) for row in rows)
    return SessionActivity(sessions, tuple(str(row[0]) for row in prepared), limits, hidden)


def _session(row: TupleRow) -> ClientSession:
    *first, statement, blockers, superuser, advisory, _, synchronous = row
    shown, by = masked_statement(statement)[:MOST_SHOWN], tuple(dict.fromkeys(blockers))
    fields = [*first, shown, by, superuser, advisory, synchronous]
    return ClientSession(*fields)


# pg_blocking_pids() locks the whole lock manager for a moment: it is called only for sessions that wait for a lock.
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
       a.query = '<insufficient privilege>' OR coalesce(a.state, '') = 'disabled',
       coalesce(a.wait_event = 'SyncRep', false)
FROM pg_stat_activity a LEFT JOIN pg_roles r ON r.oid = a.usesysid
WHERE a.pid <> pg_backend_pid() ORDER BY a.pid
"""


def _limits(connection: Connection, postgres: Postgres) -> ConnectionLimits:
    return ConnectionLimits(*execute(connection, _LIMITS, postgres.database, postgres.user)[0])


# reserved_connections is new in PostgreSQL 16.
_LIMITS = """
SELECT current_setting('max_connections')::int,
       current_setting('superuser_reserved_connections')::int
       + coalesce(current_setting('reserved_connections', true), '0')::int,
       coalesce((SELECT datconnlimit FROM pg_database WHERE datname = %s), -1),
       coalesce((SELECT CASE WHEN rolsuper THEN -1 ELSE rolconnlimit END FROM pg_roles WHERE rolname = %s), -1),
       (SELECT reset_val::float8 / 1000 FROM pg_settings WHERE name = 'idle_session_timeout')
"""
