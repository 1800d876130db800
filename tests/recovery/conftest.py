"""The lab with one backup of each kind, and ways to look at it from outside."""

from __future__ import annotations

import contextlib
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import redis

from blocks.environment import Environment
from flows.application.files import backup_files
from flows.database.backup import backup_database
from flows.redis.persistence import backup_redis
from lab import lifecycle
from lab.client import Lab
from runbook.wait import until
from tasks.redis.failover.group import read_last_seen
from tasks.redis.sentinels import ask_sentinels
from tests.fixtures import forked

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class System:
    """The lab's system as its users and servers are seen from outside."""

    lab: Lab

    @property
    def name(self) -> str:
        return self.lab.name

    def sql(self, statement: str, database: str = "grc_db") -> list[tuple[Any, ...]]:
        with psycopg.connect(
            self.lab.status()["postgres"]["admin_dsn"], dbname=database, autocommit=True
        ) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def drop(self) -> None:
        """The application's database under it: PostgreSQL waits 5 s for the end of its sessions, and gives up."""

        def dropped() -> bool:
            with contextlib.suppress(psycopg.errors.ObjectInUse):
                self.sql("DROP DATABASE IF EXISTS grc_db WITH (FORCE)", "postgres")
                return True
            return False

        until(dropped, what="the drop of the database", seconds=120)

    def redis(self, database: int = 0) -> redis.Redis:
        url = str(self.lab.status()["redis"]["url"])
        return redis.Redis.from_url(f"{url.rpartition('/')[0]}/{database}" if url.count("/") > 2 else url, db=database)

    def redis_answers(self) -> bool:
        """Whether the master serves."""
        try:
            return bool(self.redis().ping())
        except redis.RedisError:
            return False

    def replica_is_known(self) -> bool:
        """Whether the Sentinels know the stream that the replica follows: they ask every 10 s. If the master dies
        before, the replica is no source of its data."""
        block = Environment.find(self.name).redis
        seen = read_last_seen(block, ask_sentinels(block))
        return bool(seen and seen.replid == self.redis().info("replication")["master_replid"])

    def keys(self, database: int) -> int:
        """Keys that a restore brings back: the cache's are left out."""
        return sum(not key.startswith(b"cache:") for key in self.redis(database).scan_iter(count=1000))

    def healthy(self, application: str = "") -> bool:
        """`application`: its URL, where the lab cannot be asked for it because its Prefect server hangs."""
        try:
            url = application or self.lab.status()["application"]["url"]
            return httpx.get(f"{url}/health", timeout=60).status_code == 200
        except httpx.HTTPError:
            return False

    def untouched(self) -> tuple[object, ...]:
        """What must not change when a run is refused: the database's identity, every service's process."""
        until(self._is_settled, what="services that neither start nor stop", seconds=120)
        processes = {name: service["pid"] for name, service in self.lab.status()["services"].items()}
        return (self.sql("SELECT oid FROM pg_database WHERE datname = 'grc_db'", "postgres"), processes)

    def _is_settled(self) -> bool:
        """Whether no service is about to have another process, e.g. after what an earlier test did to it."""
        services, _ = lifecycle.existing(self.name)
        return {found.state for found in services.supervisor.services().values()} <= {"RUNNING", "STOPPED", "EXITED"}

    def log_in(self) -> bool:
        """A real log-in of the application's role."""
        with psycopg.connect(self.lab.status()["postgres"]["dsn"]) as connection:
            return connection.execute("SELECT count(*) > 0 FROM users").fetchone() == (True,)

    def store(self, kind: str) -> Path:
        return Path(self.lab.status()["stores"][kind])


def restore(system: System, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """full_restore from the command line, without a Prefect server: it may have died with the rest. From the dump and
    the backups of Redis and the files, unless `words` have another method or source."""
    argv = ["-m", "flows.recovery.full_restore", "--environment", system.name, "--confirm", system.name]
    argv += [] if "--method" in words else ["--method", "dump"]
    argv += [] if "--redis-source" in words else ["--redis-source", "backup"]
    argv += [] if "--files-source" in words else ["--files-source", "backup"]
    environment = {**os.environ, "PREFECT_API_URL": "http://127.0.0.1:9/api", **variables}
    return forked.run([*argv, *words], environment)


@pytest.fixture(scope="session")
def system(lab: Lab) -> System:
    found = System(lab)
    for flow in (backup_database, backup_redis, backup_files):
        flow.fn(lab.name)
    return found


@pytest.fixture(autouse=True)
def whole_again(request: pytest.FixtureRequest) -> Any:
    """After a test: the application is healthy, else the next test would fail for this one's reason."""
    yield
    if "system" in request.fixturenames and "lost" not in request.fixturenames:
        system = request.getfixturevalue("system")
        until(system.healthy, what="the application's health after the test", seconds=120)
