"""A host for diagnoses: PostgreSQL and Redis under a real supervisord, as the environment NAME, each easily spoilt."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import psycopg
import pytest
import redis

from blocks.services.supervisor import SupervisorServices
from lab.processes import write
from lab.servers.supervision import Program, Supervisor
from lab.state.environment import clean_environment
from runbook.errors import Unreachable
from runbook.page.form import Forms
from runbook.report import Evidence, Report, Status
from runbook.wait import until
from tests.fixtures.servers import ADMIN_PASSWORD, ROLE_PASSWORD, PostgresServer, free_port
from tests.redis.servers import PASSWORD, RedisServer
from tests.runbook.processes import prefect_server

__all__ = ["prefect_server"]

NAME = "sick"
SUPERVISOR_PASSWORD = "super-4714"
PLACES = 12
TOML = """
name = "sick"
disposable = true
reports = "{reports}"
[objectives]
rpo = "1h"
rto = "4h"
[thresholds]
"postgres.sessions.blocked_seconds" = [0.05, 3600]
"postgres.sessions.idle_in_transaction_seconds" = [3600, 7200]
{limits}
[postgres]
host = "{host}"
port = {port}
database = "grc_db"
user = "grc_user"
password_env = "SICK_PASSWORD"
admin_user = "{admin}"
admin_password_env = "SICK_ADMIN_PASSWORD"
programs = "{programs}"
data_directory = "{data}"
os_user = "{user}"
[redis]
host = "{redis_host}"
port = {redis_port}
password_env = "SICK_REDIS_PASSWORD"
data_directory = "{redis_data}"
config_file = "{redis_file}"
server_program = "{redis_program}"
drop_prefixes = ["cache:"]
os_user = "{user}"
{redis_more}
[services]
kind = "supervisor"
url = "http://127.0.0.1:{control}"
username = "ops"
password_env = "SICK_SUPERVISOR_PASSWORD"
names = {{ postgres = "postgresql", redis = "redis", backend = "grc-backend" }}
[application]
url = "{url}"
health_path = "{health}"
start_command = ["{{python}}", "-m", "uvicorn", "grc_backend.main:app", "--host", "127.0.0.1", "--port", "{{port}}"]
python = "{python}"
backend_directory = "{backend}"
env_file = "{env_file}"
{more}
"""


class Host:
    """Two servers, their supervisor, and the environment as an operator describes it."""

    def __init__(self) -> None:
        self.server = PostgresServer(
            settings=[f"max_connections={PLACES}", "max_prepared_transactions=2", "archive_mode=on"]
        )
        self.redis = RedisServer()
        self.control = free_port()
        self.root = Path(self.server.root) / "host"
        self.root.mkdir()
        self.env_file, self.backend, self.backend_port = self.root / ".env", self.root / "backend", free_port()
        self.backend.mkdir()
        self.supervisor = Supervisor(self.root / "supervisord.conf", self.control, SUPERVISOR_PASSWORD, self.root)

    def launch(self) -> None:
        """Returns when both answer."""
        self.server.initdb()
        account = self.server.account
        user = account.name if account.is_other else ""
        options = [word for setting in self.server.settings for word in ("-c", setting)]
        address = (
            "-c",
            "listen_addresses=127.0.0.1",
            "-c",
            f"port={self.server.port}",
            "-c",
            "unix_socket_directories=",
        )
        postgres = (self.server.programs / "postgres", "-D", self.server.data, *address, *options)
        valkey = (self.redis.program, self.redis.configuration)
        serve = (sys.executable, "-m", "uvicorn", "grc_backend.main:app", "--port", str(self.backend_port))
        self.supervisor.write(
            [
                Program("postgresql", postgres, self.server.root, user=user, stop_signal="INT", autostart=True),
                Program("redis", valkey, self.redis.root, user=user, autostart=True),
                Program("grc-backend", serve, self.backend, {"PYTHONDONTWRITEBYTECODE": "1"}),
            ]
        )
        self.supervisor.launch({**clean_environment(), "PATH": os.environ["PATH"]})
        self.wait()
        self.server.create_database("grc_db")

    def wait(self) -> None:
        """Until both answer."""
        until(self._answers, what="PostgreSQL and Redis", seconds=120, every_seconds=0.05)

    def _answers(self) -> bool:
        try:
            self.server.sql("SELECT 1")
            return bool(self.redis.client().ping())
        except (psycopg.OperationalError, redis.RedisError) as error:
            raise Unreachable(str(error)) from None

    def remove(self) -> None:
        """Stop everything and remove it."""
        self.supervisor.shutdown()
        self.server.remove()
        shutil.rmtree(self.redis.root, ignore_errors=True)

    @property
    def services(self) -> SupervisorServices:
        """Its supervisord."""
        names = {"postgres": "postgresql", "redis": "redis", "backend": "grc-backend"}
        return SupervisorServices(
            url=f"http://127.0.0.1:{self.control}", username="ops", password=SUPERVISOR_PASSWORD, names=names
        )

    @contextlib.contextmanager
    def stopped(self, role: str) -> Iterator[None]:
        """The service is down while the block runs."""
        self.services.stop(role)
        try:
            yield
        finally:
            self.services.start(role)
            self.wait()

    def describe(self, directory: Path, **other: object) -> Path:
        """Write the environment; `other` values are wrong ones. Its reports are the test's own."""
        values = {
            "reports": directory / "reports",
            "host": "127.0.0.1",
            "port": self.server.port,
            "programs": self.server.programs,
            "data": self.server.data,
            "user": self.server.account.name,
            "redis_host": "127.0.0.1",
            "redis_port": self.redis.port,
            "redis_data": self.redis.data,
            "redis_file": self.redis.configuration,
            "redis_program": self.redis.program,
            "control": self.control,
            "env_file": "",
            "url": "",
            "python": sys.executable,
            "backend": self.backend,
            "more": "",
            "redis_more": "",
            "limits": "",
            "admin": "postgres",
        }
        path, values = directory / "sick.toml", {**values, **other}
        path.write_text(TOML.format(**values, health="/health" if values["url"] else ""))
        return path

    def write_env(self, password: str = ROLE_PASSWORD) -> Path:
        """The application's own file."""
        login = f"grc_user:{quote(password, safe='')}"
        write(
            self.env_file, f'DATABASE_URL="postgresql+asyncpg://{login}@127.0.0.1:{self.server.port}/grc_db"\n', 0o600
        )
        return self.env_file


@pytest.fixture(scope="session")
def _host() -> Iterator[Host]:
    host = Host()
    try:
        host.launch()
        yield host
    finally:
        host.remove()


@pytest.fixture
def host(_host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A healthy host, and its environment."""
    monkeypatch.setenv("OPS_ENVIRONMENT", NAME)
    monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(_host.describe(tmp_path)))
    for name, value in {
        "SICK_PASSWORD": ROLE_PASSWORD,
        "SICK_ADMIN_PASSWORD": ADMIN_PASSWORD,
        "SICK_REDIS_PASSWORD": PASSWORD,
        "SICK_SUPERVISOR_PASSWORD": SUPERVISOR_PASSWORD,
    }.items():
        monkeypatch.setenv(name, value)
    return _host


def cause(report: Report) -> str:
    """The likely cause, which comes first everywhere."""
    first = report.findings[0]
    assert first.name == "likely cause"
    assert next(iter(report.facts)) == "likely cause"
    assert report.facts["likely cause"] == first.value
    if first.status is not Status.OK:
        assert first.hint
    return first.value


def evidence(report: Report, begins: str) -> Evidence:
    """One piece of it, by how its name begins."""
    return next(item for item in report.evidence if item.name.startswith(begins))


def following(report: Report) -> str:
    """The runbooks to launch next, as the page of a run without Prefect shows them."""
    return "\n".join(Forms().next(one, NAME) for finding in report.findings for one in finding.follow)
