"""Since when a PostgreSQL server runs."""

from __future__ import annotations

from dataclasses import dataclass

from blocks.postgres.server import Postgres, execute
from runbook.kinds import probe

RECOVERY_SECONDS = 10.0
"""The checkpointer starts with the server. One that is this much younger was started again, after a crash."""


@dataclass(frozen=True)
class PostgresUptime:
    """Seconds since the start of the server, and since the start of its present processes: one process that crashes
    ends all sessions, and the server starts its processes again.

    https://www.postgresql.org/docs/current/runtime-config-error-handling.html#GUC-RESTART-AFTER-CRASH
    """

    server_seconds: float
    processes_seconds: float

    @property
    def crashed(self) -> bool:
        """Whether a process crashed since the server's start."""
        return self.server_seconds - self.processes_seconds > RECOVERY_SECONDS

    @property
    def seconds(self) -> float:
        """Since when clients can have kept their sessions."""
        return self.processes_seconds if self.crashed else self.server_seconds


@probe
def read_uptime(postgres: Postgres) -> PostgresUptime:
    """The start times of the server and of its checkpointer.

    Raises:
        Unreachable, OpsError: the server does not answer or refuses.
    """
    with postgres.connect() as connection:
        server, processes = execute(connection, _UPTIME)[0]
    return PostgresUptime(server, server if processes is None else processes)


_UPTIME = """
SELECT extract(epoch FROM clock_timestamp() - pg_postmaster_start_time())::float8,
       (SELECT extract(epoch FROM clock_timestamp() - backend_start)::float8
        FROM pg_stat_activity WHERE backend_type = 'checkpointer')
"""
