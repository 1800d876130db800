"""The small system that random sequences happen to: PostgreSQL with a receiver and an archive of WAL, a standby, a
second database, Redis with AOF, perhaps with a replica; the application's files; under a supervisord, with a backup of
each kind. Each round begins from a cold copy.

    with running_world(Variant()) as world:
        world.reset()
        world.database.write(chance)
        ran = world.launch("full-restore", confirm=NAME)
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import xmlrpc.client
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import psycopg
import redis

from lab.processes import run
from lab.servers import postgres, replication
from lab.servers.postgres import DATABASE, ROLE
from runbook.wait import until
from tests.fixtures.postgres.clusters import NAME
from tests.fixtures.postgres.templates import Template
from tests.recovery.sequences import operator
from tests.recovery.sequences.ledger import Ledger, Write
from tests.recovery.sequences.operator import Ran
from tests.recovery.sequences.promises import FILES, REDIS
from tests.recovery.sequences.small_system import REPLICA, SERVICES, SmallSystem, Variant
from tests.recovery.sequences.stores import TABLES, DatabaseStore, FilesStore, RedisStore, given_up_after

OTHER, UNRELATED = "other_db", "unrelated"
FIRST_WRITES = 40
LASTING = ("var", "supervisord.conf", "supervisord.pid")


@dataclass
class World:
    """The system with its clients. `tokens`: what a step remembers for a later one. `by_form`: how often a plan is
    confirmed by its own form, and not by typing the command again. `tolerated`: known problems."""

    system: SmallSystem
    variant: Variant
    ledgers: dict[str, Ledger] = field(default_factory=dict)
    tokens: dict[str, Any] = field(default_factory=dict)
    by_form: float = 0.5
    verbose: bool = False
    tolerated: re.Pattern[str] | None = None
    _first: dict[str, tuple[list[Write], int]] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        """Everything of it."""
        return self.system.root

    @property
    def cold(self) -> Path:
        """The copy from which each round begins."""
        return self.system.layout.base / "cold"

    @property
    def database(self) -> Ledger:
        """The application's database."""
        return self.ledgers[DATABASE]

    @property
    def variables(self) -> dict[str, str]:
        """What an operator's shell has: there is no Prefect server."""
        own = {name: text for name, text in os.environ.items() if not name.startswith("PREFECT_API")}
        return {
            **own,
            **self.system.variables,
            "PAIR_REDIS_PASSWORD": self.system.state.passwords.redis,
            "PREFECT_API_URL": "http://127.0.0.1:9/api",
        }

    def launch(self, flow: str, *, signal_at: tuple[int, float] | None = None, **parameters: Any) -> Ran:
        """One run of a runbook. `signal_at`: it is ended by this signal after so many seconds, if it still runs."""
        ran = operator.launch(flow, self.variables, {"environment": NAME, **parameters}, signal_at)
        if self.verbose:
            print(f"--- {flow} {parameters}\n{ran.text}\n", flush=True)
        return ran

    # What a client reaches

    def address(self, database: str, *, admin: bool = False) -> str:
        """Of whichever server takes writes, as libpq asks both."""
        state = self.system.state
        ports = [self.system.node(role).port for role in self.roles]
        hosts = ",".join("127.0.0.1" for _ in ports)
        user, password = (postgres.ADMIN, state.passwords.postgres_admin) if admin else (ROLE, state.passwords.postgres)
        where = f"host={hosts}&port={','.join(map(str, ports))}&target_session_attrs=read-write"
        return f"postgresql://{user}:{quote(password)}@/{database}?{where}"

    @property
    def roles(self) -> tuple[str, ...]:
        """The database servers."""
        return ("postgres", "standby") if self.variant.standby else ("postgres",)

    def redis(self, role: str = "redis") -> redis.Redis:
        """A client of Redis, or of its replica."""
        state = self.system.state
        port = state.ports.redis_replica if role == REPLICA else state.ports.redis
        return redis.Redis(port=port, password=state.passwords.redis, socket_timeout=10, socket_connect_timeout=5)

    @property
    def files(self) -> Path:
        """The application's directory."""
        return self.root / "app" / "files"

    @property
    def uploads(self) -> Path:
        """Where its users' files are."""
        return self.files / "uploads"

    def sql(self, statement: str, database: str = "postgres") -> list[Any]:
        """As administrator, on whichever server takes writes."""
        with psycopg.connect(self.address(database, admin=True), autocommit=True, connect_timeout=10) as session:
            session.execute("SET lock_timeout = '2s'")  # a prepared transaction holds its locks
            with given_up_after(session, 20):
                cursor = session.execute(statement.encode())
                while cursor.nextset():
                    pass
                return cursor.fetchall() if cursor.description else []

    def takes_writes(self, role: str) -> bool:
        """Whether a server is up and no standby."""
        try:
            return not self.system.is_standby(role)
        except psycopg.Error:
            return False

    @property
    def primary(self) -> str:
        """The role of the server that takes writes; the configured one where none does."""
        return next((role for role in self.roles if self.takes_writes(role)), "postgres")

    @property
    def standby(self) -> str:
        """The role of the other server."""
        return "standby" if self.primary == "postgres" else "postgres"

    def is_behind(self, role: str) -> bool:
        """Whether a standby has not replayed everything that its primary has written until now."""
        try:
            # Not in the application's database, which may be dropped.
            ((end,),) = self.system.sql(self.primary, "SELECT pg_current_wal_flush_lsn()", database="postgres")
            follows = (
                "SELECT pg_is_in_recovery() AND pg_last_wal_replay_lsn() >= %s "
                "AND EXISTS (SELECT FROM pg_stat_wal_receiver WHERE status = 'streaming')"
            )
            return not self.system.sql(role, follows, end, database="postgres")[0][0]
        except psycopg.Error:
            return True

    @property
    def is_writable(self) -> bool:
        """Whether a server takes writes."""
        return any(map(self.takes_writes, self.roles))

    @property
    def redis_pid(self) -> int:
        """The process of Redis; 0 where it does not run."""
        return self.system.supervisor.services()["redis"].pid

    def running(self) -> set[str]:
        """The services that run."""
        found = self.system.supervisor.services()
        known = {role: SERVICES[role] for role in self.variant.roles}
        return {role for role, name in known.items() if found[name].running or found[name].state == "STARTING"}

    # Its life

    def create(self) -> None:
        """Fill it, back up everything, and keep a cold copy."""
        system = self.system
        self._start()
        replication.accept(system.node("postgres"), system.state, replication.STANDBY_SLOT, replication.RECEIVER_SLOT)
        system.start("receiver", *["standby"] * self.variant.standby)
        if not self.variant.standby:
            system.sql("postgres", f"SELECT pg_drop_replication_slot('{replication.STANDBY_SLOT}')")
        names = [DATABASE]
        if self.variant.other:
            self.sql(f"CREATE DATABASE {OTHER} OWNER {ROLE}")
            names.append(OTHER)
        if self.variant.owner != ROLE:
            self.sql(f"ALTER DATABASE {DATABASE} OWNER TO {self.variant.owner}")
            self.sql(f"GRANT CREATE ON SCHEMA public TO {ROLE}; GRANT ALL ON DATABASE {DATABASE} TO {ROLE}", DATABASE)
        self.ledgers = {
            name: Ledger(DatabaseStore(name, lambda name=name: self.address(name)))  # type: ignore[misc]
            for name in names
        }
        self.ledgers[REDIS] = Ledger(RedisStore(REDIS, self.redis))
        self.uploads.mkdir(parents=True)
        (self.files / "app.py").write_text("print('code')\n")
        self.ledgers[FILES] = Ledger(FilesStore(FILES, self.uploads), deletes=0.01)  # a deleted one counts as missing
        for name in names:
            self.sql(f"SET ROLE {ROLE}; {TABLES}", name)
        self.sql(f"SET ROLE {ROLE}; CREATE TABLE {UNRELATED} AS SELECT generate_series(1, 100) AS id", DATABASE)
        chance = random.Random(0)
        for ledger in self.ledgers.values():
            for _ in range(FIRST_WRITES):
                assert ledger.write(chance) == "acknowledged"
        for flow in ("backup-database", "backup-redis", "backup-files", "backup-cluster"):
            ran = self.launch(flow)
            assert ran.is_done, f"{flow}: {ran.text}\n{ran.output}"
        self._stop()
        self.cold.mkdir()
        for path in self._changing():
            run(["cp", "-a", path, self.cold / path.name])
        self._first = {name: (ledger.copy(), ledger.next_attempt) for name, ledger in self.ledgers.items()}

    def reset(self) -> None:
        """Begin a round: everything as it was when the cold copy was taken, and running."""
        self._kill()
        for path in self._changing():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for path in self.cold.iterdir():
            run(["cp", "-a", path, self.root / path.name])
        for name, (writes, number) in self._first.items():
            ledger = self.ledgers[name]
            ledger.restart(writes)
            ledger.known = {one.attempt: one for one in writes}
            ledger.next_attempt = number
        self.tokens.clear()
        self._start()
        self.system.start("receiver", *["standby"] * self.variant.standby)
        until(self._streams, what="the streams of the first server", seconds=60, every_seconds=0.05)

    def _streams(self) -> bool:
        wanted = {"receiver", *["standby"] * self.variant.standby}
        return self.system.streaming() >= wanted

    def _start(self) -> None:
        for role in ("redis", *[REPLICA] * self.variant.replica):
            self.system.supervisor.start(role)
        self.system.start("postgres")
        until(self.redis_answers, what="Redis", seconds=60, every_seconds=0.05)
        if self.variant.replica:
            until(self.replica_follows, what="the replica of Redis", seconds=60, every_seconds=0.05)

    def redis_answers(self) -> bool:
        """Whether it answers, with its data loaded."""
        try:
            return bool(self.redis().ping())
        except redis.RedisError:
            return False

    def replica_follows(self) -> bool:
        """Whether the replica of Redis has its master's data, and gets every write."""
        try:
            return self.redis(REPLICA).info("replication").get("master_link_status") == "up"
        except redis.RedisError:
            return False

    def _stop(self) -> None:
        self._close()
        self.system.stop("standby", "postgres", "receiver")
        for role in ("redis", *[REPLICA] * self.variant.replica):
            self.system.supervisor.stop(role)

    def _close(self) -> None:
        for ledger in self.ledgers.values():
            if isinstance(ledger.store, DatabaseStore):
                ledger.store.close()

    def _kill(self) -> None:
        """What runs is of no further use."""
        self._close()
        supervisor = self.system.supervisor
        for name in map(SERVICES.__getitem__, self.variant.roles):
            with contextlib.suppress(xmlrpc.client.Fault):  # it is stopped already
                supervisor._call("stopProcess", name, False)

        def is_over() -> bool:
            left = [process for process in self.system.processes() if process.pid != supervisor.pid()]
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            return not left and all(
                one.state in ("STOPPED", "EXITED", "FATAL") for one in supervisor.services().values()
            )

        until(is_over, what="the end of the servers", seconds=60, every_seconds=0.03)

    def _changing(self) -> list[Path]:
        return [path for path in self.root.iterdir() if path.name not in LASTING]


@contextlib.contextmanager
def running_world(variant: Variant) -> Iterator[World]:
    """A system of that kind; ended and removed when the block is left."""
    template = Template.made()
    system = SmallSystem(template, variant)
    try:
        system.launch()
        world = World(system, variant)
        world.create()
        yield world
    finally:
        system.remove()
        template.remove()
