"""An environment with a real database, a real Redis, real logs and something that answers /health (a plugin)."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from flows.routine import daily_findings
from runbook import kinds
from runbook.report import Finding, Report
from tasks import application
from tests.redis.servers import PASSWORD, RedisServer, running_redis
from tests.servers import ADMIN_PASSWORD, ROLE_PASSWORD, PostgresServer, running_postgres

NAME, TOKYO = "trial", ZoneInfo("Asia/Tokyo")
TOML = """
name = "trial"
timezone = "Asia/Tokyo"
reports = "{base}/reports"
[objectives]
rpo = "1h"
rto = "4h"
[thresholds]
"backup.age_seconds" = [3600, 86400]
"host.disk.used_ratio" = {disk}
"host.load.per_processor" = [1000, 1000]
"host.memory.used_ratio" = [1.0, 1.0]
[postgres]
port = {postgres}
database = "{database}"
user = "grc_user"
password_env = "TRIAL_PASSWORD"
admin_password_env = "TRIAL_ADMIN_PASSWORD"
programs = "{programs}"
data_directory = "{data}"
os_user = "{user}"
[redis]
port = {redis}
password_env = "TRIAL_REDIS_PASSWORD"
data_directory = "{redis_data}"
[services]
kind = "supervisor"
names = {{}}
[backups]
survives = "server"
postgres = "{base}/backups/postgresql"
redis = "{base}/backups/redis"
files = "{base}/backups/files"
cluster = "{base}/backups/cluster"
wal = "{base}/backups/wal"
spool = "{base}/spool"
[application]
url = "{backend}"
frontend_url = "{frontend}"
health_path = "/health"
frontend_health_path = "/health"
web_directory = "{web}"
repository = "{web}"
[logs]
app = "{base}/log/app.log"
audit = "{base}/log/audit.log"
backup = "{base}/log/db_backup.log"
rotation = "{base}/logrotate.conf"
access_logger = "grc_backend.access"
access_message = "request"
not_data = ["/api/auth/"]
ai_message = "AI API Call"
"""


class Health(BaseHTTPRequestHandler):
    """Answers as `Serving` says."""

    server: Serving

    def do_GET(self) -> None:
        body = json.dumps(self.server.body).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the tests' output is their own."""


class Serving(ThreadingHTTPServer):
    """An application of which only /health is there."""

    status, body = 200, {"status": "ok"}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@dataclass
class Day:
    """An environment, and what a test changes of it."""

    base: Path
    postgres: PostgresServer
    redis: RedisServer
    backend: Serving
    frontend: Serving
    database: str

    @property
    def logs(self) -> Path:
        return self.base / "log"

    def write(self, more: str = "", **values: object) -> None:
        """The TOML anew, with other values and more sections."""
        known = {
            "base": self.base, "postgres": self.postgres.port, "database": self.database,
            "programs": self.postgres.programs, "data": self.postgres.data, "user": self.postgres.account.name,
            "redis": self.redis.port, "redis_data": self.redis.data, "backend": self.backend.url,
            "frontend": self.frontend.url, "disk": [1.0, 1.0], "web": "",
        }  # fmt: skip
        (self.base / "trial.toml").write_text(TOML.format(**{**known, **values}) + more)

    def log(self, *lines: str, name: str = "app.log") -> None:
        """Lines at the end of a log."""
        with (self.logs / name).open("a") as log:
            log.writelines(lines)


@pytest.fixture(scope="session")
def day_redis() -> Iterator[RedisServer]:
    with running_redis(settings=["maxmemory 100mb"]) as server:
        yield server


@pytest.fixture(scope="session")
def counting() -> Iterator[PostgresServer]:
    """A server that counts statements."""
    with running_postgres(settings=["shared_preload_libraries=pg_stat_statements"]) as server:
        server.create_database("grc_db")
        server.sql("CREATE EXTENSION pg_stat_statements", database="grc_db")
        yield server


@pytest.fixture
def day(
    postgres_server: PostgresServer, day_redis: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Day]:
    """All is well in it, but that there is no backup."""
    for name, value in {
        "PREFECT_API_URL": "http://127.0.0.1:9/api",
        "OPS_ENVIRONMENT": NAME,
        "OPS_ENVIRONMENT_FILE": str(tmp_path / "trial.toml"),
        "TRIAL_PASSWORD": ROLE_PASSWORD,
        "TRIAL_ADMIN_PASSWORD": ADMIN_PASSWORD,
        "TRIAL_REDIS_PASSWORD": PASSWORD,
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(daily_findings, "HEALTH_SECONDS", 1.0)  # of what is not well; what is may take its time
    monkeypatch.setattr(application, "HEALTH_TIMEOUT_SECONDS", 120.0)
    monkeypatch.setattr(kinds, "RETRY_DELAYS_SECONDS", [])
    if not postgres_server.is_running:
        postgres_server.start()
    database = f"routine_{abs(hash(tmp_path)) % 10**8}"
    postgres_server.create_database(database)
    servers = [Serving(("127.0.0.1", 0), Health) for _ in range(2)]
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    (tmp_path / "log").mkdir()
    made = Day(tmp_path, postgres_server, day_redis, *servers, database)
    made.write()
    made.log(app_line("began", hours=72), app_line("request", hours=0))
    yield made
    for server in servers:
        server.shutdown()
        server.server_close()
    if not postgres_server.is_running:
        postgres_server.start()
    postgres_server.drop_database(database)


def finding(report: Report, name: str) -> Finding:
    """The only one of that name, or whose name begins so."""
    found = [one for one in report.findings if one.name == name]
    found = found or [one for one in report.findings if one.name.startswith(name)]
    assert len(found) == 1, f"{name} in {[(one.name, one.value) for one in report.findings]}"
    return found[0]


def rows(report: Report, name: str) -> list[tuple[str, ...]]:
    """Of the only table whose name begins so."""
    (table,) = [item for item in report.evidence if item.name.startswith(name)]
    return list(table.rows)


def ago(hours: float) -> datetime:
    return datetime.now(UTC) - timedelta(hours=hours)


def app_line(message: str, hours: float = 1.0, level: str = "INFO", **fields: object) -> str:
    """As the application writes it, so many hours ago."""
    entry = {"timestamp": ago(hours).isoformat(), "level": level, "logger": "grc", "message": message, "module": "m",
             "function": "f", "line": 1}  # fmt: skip
    return json.dumps(entry | fields) + "\n"


def access_line(
    path: str, ms: float, status: int | None = 200, *, hours: float = 1.0, user: str = "u1", method: str = "GET"
) -> str:
    """As the application writes of a request; without a status, as it never does."""
    told = {"status": status} if status else {}
    return app_line("request", hours, logger="grc_backend.access", method=method, path=path, duration_ms=ms,
                    user_id=user, request_id="r", resource="", **told)  # fmt: skip
