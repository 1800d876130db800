"""Real Redis or Valkey servers and Sentinels for tests: started in a moment, on loopback, gone with the test process.

    with running_redis() as server:
        server.client().set("k", "v")
    with replicated() as group:                # a master, a replica, three Sentinels that agree
        new = group.lose_master()

The program is the wheel's Valkey, or what `OPS_TEST_REDIS` names (`make test-matrix`): "8" for Debian's Redis 8, or a
path. The environment of a server or a group, as flows see it, is written by `register`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import redis
import redis.utils

from blocks.redis.server import Redis
from lab.processes import OsAccount, write
from runbook.errors import Unreachable
from runbook.wait import until
from tasks.redis.server import at_once, call
from tests.fixtures.servers import binaries, children_of, free_port, programs_base

# redis-py reads its own package's metadata for every client.
redis.utils.get_lib_version = functools.cache(redis.utils.get_lib_version)
PASSWORD = "r3dis p@ss:word"
MASTER = "mymaster"
NAME = "redis-test"
VARIABLE = "OPS_TEST_REDIS"
PATIENT_MS = 60_000
"""The Sentinels' down-after and failover-timeout: on a busy machine one that stands still for many seconds is alive."""
DOWN_AFTER_MS, TIMEOUT_MS = 5000, 5000
"""The same where somebody has died (`notice_deaths`). More than a second: Sentinels ping a new master only after it, and
at a second or less take it for down at once. And ten times as long after the death a Sentinel that has voted promotes
nobody any more (Valkey 9 counts from its vote on for how long a replica may have been without its master)."""
PERIODS = {"TILT-TRIGGER": 60 * PATIENT_MS, "MIN-LINK-RECONNECT-PERIOD": 60 * PATIENT_MS, "PUBLISH-PERIOD": 200}
"""Sentinels greet each other every 0.2 s in the place of 2: a group is complete at once."""
PATIENCE_SECONDS = 60.0
HANG = {"socket_timeout": 300.0, "socket_connect_timeout": 300.0}
"""redis-py's own 5 seconds are less than a busy machine may need for an answer."""
ANSWER = "tasks.redis.failover.group.ANSWER_SECONDS"
DEBIAN = Path("/usr/bin/redis-check-rdb")
"""Redis 8: the program is the server when it is called redis-server (tests/matrix/install-redis)."""
ENVIRONMENT = """\
name = "{name}"
disposable = true
reports = "{root}/reports"
[objectives]
rpo = "1h"
rto = "4h"
[redis]
port = {port}
password_env = "OPS_TEST_REDIS_PASSWORD"
data_directory = "{data}"
config_file = "{configuration}"
server_program = "{program}"
os_user = "{account.name}"
{redis}
[services]
{services}
[backups]
survives = "server"
redis = "{root}/backups"
"""
PREFIXES = {"drop_prefixes": '["cache:"]', "protected_prefixes": '["session:", "queue:"]'}
LOGS = '[logs]\nbackup = "{root}/backup.log"\n'
running: list[RedisServer] = []


def environment(**values: object) -> str:
    """The TOML of the environment NAME: of a server's `port`, `program`, `root`, `data`, `configuration` and `account`,
    with more lines of [redis] in `redis`, and those of [services]."""
    more = str(values.pop("redis", ""))
    for key, usual in PREFIXES.items():
        more += "" if key in more else f"\n{key} = {usual}"
    return ENVIRONMENT.format(**{"name": NAME, "redis": more, "services": "names = {}", **values})


def program() -> Path:
    """The server that tests run on.

    Raises:
        FileNotFoundError: what was asked for is not installed.
    """
    asked = os.environ.get(VARIABLE, "")
    if not asked:
        return binaries().redis
    if asked.startswith("/"):
        return Path(asked)
    if asked != "8" or not DEBIAN.exists():
        raise FileNotFoundError(f"{VARIABLE} is {asked}: it is a path, or 8 after tests/matrix/install-redis")
    with programs_base() as base:
        link = base / "redis-8" / "redis-server"
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(DEBIAN)
    return link


class RedisServer:
    """One server: a password, TCP on 127.0.0.1 only, a configuration file that it can rewrite."""

    kind = "redis"

    def __init__(self, *, settings: Sequence[str] = (), port: int = 0, executable: Path | None = None) -> None:
        self.account = OsAccount.of_servers()
        self.program = executable or program()
        self.port = port or free_port()
        self.settings = settings
        self.root = Path(tempfile.mkdtemp(prefix="ops-redis-", dir="/var/tmp" if self.account.is_other else None))
        self.account.directory(self.root, 0o755)
        self.data, self.configuration, self.log = self.root / "data", self.root / "redis.conf", self.root / "redis.log"
        self.account.directory(self.data, 0o755)
        self._process: subprocess.Popen[bytes] | None = None
        write(self.configuration, self.text(), 0o644, self.account)

    @property
    def address(self) -> str:
        """`host:port`."""
        return f"127.0.0.1:{self.port}"

    def text(self) -> str:
        """The configuration: `settings` come last, so that they win."""
        lines = [
            *(f"port {self.port}", "bind 127.0.0.1", f'requirepass "{PASSWORD}"', f'masterauth "{PASSWORD}"'),
            *(
                f'dir "{self.data}"',
                "daemonize no",
                'save ""',
                "enable-debug-command local",
                "repl-diskless-sync-delay 0",
            ),
            *self.settings,
        ]
        return "\n".join(lines) + "\n"

    def start(self, *options: str, wait: bool = True) -> None:
        """Start it; returns when it has loaded its data. It ends with this process, even if that is killed."""
        setpriv = shutil.which("setpriv")
        ends_with_us = (setpriv, "--pdeathsig", "KILL") if setpriv else ()
        argv = [*self.account.prefix, *ends_with_us, str(self.program), str(self.configuration)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*argv, *options],
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        running.append(self)
        if wait:
            until(self._answers, what=f"{self.kind} on port {self.port}", seconds=120, every_seconds=0.02)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """SIGTERM: it saves where it is told to save. Returns when it has exited."""
        if self._process:
            self._process.send_signal(signal.SIGCONT)
            self._process.send_signal(how)
            self._process.wait(120)
            self._process = None
            running.remove(self)

    def crash(self) -> None:
        """SIGKILL, to a process that saves for it too: it would go on, and put its file in place of a newer one."""
        children = children_of(self._process.pid) if self.is_running and self._process else []
        self.stop(signal.SIGKILL)
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)

    def freeze(self) -> None:
        """SIGSTOP: it is there and does not answer. `stop` ends it all the same."""
        assert self._process
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        assert self._process
        self._process.send_signal(signal.SIGCONT)

    def remove(self) -> None:
        """End it and remove its files."""
        self.crash()
        shutil.rmtree(self.root, ignore_errors=True)

    @property
    def is_running(self) -> bool:
        """Whether its process lives."""
        return self._process is not None and self._process.poll() is None

    def client(self, database: int = 0, **options: Any) -> redis.Redis:
        """A client that returns bytes, without retries, and waits as long for an answer as only a hang takes."""
        return at_once(redis.Redis(port=self.port, password=PASSWORD, db=database, **{**HANG, **options}))

    def block(self, **fields: Any) -> Redis:
        """The block through which runbooks see this server."""
        known = {
            "port": self.port,
            "password": PASSWORD,
            "data_directory": str(self.data),
            "config_file": str(self.configuration),
            "server_program": str(self.program),
            "os_user": self.account.name,
        }
        return Redis(**{**known, **fields})

    def log_tail(self, lines: int = 30) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""

    def register(self, monkeypatch: Any, *, sentinels: Sequence[str] = (), extra: str = "") -> None:
        """Make it the environment `NAME` of this test. `extra` are more lines of the section [redis]."""
        told = f'sentinels = {[*sentinels]}\nsentinel_master = "{MASTER}"\n'.replace("'", '"') if sentinels else ""
        toml = self.root / "environment.toml"
        toml.write_text(environment(**vars(self), redis=told + extra) + LOGS.format(root=self.root))
        monkeypatch.setenv("OPS_ENVIRONMENT", NAME)
        monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(toml))
        monkeypatch.setenv("OPS_TEST_REDIS_PASSWORD", PASSWORD)

    def _answers(self) -> bool:
        if not self.is_running:
            raise AssertionError(f"{self.kind} ended while it started:\n{self.log_tail()}")
        try:
            return bool(self.client(socket_timeout=2).ping())
        except redis.RedisError as error:
            raise Unreachable(str(error)) from None


class SentinelServer(RedisServer):
    """A Sentinel: the same program, without a password."""

    kind = "Sentinel"

    def __init__(self, master: RedisServer, quorum: int = 2) -> None:
        self._master, self._quorum = master, quorum
        super().__init__(executable=master.program)

    def text(self) -> str:
        """Watches the master from its start."""
        return (
            "\n".join(
                (
                    *(f"port {self.port}", "bind 127.0.0.1", f'dir "{self.root}"', "daemonize no"),
                    f"sentinel monitor {MASTER} 127.0.0.1 {self._master.port} {self._quorum}",
                    f'sentinel auth-pass {MASTER} "{PASSWORD}"',
                    f"sentinel down-after-milliseconds {MASTER} {PATIENT_MS}",
                    f"sentinel failover-timeout {MASTER} {PATIENT_MS}",
                )
            )
            + "\n"
        )

    def start(self, *options: str, wait: bool = True) -> None:
        """In Sentinel mode. Redis 8 saves a password with a blank in it without quotes, and cannot read that again.

        A Sentinel that stood still for 2 s would do nothing for the next 30 (TILT), and one that heard nothing for 6 s
        would connect anew. Its greetings come sooner than usual (`PERIODS`).
        """
        saved, bare = self.configuration.read_text(), f"sentinel auth-pass {MASTER} {PASSWORD}\n"
        if bare in saved:
            self.configuration.write_text(saved.replace(bare, f'sentinel auth-pass {MASTER} "{PASSWORD}"\n'))
        super().start("--sentinel", *options, wait=wait)
        for name, milliseconds in PERIODS.items() if wait else ():
            call(self.client(), "SENTINEL", "DEBUG", name, milliseconds)

    def client(self, database: int = 0, **options: Any) -> redis.Redis:
        """Without a password."""
        return at_once(redis.Redis(port=self.port, **{**HANG, **options}))

    def master(self) -> str:
        """Where it says that the master is, `host:port`; "" when it watches none."""
        found = call(self.client(), "SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER)
        return f"{found[0].decode()}:{found[1].decode()}" if found else ""


class Group:
    """A master, its replicas and its Sentinels."""

    def __init__(self, replicas: int, sentinels: int, settings: Sequence[str]) -> None:
        self.master = RedisServer(settings=settings)
        own = (*settings, f"replicaof 127.0.0.1 {self.master.port}")
        self.replicas = [RedisServer(settings=own, executable=self.master.program) for _ in range(replicas)]
        self.sentinels = [SentinelServer(self.master) for _ in range(sentinels)]

    @property
    def servers(self) -> list[RedisServer]:
        """Master (as it was at first) and replicas."""
        return [self.master, *self.replicas]

    def start(self) -> None:
        """Returns when the replicas are in sync and the Sentinels know all of them and each other, and have asked them."""
        for server in self.servers:
            server.start()
        until(self._in_sync, what="replicas in sync", seconds=120, every_seconds=0.05)
        for sentinel in self.sentinels:
            sentinel.start()
        until(self._known, what="Sentinels that know each other", seconds=120, every_seconds=0.05)

    def at(self, address: str) -> RedisServer:
        """The server that listens there."""
        return next(server for server in self.servers if server.address == address)

    def agreed_master(self) -> str:
        """The address that all running Sentinels give; "" while they do not agree."""
        told = {sentinel.master() for sentinel in self.sentinels if sentinel.is_running}
        return told.pop() if len(told) == 1 else ""

    def wait_for_master_other_than(self, server: RedisServer) -> RedisServer:
        """Until all Sentinels name another master."""

        def other() -> str:
            found = self.agreed_master()
            return found if found != server.address else ""

        return self.at(until(other, what="another master", seconds=300, every_seconds=0.05))

    def in_step(self) -> None:
        """Returns when the replicas have all that the master has acknowledged by now."""
        sent = self.master.client().info("replication")["master_repl_offset"]

        def had_all() -> bool:
            told = [replica.client().info("replication") for replica in self.replicas]
            return all(int(info.get("slave_repl_offset", -1)) >= sent for info in told)

        settles(had_all, "the last write on the replicas")

    def fail_over(self) -> RedisServer:
        """While the master lives, and its replicas have all that it has; returns the new one."""
        self.in_step()
        return self.promote()

    def promote(self) -> RedisServer:
        """SENTINEL FAILOVER, again where it came to nothing: a replica that stood still for five seconds is not good
        enough. Returns the new master."""
        first = self.sentinels[0]

        def begun() -> bool:
            if first.master() == self.master.address:
                with contextlib.suppress(redis.ResponseError):  # one is under way, or no replica is good enough
                    call(first.client(), "SENTINEL", "FAILOVER", MASTER)
            return first.master() != self.master.address

        until(begun, what="a failover", seconds=300, every_seconds=0.05)
        return self.wait_for_master_other_than(self.master)

    def lose_master(self) -> RedisServer:
        """The master is killed when its replicas have all that it has; returns the one that is promoted in its place."""
        self.in_step()
        self.master.crash()
        return self.promote()

    def register(self, monkeypatch: Any, *, extra: str = "") -> None:
        """As the environment `NAME`, with its Sentinels."""
        self.master.register(monkeypatch, sentinels=[sentinel.address for sentinel in self.sentinels], extra=extra)

    def remove(self) -> None:
        """End everything and remove its files."""
        for server in [*self.sentinels, *self.servers]:
            server.remove()

    def _in_sync(self) -> bool:
        info = self.master.client().info("replication")
        states = [value for key, value in info.items() if key.startswith("slave") and isinstance(value, dict)]
        return len(states) == len(self.replicas) and all(state["state"] == "online" for state in states)

    def _known(self) -> bool:
        for sentinel in self.sentinels:
            state = cast(dict[str, Any], sentinel.client().sentinel_master(MASTER))
            others = int(state["num-other-sentinels"]), int(state["num-slaves"])
            if others != (len(self.sentinels) - 1, len(self.replicas)):
                return False
            if any(found["master-link-status"] != "ok" for found in sentinel.client().sentinel_slaves(MASTER)):
                return False  # nobody promotes one whom it has not asked
        return True


@contextlib.contextmanager
def running_redis(*, settings: Sequence[str] = (), executable: Path | None = None) -> Iterator[RedisServer]:
    """A new server, running; ended and removed when the block is left."""
    server = RedisServer(settings=settings, executable=executable)
    try:
        server.start()
        yield server
    finally:
        server.remove()


@contextlib.contextmanager
def replicated(*, replicas: int = 1, sentinels: int = 3, settings: Sequence[str] = ()) -> Iterator[Group]:
    """A master with replicas and Sentinels, in sync and known to each other."""
    group = Group(replicas, sentinels, settings)
    try:
        group.start()
        yield group
    finally:
        group.remove()


def notice_deaths(sentinels: Sequence[SentinelServer], *, timeout_ms: int = TIMEOUT_MS) -> None:
    """From now on they take whoever does not answer for DOWN_AFTER_MS for dead, and act. Call it after the death."""
    for sentinel in sentinels:
        if sentinel.is_running:
            for name, value in (("failover-timeout", timeout_ms), ("down-after-milliseconds", DOWN_AFTER_MS)):
                call(sentinel.client(), "SENTINEL", "SET", MASTER, name, value)


def be_patient(monkeypatch: Any, answer_seconds: float = PATIENCE_SECONDS) -> None:
    """Runbooks wait for answers, and for what servers do, as long as a busy machine may take. Their own limits are
    production's: a test in which somebody never answers sets the one that it goes by, as `answer_seconds` of a failover.
    """
    for name in (
        *("blocks.redis.server.CONNECT_SECONDS", "tasks.redis.server.GREETING_SECONDS"),
        *("tasks.redis.restore.network.REACH_SECONDS", "tasks.redis.failover.handover.WRITE_SECONDS"),
        *("tasks.redis.failover.promotion.AGREE_SECONDS", "flows.recovery.redis.progress.SETTLE_SECONDS"),
    ):
        monkeypatch.setattr(name, PATIENCE_SECONDS)
    monkeypatch.setattr(ANSWER, answer_seconds)


def settles(look: Callable[[], object], what: str) -> None:
    """Wait until it holds. A server that loads, or ends its connections while it becomes a replica, is not there yet."""

    def holds() -> object:
        try:
            return look()
        except (redis.ConnectionError, redis.TimeoutError):
            return False

    until(holds, what=what, seconds=120)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """With a failing test: the ends of its servers' logs (a plugin)."""
    report = yield
    if report.failed:
        report.sections += [(f"{server.kind} on port {server.port}", server.log_tail()) for server in running]
    return report
