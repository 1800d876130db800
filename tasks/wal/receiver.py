"""The position of the WAL receiver, as its primary sees it."""

from __future__ import annotations

from blocks.postgres.server import Postgres, execute
from runbook.errors import OpsError, Unreachable
from runbook.kinds import probe
from runbook.wait import until
from tasks.wal.format.names import lsn_of

PATIENCE_SECONDS = 60.0
"""pg_receivewal reports the end of a segment with its next status only, by default every 10 s (`--status-interval`),
and on a busy host later."""


@probe
def read_flushed(postgres: Postgres) -> int:
    """The LSN up to which the primary has WAL on disk: it acknowledged no commit after that. 0: no primary answers."""
    try:
        with postgres.connect() as connection:
            if execute(connection, "SELECT pg_is_in_recovery()")[0][0]:
                return 0
            return lsn_of(str(execute(connection, "SELECT pg_current_wal_flush_lsn()")[0][0]))
    except (OpsError, Unreachable):
        return 0


@probe
def wait_received(postgres: Postgres, name: str) -> bool:
    """Wait until the receiver of that application_name has on disk what the primary has now. False: no primary answers,
    or the receiver does not stream."""
    try:
        with postgres.connect() as connection:
            if execute(connection, "SELECT pg_is_in_recovery()")[0][0]:
                return False
            wanted = lsn_of(str(execute(connection, "SELECT pg_current_wal_flush_lsn()")[0][0]))

            def received() -> bool:
                rows = execute(connection, _FLUSHED, name)
                if not rows:
                    raise OpsError(f"{name} does not stream")
                return lsn_of(str(rows[0][0])) >= wanted

            return until(received, what=f"{name}'s flush", seconds=PATIENCE_SECONDS, every_seconds=0.05)
    except (OpsError, Unreachable):
        return False


_FLUSHED = """
SELECT coalesce(flush_lsn, '0/0') FROM pg_stat_replication WHERE application_name = %s AND state = 'streaming'
"""
