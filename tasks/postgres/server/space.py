"""Disk space of WAL and temporary files."""

from __future__ import annotations

from dataclasses import dataclass

from blocks.postgres.server import Postgres, execute
from runbook.kinds import probe


@dataclass(frozen=True)
class ServerSpace:
    """Bytes as the server counts them. `segment_bytes`: of one WAL file."""

    wal_bytes: int
    temporary_bytes: int
    segment_bytes: int


@probe
def read_server_space(postgres: Postgres) -> ServerSpace:
    """The files in pg_wal, and the temporary files of sorts and hashes.

    Raises:
        Unreachable: it is down.
    """
    with postgres.connect() as connection:
        return ServerSpace(*map(int, execute(connection, _SPACE)[0]))


_SPACE = """
SELECT (SELECT coalesce(sum(size), 0) FROM pg_ls_waldir()), (SELECT coalesce(sum(size), 0) FROM pg_ls_tmpdir()),
       pg_size_bytes(current_setting('wal_segment_size'))
"""
