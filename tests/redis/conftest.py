"""A Redis of its own under a supervisord of its own, and the environment through which runbooks see it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from blocks.environment import Environment
from blocks.services.supervisor import SupervisorServices
from lab.processes import OsAccount
from runbook import shell
from runbook.errors import Unreachable
from runbook.wait import until
from tasks.redis.server import at_once
from tests.fixtures.servers import free_port
from tests.redis import servers
from tests.redis.servers import HANG, NAME, PASSWORD, Group, RedisServer, replicated, running_redis

CONFIGURATION = """\
port {port}
bind 127.0.0.1
requirepass "{password}"
dir "{data}"
dbfilename "my dump.rdb"
save 3600 1
appendonly {aof}
appenddirname "aof files"
appendfilename "log.aof"
daemonize no
"""
SUPERVISORD = """\
[supervisord]
nodaemon = true
pidfile = {root}/supervisord.pid
logfile = {root}/supervisord.log
{root_user}
[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
[inet_http_server]
port = 127.0.0.1:{control}
[program:valkey]
command = {program} {configuration}
directory = {root}
{user}
autostart = true
autorestart = true
startsecs = 0
startretries = 1000
stopwaitsecs = 120
redirect_stderr = true
stdout_logfile = {root}/valkey.log
"""
REDIS = 'drop_prefixes = ["cache:", "ca*he:"]\n'
SERVICES = 'kind = "supervisor"\nurl = "http://127.0.0.1:{control}"\nnames = {{ redis = "valkey" }}'


class Rig:
    """A server, its files, and how a test looks at it."""

    def __init__(self, root: Path) -> None:
        self.root, self.account, self.program = root, OsAccount.of_servers(), servers.program()
        self.port, self.control = free_port(), free_port()
        self.data, self.configuration = root / "lib" / "data", root / "valkey.conf"
        self.store, self.toml = root / "backups", root / "environment.toml"
        self.account.directory(self.data, 0o700)
        self.configure(aof=True)
        other = self.account.is_other
        values = {**vars(self), "name": NAME, "user": f"user = {self.account.name}" if other else ""}
        values["root_user"] = "user = root" if os.geteuid() == 0 else ""
        (root / "supervisord.conf").write_text(SUPERVISORD.format(**values))
        told = {**vars(self), "redis": REDIS, "services": SERVICES.format(control=self.control)}
        self.toml.write_text(servers.environment(**told))

    def configure(self, *, aof: bool, extra: str = "") -> None:
        """Write valkey.conf."""
        values = {"port": self.port, "password": PASSWORD, "data": self.data, "aof": "yes" if aof else "no"}
        self.configuration.write_text(CONFIGURATION.format(**values) + extra)
        self.configuration.chmod(0o644)

    @contextlib.contextmanager
    def running(self) -> Iterator[Rig]:
        """Under supervisord."""
        argv = [sys.executable, "-m", "supervisor.supervisord", "-c", self.root / "supervisord.conf"]
        with shell.spawn(argv, directory=self.root) as child:
            self.wait()
            yield self
            with contextlib.suppress(Exception):
                self.services.stop("redis")
            child.terminate()
            child.wait(120)

    def wait(self) -> None:
        """Until it serves."""
        until(self.answers, what="the rig's Redis", seconds=120, every_seconds=0.03)

    def crash(self) -> None:
        """kill -9, and no restart: supervisord is asked to stop a process that cannot hear the signal, and then it dies.

        Stopped after its death, the server may be starting again. A signal between that process's fork and its exec is
        lost, and supervisord waits for `stopwaitsecs`.
        """
        pid = int(self.client().info("server")["process_id"])
        os.kill(pid, signal.SIGSTOP)
        self.services._call("redis", "stopProcess", "valkey", False)
        os.kill(pid, signal.SIGKILL)
        self.services.stop("redis")

    def reset(self, *, aof: bool) -> None:
        """As new: no data, no backups, no reports."""
        self.services.stop("redis")
        for path in (self.data.parent, self.store, self.root / "reports"):
            shutil.rmtree(path, ignore_errors=True)
        self.data.parent.mkdir(mode=0o755)
        self.account.directory(self.data, 0o700)
        self.configure(aof=aof)
        self.services.start("redis")
        self.wait()

    @property
    def environment(self) -> Environment:
        """As a flow sees it."""
        return Environment.find(NAME)

    @property
    def services(self) -> SupervisorServices:
        """The rig's supervisord."""
        return SupervisorServices(url=f"http://127.0.0.1:{self.control}", names={"redis": "valkey"})

    def client(self, database: int = 0) -> redis.Redis:
        """A client of the live server."""
        return at_once(redis.Redis(port=self.port, password=PASSWORD, db=database, **HANG))

    def answers(self) -> bool:
        """Whether it serves."""
        try:
            return bool(self.client().ping())
        except redis.RedisError as error:
            raise Unreachable(str(error)) from None

    def run_id(self) -> str:
        """Changes with every start of the server."""
        return str(self.client().info("server")["run_id"])

    def log(self) -> str:
        """The end of the server's log."""
        path = self.root / "valkey.log"
        return "\n".join(path.read_text(errors="replace").splitlines()[-30:]) if path.exists() else ""


@contextlib.contextmanager
def new_rig() -> Iterator[Rig]:
    """A running rig in a directory of its own."""
    account = OsAccount.of_servers()
    root = Path(tempfile.mkdtemp(prefix="ops-redis-test-", dir="/var/tmp" if account.is_other else None))
    root.chmod(0o755)
    (root / "lib").mkdir(mode=0o755)
    try:
        with Rig(root).running() as rig:
            yield rig
    finally:
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    servers.be_patient(monkeypatch)


@pytest.fixture(scope="session")
def _rig() -> Iterator[Rig]:
    with new_rig() as found:
        yield found


@pytest.fixture
def rig(_rig: Rig, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """A running server as new, and its environment; AOF off by indirect parametrisation with False."""
    _rig.reset(aof=getattr(request, "param", True))
    monkeypatch.setenv("OPS_ENVIRONMENT", NAME)
    monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(_rig.toml))
    monkeypatch.setenv("OPS_TEST_REDIS_PASSWORD", PASSWORD)
    return _rig


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[RedisServer]:
    """A new server without services around it, as the environment NAME."""
    with running_redis() as found:
        found.register(monkeypatch)
        yield found


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[Group]:
    """A master, a replica and three Sentinels, as the environment NAME."""
    with replicated() as found:
        found.register(monkeypatch)
        yield found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """With a failing test: the end of the rig's log."""
    report = yield
    if report.failed and "rig" in getattr(item, "funcargs", {}):
        report.sections.append(("valkey.log", item.funcargs["rig"].log()))
    return report
