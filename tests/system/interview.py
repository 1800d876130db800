"""The interview system on a host of the tests: installed, filled, read from outside, destroyed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg
import redis
from psycopg import sql

from lab.application import install
from lab.data import seed
from lab.processes import run
from lab.progress import silent
from lab.servers import postgres, valkey
from lab.state.base import PYTHON
from runbook import shell
from runbook.wait import until
from tests.fixtures.engine import Engine
from tests.system.hosts import NAME, PROGRAMS, DockerHost, Done, Host, SystemdHost, new_host
from tests.system.image import USER

SOURCE = Path(install.__file__).parent
HOSTS: dict[str, type[Host]] = {"systemd": SystemdHost, "docker": DockerHost}
READY_SECONDS = 180
BACKUPS = (
    "flows.database.backup.backup_database",
    "flows.redis.persistence.backup_redis",
    "flows.application.files.backup_files",
)
# What the last checks of a restore leave behind: their log-in, their session and its messages, and what is noted of them.
WRITTEN_BY_CHECKS = ("interview_sessions", "interview_messages", "audit_events")
TOML = """
name = "{name}"
reports = "{base}/reports"
[objectives]
rpo = "1h"
rto = "4h"
[thresholds]
"backup.age_seconds" = [3600, 86400]
"backup.gap_seconds" = [3600, 86400]
[postgres]
port = {ports.postgres}
database = "grc_db"
user = "grc_user"
password_env = "OPS_POSTGRES_PASSWORD"
admin_password_env = "OPS_POSTGRES_ADMIN_PASSWORD"
programs = "{programs}"
data_directory = "{host.postgres_data}"
os_user = "{host.postgres_user}"
[redis]
port = {ports.redis}
password_env = "OPS_REDIS_PASSWORD"
data_directory = "{host.redis_data}"
config_file = "{host.redis_configuration}"
os_user = "{host.redis_user}"
drop_prefixes = ["cache:"]
protected_prefixes = ["session:", "queue:"]
[services]
{host.services}
[backups]
postgres = "{base}/backups/postgresql"
redis = "{base}/backups/redis"
files = "{base}/backups/files"
[application]
url = "http://127.0.0.1:{ports.backend}"
health_path = "/health"
directory = "{host.application}"
backend_directory = "{host.application}/backend"
python = "{python}"
env_file = "{host.application}/backend/.env"
user = "monitor"
password_env = "OPS_APPLICATION_PASSWORD"
[logs]
app = "{host.logs}/app.log"
audit = "{host.logs}/audit.log"
backup = "{host.logs}/backup.log"
access_logger = "grc_backend.access"
access_message = "request"
not_data = ["/api/auth/"]
ai_message = "AI API Call"
"""


@dataclass(frozen=True)
class Content:
    """All that a restore has to bring back: rows in their text form, keys with their values, files with their owners."""

    rows: dict[str, Counter[str]]
    keys: dict[tuple[int, bytes], tuple[object, bool]]
    files: dict[str, tuple[int, int, int, str]]


class Interview:
    """The system on one host."""

    def __init__(self, host: Host) -> None:
        self.host, self.state = host, host.state

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.state.ports.backend}"

    def provision(self) -> None:
        """From an empty host to a healthy system with data."""
        self._install()
        self.host.boot()
        until(self._answers, what="PostgreSQL and Redis", seconds=READY_SECONDS)
        postgres.create_database(self.state, self.state.ports.postgres)
        dsn = postgres.dsn(self.state, self.state.ports.postgres)
        variables = {**os.environ, **self.host.variables, "DATABASE_URL": dsn}
        run([PYTHON, "-m", "alembic", "upgrade", "head"], cwd=SOURCE, environment=variables)
        run([PYTHON, "-m", "grc_backend.create_user", "monitor"], cwd=SOURCE, environment=variables)
        seed.seed(dsn, 1, progress=silent)
        valkey.fill(self.state)
        until(self.healthy, what="health", seconds=READY_SECONDS)

    def _install(self) -> None:
        host, ports = self.host, self.state.ports
        values = {
            "HOST": "127.0.0.1",
            "PORT": str(ports.backend),
            "DATABASE_URL": postgres.dsn(self.state, ports.postgres),
            "REDIS_URL": valkey.url(self.state),
            "AI_PROVIDERS_URL": f"http://127.0.0.1:{ports.ai_providers}",
            "FRONTEND_PORT": str(ports.frontend),
            "LOG_DIRECTORY": str(host.logs),
        }
        install.install(host.application, values)
        host.logs.mkdir()
        run(["chown", "--recursive", f"{USER}:{USER}", host.application, host.logs])
        text = TOML.format(name=NAME, base=host.base, host=host, ports=ports, programs=PROGRAMS, python=PYTHON)
        (host.base / f"{NAME}.toml").write_text(text)

    def sql(self, statement: str, database: str = "grc_db") -> list[tuple[Any, ...]]:
        """As administrator."""
        dsn = postgres.admin_dsn(self.state, self.state.ports.postgres, database)
        with psycopg.connect(dsn, autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def redis(self, database: int = 0) -> redis.Redis:
        """A client."""
        return redis.Redis.from_url(valkey.url(self.state, database))

    def healthy(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        return False

    def logs_in(self) -> bool:
        """A user with the right password, and with no other."""
        answers = []
        for password in (self.state.passwords.application, "wrong"):
            body = {"username": "monitor", "password": password}
            answers.append(httpx.post(f"{self.url}/api/auth/login", json=body, timeout=30).status_code)
        return answers == [200, 401]

    def back_up(self) -> None:
        """All three, by the flows."""
        for flow in BACKUPS:
            module, _, name = flow.rpartition(".")
            done = self.host.program(PYTHON, "-c", f"from {module} import {name}; {name}.fn({NAME!r})")
            assert not done.code, done.text

    def restore(self, *words: str) -> Done:
        """full_restore by its command line."""
        argv = ("-m", "flows.recovery.full_restore", "--environment", NAME, "--confirm", NAME)
        return self.host.program(PYTHON, *argv, *words)

    def report(self) -> dict[str, Any]:
        """The newest full restore's."""
        newest = max((self.host.base / "reports").glob("*-full-restore.json"), key=lambda path: path.stat().st_mtime)
        found: dict[str, Any] = json.loads(newest.read_text())
        return found

    def content(self) -> Content:
        """All that is live."""
        keys: dict[tuple[int, bytes], tuple[object, bool]] = {}
        for number in (0, 1):
            with self.redis(number) as client:
                keys |= {
                    (number, key): (_value(client, key), client.ttl(key) >= 0) for key in client.scan_iter(count=1000)
                }
        return Content(self._rows(), keys, dict(_files(self.host.application)))

    def _rows(self) -> dict[str, Counter[str]]:
        names = [
            name
            for (name,) in self.sql(
                "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'm')"
            )
        ]
        dsn = postgres.admin_dsn(self.state, self.state.ports.postgres, "grc_db")
        with psycopg.connect(dsn) as connection:
            statement = sql.SQL("SELECT t::text FROM ONLY {} t")
            return {
                name: Counter(text for (text,) in connection.execute(statement.format(sql.Identifier(name))))
                for name in names
            }

    def destroy(self) -> None:
        """The backend dies with its files, tables and keys go; and then somebody goes on writing."""
        shutil.rmtree(self.host.application / "backend")
        self.host.kill("backend")
        self.sql("DROP SCHEMA public CASCADE")
        self.sql("CREATE SCHEMA public")
        self.sql("CREATE TABLE late AS SELECT 'written after the disaster' AS what")
        with self.redis() as client:
            client.flushall()
            client.set("late", "written after the disaster")
        (self.host.application / "late").write_text("written after the disaster")

    def erase(self) -> None:
        """The servers die, and their data directories are gone."""
        self.host.program("rm", "-rf", self.host.postgres_data, self.host.redis_data)
        for role in ("postgres", "redis"):
            self.host.kill(role)

    def _answers(self) -> bool:
        with contextlib.suppress(psycopg.OperationalError, redis.RedisError):
            return bool(self.sql("SELECT 1", "postgres") and self.redis().ping())
        return False


@contextlib.contextmanager
def running(kind: str, engine: Engine) -> Iterator[Interview]:
    """The system on a new host; the AI providers, which are others' companies, run here."""
    with new_host(HOSTS[kind], engine) as host:
        port = {"AI_PROVIDERS_PORT": str(host.state.ports.ai_providers)}
        with shell.spawn([PYTHON, "-m", "ai_providers"], environment=port, directory=SOURCE):
            interview = Interview(host)
            interview.provision()
            yield interview


def _value(client: redis.Redis, key: bytes) -> object:
    """Of one key, by its kind."""
    match client.type(key):
        case b"string":
            return client.get(key)
        case b"hash":
            return client.hgetall(key)
        case b"list":
            return client.lrange(key, 0, -1)
        case b"set":
            return client.smembers(key)
        case b"zset":
            return client.zrange(key, 0, -1, withscores=True)
        case b"stream":
            return client.xrange(key)
    raise AssertionError(f"{key!r} is of another kind")


def _files(directory: Path) -> Iterator[tuple[str, tuple[int, int, int, str]]]:
    for path in directory.rglob("*"):
        if "__pycache__" not in path.parts:
            found = path.lstat()
            content = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(found.st_mode) else ""
            yield str(path.relative_to(directory)), (found.st_mode, found.st_uid, found.st_gid, content)
