"""A lower priority for a dump, where the server runs on this host: for its sessions in the server, if this process may
set it, and for its own processes.

The server's processes print every row, for pg_dump and for the manifest. With few processors they delay the
application's requests; the nice value of pg_dump does not change that. Root, or the server's user, may lower a process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg

from blocks.postgres.server import Connection, Postgres, execute
from runbook.errors import OpsError
from tasks.host import priority
from tasks.host.disk import is_here

NICE = 5
"""A third of an application's share: a dump on a busy host still ends, and its snapshot with it."""
LEAST_BYTES = 64 << 20
"""A smaller dump is over within a second."""
POLL_SECONDS, MOST_POLL_SECONDS = 0.1, 5.0
_SESSIONS = """
SELECT pid FROM pg_stat_activity WHERE datname = %s AND application_name = 'interview-ops' AND pid <> pg_backend_pid()
  AND backend_start >= (SELECT backend_start FROM pg_stat_activity WHERE pid = %s)
"""


def limit_workers(exporter: Connection, jobs: int) -> int:
    """Let at most half as many processes read the manifest as pg_dump has; returns the parallel workers beside the
    session itself. The server's own limit stays."""
    return int(execute(exporter, _LIMIT, max(0, jobs // 2 - 1))[0][0])


_LIMIT = """
SELECT set_config(name, least(current_setting(name)::int, %s)::text, false)
FROM (VALUES ('max_parallel_workers_per_gather')) AS one(name)
"""


@contextmanager
def lowered(postgres: Postgres, exporter: Connection, read_bytes: int) -> Iterator[Callable[[int], None]]:
    """While the block runs, give the exporter's session, this project's later ones in the database and pg_dump with
    this process a lower priority. Processes that still run afterwards (a connection pool's) get the old one again.
    Yields a function that lowers one of the server's at once, by its number.

    Nothing changes if less than `LEAST_BYTES` are read, if the server runs on another host or in a container, or if
    this process may not do it.
    """
    data = Path(postgres.data_directory).resolve()
    if read_bytes < LEAST_BYTES or not is_here(postgres.host):
        yield lambda _: None
        return
    ended, lowering, before = threading.Event(), threading.Lock(), dict[int, tuple[int, int]]()

    def lower(pid: int) -> None:
        with lowering, suppress(OSError):
            if pid not in before and _is_server(pid, data):
                before[pid] = priority.read(pid)
                priority.assign(pid, *(max(value, NICE) for value in before[pid]))

    def watch() -> None:
        pause = POLL_SECONDS  # pg_dump's sessions start within the first seconds
        with suppress(OpsError, psycopg.Error), postgres.connect() as connection:
            while not ended.wait(pause):
                for (pid,) in execute(connection, _SESSIONS, postgres.database, exporter.info.backend_pid):
                    lower(pid)
                pause = min(1.5 * pause, MOST_POLL_SECONDS)

    with ThreadPoolExecutor(1) as pool, priority.session_lowered(NICE):
        pool.submit(watch)
        try:
            yield lower
        finally:
            ended.set()
    for pid, values in before.items():
        if _is_server(pid, data):
            with suppress(OSError):
                priority.assign(pid, *values)


def _is_server(pid: int, data: Path) -> bool:
    """Whether it is a process of the server with that data directory: in a container the same number is another's."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cwd").readlink() == data
    return False
