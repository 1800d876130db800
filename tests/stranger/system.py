"""A system that nobody here has seen: PostgreSQL, Redis and an application of other names under a supervisord.

with running_stranger() as stranger:
    stranger.run("backup-database")           # python -m flows.launch, without a Prefect server
    stranger.destroy()
    stranger.restore(confirm=NAME)            # python -m flows.recovery.full_restore
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis

from flows.database.backup import backup_database
from flows.database.base_backup import backup_cluster
from flows.redis.persistence import backup_redis
from lab.processes import MARK, OsAccount, run, write
from lab.servers.supervision import Program, Supervisor
from lab.state.base import CHECKOUT
from runbook.errors import Unreachable
from runbook.wait import until
from tests.fixtures import forked
from tests.fixtures.postgres.templates import new_directory
from tests.fixtures.servers import binaries, free_port

NAME = "stranger"
DATABASE, ROLE = "members", "members_app"
ADMIN_PASSWORD, ROLE_PASSWORD, REDIS_PASSWORD, SUPERVISOR_PASSWORD = (
    "adm1n:/p@ss",
    "r0le p@ss/word",
    "r3d:pass",
    "sup3r",
)
APPLICATION = Path(__file__).parent / "application.py"
TOML = """\
name = "{name}"
reports = "{root}/reports"

[objectives]
rpo = "1h"
rto = "4h"

[postgres]
port = {postgres}
database = "members"
user = "members_app"
password_env = "STRANGER_PASSWORD"
admin_password_env = "STRANGER_ADMIN_PASSWORD"
programs = "{programs}"
data_directory = "{root}/pg/data"
os_user = "{user}"

[redis]
port = {redis}
password_env = "STRANGER_REDIS_PASSWORD"
data_directory = "{root}/redis/data"
config_file = "{root}/redis/redis.conf"
server_program = "{redis_program}"
os_user = "{user}"

[services]
kind = "supervisor"
url = "http://127.0.0.1:{supervisor}"
username = "ops"
password_env = "STRANGER_SUPERVISOR_PASSWORD"
names = {{ postgres = "database", redis = "keys", backend = "members" }}

[backups]
postgres = "{root}/backups/postgres"
redis = "{root}/backups/redis"

[application]
url = "http://127.0.0.1:{application}"
health_path = "/ready"
"""
SCHEMA = """
CREATE TABLE users (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, email text NOT NULL UNIQUE, name text NOT NULL);
CREATE TABLE scores (user_id int NOT NULL REFERENCES users, s int NOT NULL, w numeric NOT NULL,
                     CHECK (s BETWEEN 0 AND 100 AND w > 0));
CREATE VIEW best AS SELECT user_id, max(s) AS s FROM scores WHERE s > -1 AND (w > 1 OR (s > 2 OR w < 3)) GROUP BY 1;
INSERT INTO users (email, name) SELECT format('u%s@example.org', n), 'Name ' || n FROM generate_series(1, 500) n;
INSERT INTO scores SELECT id, id % 100, 1.5 FROM users;
"""

ALEMBIC = """\
[alembic]
script_location = %(here)s/migrations
"""
ENVIRONMENT = """\
import os
from alembic import context
from sqlalchemy import create_engine
engine = create_engine(os.environ["DATABASE_URL"].replace("postgresql://", "postgresql+psycopg://"))
with engine.connect() as connection:
    context.configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()
"""
REVISION = """\
from alembic import op
revision, down_revision = "{name}", {after!r}
def upgrade(): op.execute({statement!r})
def downgrade(): pass
"""


@dataclass(frozen=True)
class Ran:
    """What a command printed, and its exit code."""

    code: int
    text: str


class Stranger:
    """The system. `programs` are PostgreSQL's, where they are not the wheel's; `alembic`: it migrates with Alembic;
    `wal`: a receiver streams its WAL, and it has a store of base backups."""

    def __init__(self, programs: Path | None = None, *, alembic: bool = False, wal: bool = False) -> None:
        self.alembic, self.wal = alembic, wal
        self.account = OsAccount.of_servers()
        self.programs, self.redis_program = programs or binaries().postgres, binaries().redis
        self.root = new_directory("stranger")
        self.ports = {name: free_port() for name in ("postgres", "redis", "supervisor", "application")}
        self.toml = self.root / f"{NAME}.toml"
        self.supervisor = Supervisor(
            self.root / "supervisord.conf", self.ports["supervisor"], SUPERVISOR_PASSWORD, self.root / "log"
        )
        (self.root / "log").mkdir()
        self.backend = self.root / "app" / "backend"
        if alembic:
            self.add_revision("first", None, SCHEMA)
            (self.backend / "alembic.ini").write_text(ALEMBIC)
            (self.backend / "migrations/env.py").write_text(ENVIRONMENT)
        for name in ("pg", "redis", "redis/data", *["wal"] * wal):
            self.account.directory(self.root / name, 0o750)
        self.describe()

    def describe(self, *changes: tuple[str, str], more: str = "") -> None:
        """Write the TOML: the minimal one, with texts replaced and lines added."""
        text = TOML.format(
            name=NAME,
            root=self.root,
            user=self.account.name,
            programs=self.programs,
            redis_program=self.redis_program,
            **self.ports,
        )
        if self.wal:
            stores = f'cluster = "{self.root}/backups/cluster"\nwal = "{self.root}/backups/wal"\n'
            text = text.replace("[backups]\n", f'[wal]\ndirectory = "{self.root}/wal"\n\n[backups]\n{stores}')
            text = text.replace('redis = "keys", ', 'redis = "keys", receiver = "receiver", ')
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new)
        if self.alembic:
            more += f'directory = "{self.backend.parent}"\nbackend_directory = "{self.backend}"\n'
            more += f'python = "{sys.executable}"\n'
            text = text.replace("[backups]", f'[backups]\nfiles = "{self.root}/backups/files"')
        write(self.toml, text + more, 0o644)

    def add_revision(self, name: str, after: str | None, statement: str) -> None:
        """One more migration in the application's checkout."""
        versions = self.backend / "migrations/versions"
        versions.mkdir(parents=True, exist_ok=True)
        (versions / f"{name}.py").write_text(REVISION.format(name=name, after=after, statement=statement))

    @property
    def variables(self) -> dict[str, str]:
        """What an operator's shell has."""
        return {
            "OPS_ENVIRONMENT": NAME,
            "OPS_ENVIRONMENT_FILE": str(self.toml),
            "STRANGER_PASSWORD": ROLE_PASSWORD,
            "STRANGER_ADMIN_PASSWORD": ADMIN_PASSWORD,
            "STRANGER_REDIS_PASSWORD": REDIS_PASSWORD,
            "STRANGER_SUPERVISOR_PASSWORD": SUPERVISOR_PASSWORD,
        }

    def start(self) -> None:
        """Make the servers, start everything, and fill it."""
        password = self.root / "pg" / "password"
        write(password, ADMIN_PASSWORD, 0o400, self.account)
        run(
            [
                *(self.programs / "initdb", "-D", self.root / "pg/data", "-U", "postgres", f"--pwfile={password}"),
                *("--auth=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8", "--data-checksums", "--no-sync"),
            ],
            cwd=self.root / "pg",
            account=self.account,
        )
        password.unlink()
        lines = (
            f"port {self.ports['redis']}\nbind 127.0.0.1\nrequirepass {REDIS_PASSWORD}\ndir {self.root}/redis/data\n"
        )
        write(
            self.root / "redis/redis.conf", lines + "appendonly yes\nenable-debug-command local\n", 0o640, self.account
        )
        self.supervisor.write(self._processes())
        self.supervisor.launch({"PATH": os.environ["PATH"]})
        self.start_database()
        if self.wal:
            self.sql("SELECT pg_create_physical_replication_slot('wal_archive', true)", database="postgres")
            self.supervisor.start("receiver")
        self.sql(f"CREATE ROLE {ROLE} LOGIN PASSWORD '{ROLE_PASSWORD}'", database="postgres")
        self.sql(f"CREATE DATABASE {DATABASE} OWNER {ROLE}", database="postgres")
        if self.alembic:
            address = f"postgresql://{ROLE}@127.0.0.1:{self.ports['postgres']}/{DATABASE}"
            run(
                [sys.executable, "-m", "alembic", "upgrade", "head"],
                cwd=self.backend,
                environment={**os.environ, "DATABASE_URL": address, "PGPASSWORD": ROLE_PASSWORD},
            )
        else:
            self.sql(f"SET ROLE {ROLE}; {SCHEMA}")
        self.supervisor.start("keys")
        client = self.redis()
        until(client.ping, what="Redis", seconds=120, every_seconds=0.05)
        client.mset({f"key:{number}": f"value {number}" for number in range(300)})
        self.supervisor.start("members")
        until(self.ready, what="the application", seconds=120, every_seconds=0.05)

    def start_database(self) -> None:
        """Nothing happens where it runs already."""
        self.supervisor.start("database")
        until(self._answers, what="PostgreSQL", seconds=120, every_seconds=0.05)

    def _processes(self) -> list[Program]:
        user = self.account.name if self.account.is_other else ""
        postgres = [
            self.programs / "postgres",
            "-D",
            self.root / "pg/data",
            "-c",
            f"port={self.ports['postgres']}",
            "-c",
            "listen_addresses=127.0.0.1",
            "-c",
            "unix_socket_directories=",
            "-c",
            "fsync=off",
        ]
        environment = {
            "DATABASE_URL": f"host=127.0.0.1 port={self.ports['postgres']} dbname={DATABASE} user={ROLE}",
            "PGPASSWORD": ROLE_PASSWORD,
            "REDIS_URL": f"redis://:{REDIS_PASSWORD}@127.0.0.1:{self.ports['redis']}/0",
            "PORT": str(self.ports["application"]),
        }
        receiver = [
            *(self.programs / "pg_receivewal", "-D", self.root / "wal", "--slot=wal_archive", "--synchronous"),
            *("--status-interval=1", "--no-password"),
            f"--dbname=host=127.0.0.1 port={self.ports['postgres']} user=postgres application_name=receiver",
        ]
        return [
            *([Program("receiver", receiver, self.root / "wal", {"PGPASSWORD": ADMIN_PASSWORD}, user)] * self.wal),
            Program("database", postgres, self.root / "pg", user=user, stop_signal="INT"),
            Program("keys", [self.redis_program, self.root / "redis/redis.conf"], self.root, user=user),
            Program("members", [sys.executable, APPLICATION], self.backend if self.alembic else self.root, environment),
        ]

    def sql(self, statement: str, *, database: str = DATABASE) -> list[Any]:
        """As administrator; the rows of the last statement."""
        with psycopg.connect(
            host="127.0.0.1",
            port=self.ports["postgres"],
            user="postgres",
            password=ADMIN_PASSWORD,
            dbname=database,
            autocommit=True,
            connect_timeout=60,
        ) as connection:
            cursor = connection.execute(statement.encode())
            while cursor.nextset():
                pass
            return cursor.fetchall() if cursor.description else []

    def redis(self) -> redis.Redis:
        """A client of the live server."""
        return redis.Redis(
            port=self.ports["redis"], password=REDIS_PASSWORD, socket_timeout=60, socket_connect_timeout=60
        )

    def content(self) -> tuple[Any, ...]:
        """What must come back: every row, and every key."""
        rows = [self.sql(f"SELECT t::text FROM {table} t ORDER BY 1") for table in ("users", "scores", "best")]
        client = self.redis()
        return (*rows, {key: client.get(key) for key in client.scan_iter()})  # type: ignore[union-attr]

    def ready(self) -> bool:
        """Whether the application answers."""
        try:
            address = f"http://127.0.0.1:{self.ports['application']}/ready"
            with urllib.request.urlopen(address, timeout=30) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError:
            return False
        except OSError as error:
            raise Unreachable(str(error)) from None

    def destroy(self) -> None:
        """The demo's disaster: the database dropped, Redis's data removed, the services dead."""
        self.sql(f"DROP DATABASE {DATABASE} WITH (FORCE)", database="postgres")
        for name in ("members", "keys"):
            self.supervisor.stop(name)
        shutil.rmtree(self.root / "redis/data")

    def python(self, *words: str, **variables: str) -> Ran:
        """`python -m …` as an operator types it, without a Prefect server."""
        environment = {
            **{name: text for name, text in os.environ.items() if not name.startswith(("PREFECT_API", "OPS_"))},
            **self.variables,
            **variables,
        }
        done = forked.run(["-m", *words], environment, CHECKOUT, timeout=600, merge=True)
        return Ran(done.returncode, done.stdout)

    def run(self, runbook: str, **parameters: str) -> Ran:
        """Any runbook, by hand."""
        given = [f"{name}={value}" for name, value in parameters.items()]
        return self.python("flows.launch", runbook, f"environment={NAME}", *given)

    def restore(self, *options: str) -> Ran:
        """The main job."""
        return self.python("flows.recovery.full_restore", "--environment", NAME, *options)

    def report(self) -> dict[str, Any]:
        """The newest JSON report of a full restore."""
        newest = max((self.root / "reports").rglob("*full-restore*.json"), key=lambda path: path.name)
        found: dict[str, Any] = json.loads(newest.read_text())
        return found

    def remove(self) -> None:
        """Everything ends."""
        self.supervisor.shutdown(20)
        shutil.rmtree(self.root, ignore_errors=True)

    def _answers(self) -> bool:
        try:
            self.sql("SELECT 1", database="postgres")
        except psycopg.OperationalError as error:
            raise Unreachable(str(error).strip()) from None
        return True


@contextlib.contextmanager
def running_stranger(programs: Path | None = None, *, alembic: bool = False, wal: bool = False) -> Iterator[Stranger]:
    """The system, filled; removed when the block is left."""
    stranger = Stranger(programs, alembic=alembic, wal=wal)
    try:
        stranger.start()
        yield stranger
    finally:
        stranger.remove()


@contextlib.contextmanager
def backed_up_stranger() -> Iterator[Stranger]:
    """The system with a receiver of WAL, and a backup of each part."""
    with running_stranger(wal=True) as stranger, pytest.MonkeyPatch.context() as patch:
        for name, text in stranger.variables.items():
            patch.setenv(name, text)
        for flow in (backup_database, backup_redis, backup_cluster):
            flow.fn(NAME)
        yield stranger


__all__ = ["MARK", "NAME", "Stranger", "backed_up_stranger", "running_stranger"]
