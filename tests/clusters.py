"""PostgreSQL clusters for tests of failovers and points in time: a primary, a standby and a receiver of WAL, under a
real supervisord, with the lab's own configuration, and a database of the application's role.

    def test_it(cluster: Cluster) -> None:
        cluster.sql("postgres", "CREATE TABLE t (id int)")       # roles: postgres, standby, receiver
        with cluster.writing() as writes:                        # a client that keeps account of what was acknowledged
            cluster.crash("postgres")                            # kill -9, and the supervisor does not restart it
        env = cluster.environment                                # blocks; also found by name: `Environment.find(NAME)`

`with running_cluster() as cluster:` is another one; `fresh=True` gives it a system identifier of its own. What belongs
to a cluster ends with the test, and with the test process if that is killed. The logs of every cluster are printed with
a failing test.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest

from blocks import toml
from blocks.environment import Environment
from lab import postgres, replication
from lab.layout import Layout
from lab.nodes import Node, nodes
from lab.postgres import DATABASE
from lab.processes import MARK, Account, run, write
from lab.state import Ports, State
from lab.supervision import Program, Supervisor
from runbook.errors import Unreachable
from runbook.wait import until
from tests.servers import binaries, is_gone, taken_ports
from tests.templates import Template, new_directory
from tests.writes import TABLE, Writes, writing

NAME = "pair"
PROGRAMS = {"postgres": "postgresql", "standby": "postgresql-standby", "receiver": replication.RECEIVER_PROGRAM}
# The lab's settings, on a machine that runs many; what a killed server shares goes with its directory. Nobody but the
# test writes: its transactions are counted.
SETTINGS = (
    *("shared_buffers = 32MB", "min_wal_size = 32MB", "max_wal_size = 256MB"),
    *("dynamic_shared_memory_type = mmap", "autovacuum_naptime = 1d"),
)
_FOLLOWED = """
SELECT count(*) FROM pg_stat_replication
WHERE state = 'streaming' AND flush_lsn >= %s AND (replay_lsn >= %s OR application_name = 'receiver')
"""
_STREAMED_TO = "SELECT 1 FROM pg_stat_wal_receiver WHERE status = 'streaming'"
_LOG_LINES = 40
_running: list[Cluster] = []
_failed: list[tuple[str, str]] = []  # the logs of those that are gone by the time of the report

TOML = """
name = "{name}"
timezone = "Asia/Tokyo"
disposable = true
reports = "{root}/reports"
[objectives]
rpo = "1h"
rto = "4h"
[thresholds]
"backup.age_seconds" = [3600, 86400]
[postgres]
port = {port}
data_directory = "{data}"
config_file = "{conf}"
{login}
service = "postgres"
name = "standby"
slot = "standby"
[standby]
port = {standby_port}
data_directory = "{standby_data}"
config_file = "{standby_conf}"
{login}
service = "standby"
name = "standby"
slot = "standby"
[wal]
directory = "{wal}"
[services]
kind = "supervisor"
url = "http://127.0.0.1:{supervisor}"
username = "ops"
password_env = "PAIR_SUPERVISOR_PASSWORD"
[services.names]
{names}
[backups]
survives = "server"
postgres = "{root}/backups/postgresql"
redis = "{root}/backups/redis"
files = "{root}/backups/files"
cluster = "{root}/backups/cluster"
wal = "{root}/backups/wal"
spool = "{root}/spool"
[application]
directory = "{root}/opt/grc"
backend_directory = "{root}/opt/grc/backend"
env_file = "{root}/opt/grc/backend/.env"
[logs]
backup = "{root}/db_backup.log"
"""
LOGIN = """database = "grc_db"
user = "grc_user"
password_env = "PAIR_PASSWORD"
admin_password_env = "PAIR_ADMIN_PASSWORD"
programs = "{programs}"
os_user = "{user}\""""


class Cluster:
    """One cluster. `settings` are lines of postgresql.conf for both nodes; `programs` run under its supervisor too;
    `on_disk`: also where there is plenty of memory."""

    def __init__(
        self,
        template: Template,
        *,
        settings: Sequence[str] = (),
        programs: Sequence[Program] = (),
        on_disk: bool = False,
    ) -> None:
        self.account, self.binaries = Account.of_servers(), binaries()
        self.layout = Layout(new_directory("pair", on_disk=on_disk), "cluster")
        self.state = State(str(self.layout.root), Ports.chosen(taken_ports()), template.passwords)
        self.supervisor = Supervisor(
            self.layout.supervisor, self.state.ports.supervisor, self.state.passwords.supervisor, self.layout.logs
        )
        self._settings = (*SETTINGS, *settings)
        self._programs = programs
        self._supervisord: subprocess.Popen[bytes] | None = None
        self._configure()
        self._fill(template)

    # What it is

    @property
    def root(self) -> Path:
        """Everything of it."""
        return self.layout.root

    @property
    def wal(self) -> Path:
        """What the receiver has received."""
        return self.layout.wal

    def node(self, role: str) -> Node:
        """The node that runs as the service `postgres` or `standby`, whichever of them is the primary."""
        return nodes(self.layout, self.state)[("postgres", "standby").index(role)]

    @property
    def variables(self) -> dict[str, str]:
        """What its TOML needs, and by what it is found: fixtures set them."""
        passwords = self.state.passwords
        return {
            "OPS_ENVIRONMENT": NAME,
            "OPS_ENVIRONMENT_FILE": str(self.root / "pair.toml"),
            "PAIR_PASSWORD": passwords.postgres,
            "PAIR_ADMIN_PASSWORD": passwords.postgres_admin,
            "PAIR_SUPERVISOR_PASSWORD": passwords.supervisor,
        }

    @property
    def environment(self) -> Environment:
        """Its blocks, nothing cached: the roles are asked anew."""
        return toml.environment(NAME)

    def sql(self, role: str, statement: str, *parameters: object, database: str = DATABASE) -> list[Any]:
        """Run a statement on a node as administrator, in autocommit mode; the rows of the last one."""
        with self.connect(role, database) as connection:
            cursor = connection.execute(statement.encode(), parameters or None)
            while cursor.nextset():
                pass
            return cursor.fetchall() if cursor.description else []

    def connect(self, role: str, database: str = DATABASE, *, seconds: int = 120) -> psycopg.Connection[Any]:
        """A connection of the administrator, in autocommit mode."""
        dsn = postgres.admin_dsn(self.state, self.node(role).port, database)
        return psycopg.connect(dsn, autocommit=True, connect_timeout=seconds)

    def is_standby(self, role: str) -> bool:
        """Whether a node says that it is in recovery."""
        return bool(self.sql(role, "SELECT pg_is_in_recovery()", database="postgres")[0][0])

    def streaming(self, role: str = "postgres") -> set[str]:
        """The names of those who stream from a node."""
        rows = self.sql(role, "SELECT application_name FROM pg_stat_replication WHERE state = 'streaming'")
        return {name for (name,) in rows}

    def settle(self) -> None:
        """Until standby and receiver have on disk, and the standby has replayed, what the primary has written now: a
        commit waits for one of the two only."""
        ((end,),) = self.sql("postgres", "SELECT pg_current_wal_flush_lsn()")
        until(lambda: self.sql("postgres", _FOLLOWED, end, end) == [(2,)], what="those who follow", seconds=120)

    # What is done to it

    def launch(self) -> None:
        """The supervisor, which runs nothing yet."""
        setpriv = shutil.which("setpriv")
        argv = [*([setpriv, "--pdeathsig", "TERM"] if setpriv else []), sys.executable, "-m", "supervisor.supervisord"]
        with (self.layout.logs / "supervisord.out").open("ab") as out:
            self._supervisord = subprocess.Popen(
                [*argv, "-n", "-c", str(self.supervisor.configuration)],
                cwd=self.root, env={**os.environ, MARK: str(self.supervisor.configuration)},
                stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            )  # fmt: skip
        _running.append(self)
        until(self.supervisor.is_running, what="supervisord's start", seconds=120, every_seconds=0.02)

    def start(self, *roles: str) -> None:
        """Start services; returns when the nodes among them answer."""
        for role in roles:
            self.supervisor.start(PROGRAMS[role])
        for role in roles:
            if role != "receiver":
                until(lambda role=role: self._answers(role), what=f"the start of {role}", seconds=120)  # type: ignore[misc]

    def stop(self, *roles: str) -> None:
        """Stop services as their supervisor does (a fast shutdown)."""
        for role in roles:
            self.supervisor.stop(PROGRAMS[role])

    def shoot(self, role: str) -> None:
        """kill -9 of all its processes; its supervisor starts it again."""
        for process in self._frozen_processes(role):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def crash(self, role: str) -> None:
        """kill -9 of all its processes, as when its host dies: its supervisor holds it for stopped, and does not start
        it again. (Asked to stop it while it cannot hear the signal, then the death.)"""
        processes = self._frozen_processes(role)
        self.supervisor._call("stopProcess", PROGRAMS[role], False)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        gone = lambda: not any(map(psutil.pid_exists, self._pids(role))) and all(map(is_gone, processes))  # noqa: E731
        until(gone, what=f"the death of {role}", seconds=120)
        if role != "receiver":
            until(lambda: self._is_noticed(role), what=f"that the death of {role} is noticed", seconds=120)

    def promote(self, role: str) -> None:
        """By hand: returns when it takes writes."""
        self.sql(role, "SELECT pg_promote(true, 120)", database="postgres")
        assert not self.is_standby(role), f"{role} was not promoted"

    def feed(self, role: str = "standby") -> None:
        """By hand: give a standby what the receiver has of the segment that it has not finished.

        Right only where the receiver has more of it than the standby: what restore_command brings takes its place.
        """
        tail = self.root / "tail"
        self.account.directory(tail, 0o700)
        for partial in self.wal.glob("*.partial"):
            run(["cp", partial, tail / partial.stem], cwd=Path("/"), account=self.account)
        command = " || ".join(f'cp "{place}/%f" "%p" 2>/dev/null' for place in (self.wal, tail))
        self.sql(role, f"ALTER SYSTEM SET restore_command = '{command}'", database="postgres")
        self.sql(role, "SELECT pg_reload_conf()", database="postgres")

    def follow(self, role: str) -> None:
        """By hand: a node that was stopped cleanly, before the other one was promoted, is that one's standby now."""
        node, primary = self.node(role), self.node("standby" if role == "postgres" else "postgres")
        replication.accept(primary, self.state, replication.STANDBY_SLOT)
        replication.follow_from_start(node.data, primary, self.layout, self.account)
        self.start(role)

    # Faults, healed when their block is left

    @contextlib.contextmanager
    def crashed(self, role: str) -> Iterator[None]:
        """Dead by kill -9 while the block runs; then started again."""
        self.crash(role)
        try:
            yield
        finally:
            self.start(role)

    @contextlib.contextmanager
    def frozen(self, role: str) -> Iterator[None]:
        """All its processes stopped by SIGSTOP: its port accepts, and nobody answers (which is not waited for)."""
        processes = self._frozen_processes(role)
        try:
            with pytest.MonkeyPatch.context() as patch:
                for name in ("blocks.postgres.CONNECT_SECONDS", "blocks.nodes.ASK_SECONDS"):
                    patch.setattr(name, 5)
                yield
        finally:
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()

    @contextlib.contextmanager
    def gone(self, path: Path) -> Iterator[Path]:
        """A file or directory away; gives where it is. It comes back unless something else has taken its place."""
        aside = path.with_name(f".gone-{path.name}")
        path.rename(aside)
        try:
            yield aside
        finally:
            if not path.exists():
                aside.rename(path)

    @contextlib.contextmanager
    def writing(self, sessions: int = 2) -> Iterator[Writes]:
        """Clients that insert into the table `writes`, one row a transaction, on whichever node takes writes, while the
        block runs. They never give up: a session that breaks is opened again. One that waits for its commit when the
        block is left is broken off."""
        self.sql("postgres", TABLE)
        ports = ",".join(str(node.port) for node in nodes(self.layout, self.state))
        address = postgres.admin_dsn(self.state, 0).replace("127.0.0.1:0/postgres", "")
        servers = f"host=127.0.0.1,127.0.0.1&port={ports}&target_session_attrs=read-write"
        with writing(f"{address}/{DATABASE}?{servers}", sessions) as writes:
            yield writes

    # Its end

    def processes(self) -> list[psutil.Process]:
        """Everything that lives of it: each works in one of its directories."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if Path(process.cwd()).is_relative_to(self.layout.base) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def remove(self) -> None:
        """End every process, and remove every file."""
        if self._supervisord:
            self._supervisord.kill()  # first: it would start again what ends
            self._supervisord.wait()
        for process in self.processes():  # SIGQUIT: an immediate shutdown, which gives shared memory back
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGQUIT)
                process.resume()
        with contextlib.suppress(Unreachable):
            until(lambda: not self.processes(), what="their end", seconds=120)
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        until(lambda: not self.processes(), what="the end of every process", seconds=120)
        shutil.rmtree(self.layout.base)
        if self in _running:
            _running.remove(self)

    def log_tails(self) -> list[tuple[str, str]]:
        """The ends of the logs of its servers and its supervisor, each with its name."""
        return [
            (
                f"end of {path.name} in {self.root}",
                "\n".join(path.read_text(errors="replace").splitlines()[-_LOG_LINES:]),
            )
            for path in sorted(self.layout.logs.glob("*.log"))
        ]

    def _configure(self) -> None:
        us, layout = Account.current(), self.layout
        for path in (self.root, layout.logs):
            us.directory(path, 0o755)
        configurations = replication.configurations(layout, self.state, self.binaries)
        for path in (layout.etc, *(path.parent for path in configurations)):
            self.account.directory(path, 0o755)
        for node in nodes(layout, self.state):
            self.account.directory(node.data.parent, 0o755)
        self.account.directory(layout.wal, 0o700)
        for path, text in configurations.items():
            more = "\n".join((*self._settings, "")) if path.name == "postgresql.conf" else ""
            write(path, text + more, 0o600, self.account)
        programs = replication.programs(layout, self.state, self.binaries, self.account)
        self.supervisor.write([*programs, *self._programs])
        self._describe()

    def _describe(self) -> None:
        one, two = nodes(self.layout, self.state)
        names = {**PROGRAMS, **{program.name: program.name for program in self._programs}}
        text = TOML.format(
            name=NAME, root=self.root, wal=self.wal, supervisor=self.state.ports.supervisor,
            login=LOGIN.format(programs=self.binaries.postgres, user=self.account.name),
            port=one.port, data=one.data, conf=one.configuration,
            standby_port=two.port, standby_data=two.data, standby_conf=two.configuration,
            names="\n".join(f'{role} = "{program}"' for role, program in names.items()),
        )  # fmt: skip
        (self.root / "pair.toml").write_text(text)
        backend = self.root / "opt" / "grc" / "backend"
        backend.mkdir(parents=True)
        write(backend / ".env", f"PORT=8000\nDATABASE_URL={postgres.dsn(self.state, one.port)}\n", 0o600)

    def _fill(self, template: Template) -> None:
        """Cold copies: a standby is the same files, and is told whom to follow."""
        one, two = nodes(self.layout, self.state)
        for node in (one, two):
            run(["cp", "-a", template.data, node.data], cwd=Path("/"), account=self.account)
        replication.follow_from_start(two.data, one, self.layout, self.account)

    def _frozen_processes(self, role: str) -> list[psutil.Process]:
        """A service's processes, stopped: the server first, so that it forks nobody meanwhile."""
        server = psutil.Process(self.supervisor.services()[PROGRAMS[role]].pid)
        server.suspend()
        children = server.children(recursive=True)
        for process in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        return [*children, server]

    def _pids(self, role: str) -> list[int]:
        pid = self.supervisor.services()[PROGRAMS[role]].pid
        return [pid] if pid else []

    def _is_noticed(self, dead: str) -> bool:
        """Whether the other node, if it answers, has come to the end of what it was sent."""
        try:
            return not self.sql("standby" if dead == "postgres" else "postgres", _STREAMED_TO, database="postgres")
        except psycopg.OperationalError:
            return True

    def _answers(self, role: str) -> bool:
        try:
            self.connect(role, "postgres").close()
        except psycopg.OperationalError as error:
            raise Unreachable(str(error).strip().splitlines()[-1]) from None
        return True


@contextlib.contextmanager
def running_cluster(
    template: Template,
    *,
    settings: Sequence[str] = (),
    programs: Sequence[Program] = (),
    fresh: bool = False,
    on_disk: bool = False,
) -> Iterator[Cluster]:
    """A cluster of which everything runs and streams; ended and removed when the block is left."""
    own = Template.made() if fresh else template
    cluster = Cluster(own, settings=settings, programs=programs, on_disk=on_disk)
    try:
        cluster.launch()
        cluster.start("postgres")
        replication.accept(cluster.node("postgres"), cluster.state, replication.STANDBY_SLOT, replication.RECEIVER_SLOT)
        cluster.start("receiver", "standby")
        cluster.settle()
        yield cluster
    except BaseException:
        _failed.extend(cluster.log_tails())
        raise
    finally:
        cluster.remove()
        if fresh:
            own.remove()


@pytest.fixture(scope="session")
def cluster_template() -> Iterator[Template]:
    """One initdb for all clusters of a session: they are copies of it."""
    template = Template.made()
    yield template
    template.remove()


@pytest.fixture
def cluster(cluster_template: Template, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster, and its environment under the name `NAME`."""
    with running_cluster(cluster_template) as running:
        for name, value in running.variables.items():
            monkeypatch.setenv(name, value)
        yield running


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Print the ends of the clusters' logs with a failing test."""
    outcome: Any = yield
    report = outcome.get_result()
    if report.failed:
        report.sections.extend(_failed)
        for cluster in _running:
            report.sections.extend(cluster.log_tails())
    _failed.clear()
