"""A lower priority for a dump, where the server runs on this host: for its sessions in the server, if this process may
set it, and for its own processes.

The server's processes print every row, for pg_dump and for the manifest. With few processors they delay the
application's requests; the nice value of pg_dump does not change that. Root, or the server's user, may lower a process.
Where the kernel groups processes by session (autogroups), a nice value counts only within a session, and each server
process has its own: there the group's value counts. https://man7.org/linux/man-pages/man7/sched.7.html
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg

from blocks.postgres.server import Connection, Postgres, execute
from runbook.errors import OpsError
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
                before[pid] = _read(pid)
                _set(pid, *(max(value, NICE) for value in before[pid]))

    def watch() -> None:
        pause = POLL_SECONDS  # pg_dump's sessions start within the first seconds
        with suppress(OpsError, psycopg.Error), postgres.connect() as connection:
            while not ended.wait(pause):
                for (pid,) in execute(connection, _SESSIONS, postgres.database, exporter.info.backend_pid):
                    lower(pid)
                pause = min(1.5 * pause, MOST_POLL_SECONDS)

    with ThreadPoolExecutor(1) as pool, _own_session():
        pool.submit(watch)
        try:
            yield lower
        finally:
            ended.set()
    for pid, values in before.items():
        if _is_server(pid, data):
            with suppress(OSError):
                _set(pid, *values)


@contextmanager
def _own_session() -> Iterator[None]:
    """The autogroup of this process and of the programs that it starts. A worker starts each flow in a session of its
    own; a shell's session is left as it is."""
    group = _autogroup(os.getpid())
    if os.getsid(0) != os.getpid() or not group.exists():
        yield
        return
    before = _nice_of(group)
    with suppress(OSError):
        group.write_text(str(max(before, NICE)))
    try:
        yield
    finally:
        with suppress(OSError):
            group.write_text(str(before))


def _is_server(pid: int, data: Path) -> bool:
    """Whether it is a process of the server with that data directory: in a container the same number is another's."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cwd").readlink() == data
    return False


def _read(pid: int) -> tuple[int, int]:
    """The nice values of a process and of its autogroup (`/autogroup-25 nice 0`); 0 where the kernel has none."""
    return os.getpriority(os.PRIO_PROCESS, pid), _nice_of(_autogroup(pid))


def _nice_of(group: Path) -> int:
    """0 where there is no group: the file is missing (no such kernel) or empty (no session since the host's start)."""
    words = group.read_text().split() if group.exists() else []
    return int(words[-1]) if words else 0


def _set(pid: int, nice: int, of_group: int) -> None:
    os.setpriority(os.PRIO_PROCESS, pid, nice)
    if (group := _autogroup(pid)).exists():
        group.write_text(str(of_group))


def _autogroup(pid: int) -> Path:
    return Path(f"/proc/{pid}/autogroup")
