"""An environment of real servers that is watched: a small PostgreSQL, a Redis, an application that answers `/health`."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from blocks.config import toml
from blocks.environment import Environment
from flows.monitoring.rounds import Round, take_round
from tests.fixtures.servers import ADMIN_PASSWORD, ROLE_PASSWORD, PostgresServer, running_postgres
from tests.redis.servers import PASSWORD, RedisServer, running_redis

NAME = "watched"
MOST_CONNECTIONS = 20
TOML = """
name = "watched"
disposable = true
unattended = ["clean-logs"]
reports = "{root}/reports"
[objectives]
rpo = "1h"
rto = "4h"
[thresholds]
"host.disk.used_ratio" = [0.9999, 0.9999] # of the test's host
"host.cpu.used_ratio" = [1.0, 1.0]
[postgres]
port = {postgres}
database = "grc_db"
user = "grc_user"
password_env = "WATCHED_PASSWORD"
admin_password_env = "WATCHED_ADMIN_PASSWORD"
[redis]
port = {redis}
password_env = "WATCHED_REDIS_PASSWORD"
drop_prefixes = ["cache:"]
[services]
kind = "supervisor"
names = {{}}
[application]
url = "http://127.0.0.1:{application}"
health_path = "/health"
[logs]
app = "{root}/app.log"
audit = "{root}/audit.log"
access_logger = "grc_backend.access"
access_message = "request"
not_data = ["/api/auth/"]
ai_message = "AI API Call"
[alerts]
channels = ["file"]
file = "{root}/alerts.jsonl"
path = [{{ contacts = ["on-call"] }}]
[alerts.contacts.on-call]
role = "オンコールSRE"
[ai_providers]
budget = 10
prices_from = "a test"
prices = {{ "gpt-4o" = [2.0, 8.0] }}
"""


class Backend(ThreadingHTTPServer):
    """Answers every request with `status`."""

    status = 200

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)


class _Answer(BaseHTTPRequestHandler):
    server: Backend

    def do_GET(self) -> None:
        body = json.dumps({"status": "ok" if self.server.status == 200 else "database unreachable"}).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Watched:
    """One test's environment; its minutes are the test's own: `at(3)` is the third one."""

    def __init__(self, root: Path, postgres: PostgresServer, redis: RedisServer, backend: Backend) -> None:
        self.root, self.postgres, self.redis, self.backend = root, postgres, redis, backend
        self.log, self.toml, self.reports = root / "app.log", root / "watched.toml", root / "reports"
        self.begin = datetime.now(UTC) - timedelta(minutes=10)  # Prefect shows no event of the future
        self.minute = -1
        values = {"root": root, "postgres": postgres.port, "redis": redis.port, "application": backend.server_port}
        self.toml.write_text(TOML.format(**values))
        self.log.write_text("")

    @property
    def environment(self) -> Environment:
        return toml.environment(NAME)

    def at(self, minute: int) -> datetime:
        return self.begin + timedelta(minutes=minute)

    def round(self) -> Round:
        """The next minute's, 20 requests having been answered well in it."""
        self.minute += 1
        self.requests(20)
        return take_round(self.environment, self.at(self.minute))

    def rounds(self, number: int) -> Round:
        return [self.round() for _ in range(number)][-1]

    def requests(self, number: int, status: int = 200, milliseconds: float = 20.0) -> None:
        """Lines of the application's access log, of this minute."""
        told = {
            "timestamp": (self.at(self.minute) - timedelta(seconds=1)).isoformat(),
            "level": "INFO",
            "logger": "grc_backend.access",
            "message": "request",
            "module": "access",
            "path": "/api/x",
            "status": status,
            "duration_ms": milliseconds,
        }
        with self.log.open("a") as file:
            file.write((json.dumps(told) + "\n") * number)
        os.utime(self.log, (self.at(self.minute).timestamp(),) * 2)

    def limit(self, metric: str, limit: float) -> None:
        """A threshold of the environment's TOML."""
        line = f'"{metric}" = [{limit}, {limit}]\n'
        kept = [one for one in self.toml.read_text().splitlines(keepends=True) if not one.startswith(f'"{metric}"')]
        self.toml.write_text("".join(kept).replace("[thresholds]\n", f"[thresholds]\n{line}"))


@pytest.fixture(scope="session")
def small_postgres() -> Iterator[PostgresServer]:
    with running_postgres(settings=[f"max_connections={MOST_CONNECTIONS}"]) as server:
        server.create_database("grc_db")
        yield server


@pytest.fixture(scope="session")
def small_redis() -> Iterator[RedisServer]:
    with running_redis() as server:
        yield server


@pytest.fixture
def backend() -> Iterator[Backend]:
    with Backend() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def watched(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small_postgres: PostgresServer,
    small_redis: RedisServer,
    backend: Backend,
) -> Watched:
    """All is well in it."""
    be_patient(monkeypatch)
    monkeypatch.setenv("OPS_ENVIRONMENT", NAME)
    monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(tmp_path / "watched.toml"))
    monkeypatch.setenv("WATCHED_PASSWORD", ROLE_PASSWORD)
    monkeypatch.setenv("WATCHED_ADMIN_PASSWORD", ADMIN_PASSWORD)
    monkeypatch.setenv("WATCHED_REDIS_PASSWORD", PASSWORD)
    return Watched(tmp_path, small_postgres, small_redis, backend)


def be_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here who lives answers, however busy the machine is: one round more or less is counted."""
    for name in (
        "blocks.postgres.nodes.ASK",
        "flows.monitoring.rounds.ANSWER",
        "tasks.application.health.HEALTH_TIMEOUT",
    ):
        monkeypatch.setattr(f"{name}_SECONDS", 120)


@contextlib.contextmanager
def without_prefect() -> Iterator[None]:
    """No Prefect server is known, whichever other tests have started."""
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        yield
