"""Where it is measured: a lab of its own, taken down at the end, and what is done to it between two measurements."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
from psycopg import sql

from lab import lifecycle
from lab.client import Lab
from lab.progress import Tell, silent
from lab.state.base import CHECKOUT, base_directory
from runbook import shell
from runbook.errors import OpsError
from runbook.wait import until

NAME = "bench"
DATABASE = "grc_db"
# Of the data: a database, the one it replaces, a copy, each on two nodes; dumps and base backups; WAL in two archives;
# the cluster for pgBackRest. Beside it: WAL that two nodes and the receiver keep, whatever the size of the data.
SPACE_RATIO, SPACE_MEGABYTES = 18, 8192
GROWN_RATIO = 7
"""Where only the newest backups and their WAL are kept."""
TABLES = ("users", "interview_sessions", "interview_messages", "evaluations", "audit_events")
SMOKE_ROWS = 10
# A session's counts come when it ends, a moment after its client has gone, or when they are asked for.
COUNTED = "; SELECT pg_stat_force_next_flush()"
# Every 25th row: less than what calls autovacuum or autoanalyze (5 % in the lab), which would take a side's work away.
MAKE_DEAD = (
    "UPDATE public.interview_messages SET id = id WHERE hashtext(id::text) % 25 = 0",
    "UPDATE public.audit_events SET id = id WHERE hashtext(id::text) % 25 = 0",
)
DEAD = """
SELECT coalesce(sum(n_dead_tup), 0) FROM pg_stat_user_tables WHERE relname IN ('interview_messages', 'audit_events')
"""
_BASE = "OPS_LAB_BASE"
QUIET_SECONDS, QUIET_TIMES, QUIET_MOST_SECONDS = 0.3, 2, 30.0
QUIET_IDLE = 0.88
"""Of all cores; the bench lab by itself leaves 0.95 to 0.98."""


@dataclass(frozen=True)
class Called:
    """One call of a flow: `seconds` of the call, its steps (name, begun after seconds, took seconds), its facts, and
    where its report is."""

    seconds: float
    steps: tuple[tuple[str, float, float], ...]
    facts: dict[str, str]
    report: str = ""

    @property
    def beside_steps_seconds(self) -> float:
        """Wall time in which no step ran."""
        covered, end = 0.0, 0.0
        for _, began, took in sorted(self.steps, key=lambda step: step[1]):
            covered += max(0.0, began + took - max(began, end))
            end = max(end, began + took)
        return self.seconds - covered

    def from_to(self, first: str, last: str) -> float:
        """Seconds from the beginning of the first step of that name to the end of the last one of the other."""
        begins = min(began for step, began, _ in self.steps if step == first)
        return max(began + took for step, began, took in self.steps if step == last) - begins

    def step(self, name: str) -> float:
        """Seconds of all steps of that name."""
        return sum(took for step, _, took in self.steps if step == name)

    def told(self) -> dict[str, Any]:
        """Its report."""
        return dict(json.loads(Path(self.report).read_text(encoding="utf-8")))


def wait_quiet() -> None:
    """Until the machine does next to nothing, and has nothing to write: what ran before leaves work to the archiver of
    WAL, to the standby and to autovacuum. After half a minute whoever measures goes on."""
    os.sync()
    ends, quiet, before = time.monotonic() + QUIET_MOST_SECONDS, 0, psutil.cpu_times()
    while quiet < QUIET_TIMES and time.monotonic() < ends:
        time.sleep(QUIET_SECONDS)
        now = psutil.cpu_times()  # cpu_times_percent is wrong for less than a second of all cores
        idle = (now.idle - before.idle) / (sum(now) - sum(before))
        quiet, before = quiet + 1 if idle >= QUIET_IDLE else 0, now


def call(flow: str, environment: str, *, direct: bool = False, **parameters: object) -> Called:
    """A flow, in a process of its own, through Prefect or (`direct`) without it.

    Raises:
        OpsError: it failed.
    """
    given = json.dumps({"environment": environment, **parameters})
    argv = [sys.executable, "-m", "benchmarks.call", flow, given, *(["--direct"] if direct else [])]
    answer = json.loads(shell.run(argv, directory=CHECKOUT, inherit=("*",)).stdout.splitlines()[-1])
    steps = tuple((name, began, took) for name, began, took in answer["steps"])
    return Called(answer["seconds"], steps, answer["facts"], answer["report"])


@contextmanager
def variables(**values: str) -> Iterator[None]:
    """In the environment of this process and of those that it starts while the block runs."""
    kept = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


@dataclass(frozen=True)
class Place:
    """The bench lab, and the database's rows as they are to be before each measurement."""

    lab: Lab
    status: dict[str, Any]
    tell: Tell

    def sql(self, statement: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """As administrator; a statement of the benchmark's own."""
        dsn = self.status["postgres"]["admin_dsn"]
        with psycopg.connect(dsn, dbname=database, autocommit=True) as connection:
            cursor = connection.execute(sql.SQL(statement))
            return cursor.fetchall() if cursor.description else []

    def call(self, flow: str, *, direct: bool = False, **parameters: object) -> Called:
        """A flow on the lab, as `call`.

        Raises:
            OpsError: it failed.
        """
        return call(flow, NAME, direct=direct, **parameters)

    def rows(self) -> dict[str, int]:
        """Rows per table."""
        counts = "SELECT count(*) FROM public."
        return {table: int(self.sql(counts + table, DATABASE)[0][0]) for table in TABLES}

    def settle(self, expected: Mapping[str, int]) -> None:
        """The same start for each measurement: healthy, the same rows (but for the few that a restore's smoke check
        writes), nothing left over, nothing left to write, and the machine quiet.

        Raises:
            OpsError: the database is not what it was.
        """
        self.require_healthy()
        for (name,) in self.sql("SELECT datname FROM pg_database WHERE datname LIKE 'grc\\_db\\_\\_%'"):
            self.sql(f'DROP DATABASE "{name}" WITH (FORCE)')
        for directory in Path(self.status["root"]).rglob("*.superseded_*"):
            shutil.rmtree(directory, ignore_errors=True)
        found = self.rows()
        if not all(0 <= found[table] - rows <= SMOKE_ROWS for table, rows in expected.items()):
            raise OpsError(f"the database is not the same as before: {found} instead of {expected}")
        self.sql("VACUUM (ANALYZE)", DATABASE)
        self.sql("CHECKPOINT")
        wait_quiet()

    def make_dead_rows(self) -> int:
        """Something to vacuum: the same rows of two tables are written anew, all over their pages; returns how many.

        No row is added or removed. Between two calls `settle` vacuums, so that each side finds as much.
        """
        for statement in MAKE_DEAD:
            self.sql(statement + COUNTED, DATABASE)
        self.sql("CHECKPOINT")
        os.sync()
        return self.dead_rows()

    def dead_rows(self) -> int:
        """Dead rows of those tables, as PostgreSQL's statistics count them."""
        return int(self.sql(DEAD, DATABASE)[0][0])

    def require_healthy(self) -> None:
        """Backend and frontend answer well.

        Raises:
            OpsError: not within half a minute.
        """
        urls = [f"{self.status[part]['url']}/health" for part in ("application", "frontend")]

        def healthy() -> bool:
            try:
                return all(httpx.get(url, timeout=5, trust_env=False).is_success for url in urls)
            except httpx.HTTPError:
                return False

        until(healthy, what="health", seconds=30)


@contextmanager
def place(megabytes: int, tell: Tell, *, share: float = 1, ratio: int = SPACE_RATIO) -> Iterator[Callable[[], Place]]:
    """A lab with disk space for `ratio` times that much data, and with a `share` of the data; whatever happens, it is
    stopped and removed at the end.

    Its variables are in `os.environ` when the block is entered, which Prefect reads when it is imported; the servers
    start when the yielded function is called.

    Raises:
        OpsError: there is no room for it, or it does not come up.
    """
    runs = base_directory() / ".bench"
    for left in runs.glob("*"):  # of runs that were killed
        if left.name.isdecimal() and not psutil.pid_exists(int(left.name)):
            _remove(left)
    base = runs / str(os.getpid())
    _require_room(runs, megabytes * ratio + SPACE_MEGABYTES)
    kept = dict(os.environ)
    os.environ[_BASE] = str(base)
    try:
        os.environ.update(Lab.prepared(NAME).environ())
        yield lambda: _up(int(megabytes * share), tell)
    finally:
        tell("taking the bench lab down")
        _remove(base)
        with contextlib.suppress(OSError):  # another run's is still there
            runs.rmdir()
        os.environ.clear()
        os.environ.update(kept)


def _up(megabytes: int, tell: Tell) -> Place:
    lab = Lab.up(NAME, megabytes, tell)
    if not lab.environ().items() <= os.environ.items():
        raise OpsError("a stranger took a port of the bench lab since this run began", "run it again")
    return Place(lab, lab.status(), tell)


def _require_room(directory: Path, megabytes: int) -> None:
    there = next(path for path in (directory, *directory.parents) if path.exists())
    needed, free = megabytes << 20, shutil.disk_usage(there).free
    if free < needed:
        raise OpsError(
            f"{free >> 20} MB are free, {needed >> 20} are needed",
            "choose fewer with --megabytes (make bench MEGABYTES=100)",
        )


def _remove(base: Path) -> None:
    kept = os.environ.get(_BASE)
    os.environ[_BASE] = str(base)
    try:
        lifecycle.down_all(silent, remove=True)
    finally:
        if kept is None:
            del os.environ[_BASE]
        else:
            os.environ[_BASE] = kept
    shutil.rmtree(base, ignore_errors=True)
