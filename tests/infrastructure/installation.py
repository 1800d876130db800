"""A Prefect as production has it: the API and the background services apart, PostgreSQL, Redis, a password."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import httpx
import prefect.settings
from pyrage import x25519

from lab.servers.supervision import Program, Supervisor
from lab.state.base import CHECKOUT
from lab.state.environment import operator_environment
from runbook.wait import until
from tests.fixtures.prefect_client import other_server
from tests.fixtures.servers import ADMIN_PASSWORD, ROLE, ROLE_PASSWORD, PostgresServer, free_port
from tests.redis.servers import PASSWORD as REDIS_PASSWORD
from tests.redis.servers import RedisServer

NAME = "trial"
AUTH = "ops:p@ss word-4717"
SUPERVISOR_PASSWORD = "super-4718"
OPERATIONS, ESCROWED, STRANGER = (x25519.Identity.generate() for _ in range(3))
PATIENCE_SECONDS = 240
TOML = """
name = "{name}"
disposable = true
reports = "{base}/reports"
[objectives]
rpo = "1h"
rto = "4h"
[thresholds]
"backup.age_seconds" = [3600, 86400]
[postgres]
port = {postgres.port}
database = "grc_db"
user = "grc_user"
password_env = "TRIAL_PASSWORD"
admin_password_env = "TRIAL_ADMIN_PASSWORD"
programs = "{postgres.programs}"
data_directory = "{postgres.data}"
os_user = "{postgres.account.name}"
[redis]
port = {redis.port}
password_env = "TRIAL_REDIS_PASSWORD"
data_directory = "{redis.data}"
config_file = "{redis.configuration}"
server_program = "{redis.program}"
os_user = "{redis.account.name}"
[services]
kind = "supervisor"
url = "http://127.0.0.1:{supervisor.port}"
username = "ops"
password_env = "OPS_SUPERVISOR_PASSWORD"
names = {{ prefect-api = "prefect-api", prefect-services = "prefect-services" }}
[backups]
postgres = "{base}/backups/postgresql"
redis = "{base}/backups/redis"
files = "{base}/backups/files"
cluster = "{base}/backups/cluster"
wal = "{base}/backups/wal"
prefect = "{base}/backups/prefect"
spool = "{base}/spool"
recipients = ["{operations}", "{escrowed}"]
identity_env = "TRIAL_IDENTITY"
[prefect_server]
port = {postgres.port}
database = "prefect"
user = "grc_user"
password_env = "TRIAL_PASSWORD"
admin_password_env = "TRIAL_ADMIN_PASSWORD"
programs = "{postgres.programs}"
data_directory = "{postgres.data}"
os_user = "{postgres.account.name}"
api_url = "{api}"
auth_env = "TRIAL_AUTH"
"""


class Installation:
    """Prefect's API and background services under a supervisord, on servers of their own."""

    def __init__(self, base: Path, python: Path) -> None:
        self.base = base
        self.python = python
        """What has the Prefect that serves."""
        self.postgres = PostgresServer()
        self.redis = RedisServer()
        self.port = free_port()
        self.supervisor = Supervisor(base / "supervisord.conf", free_port(), SUPERVISOR_PASSWORD, base / "log")
        self.workers: list[subprocess.Popen[bytes]] = []

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    def variables(self) -> dict[str, str]:
        """What deployments/compose.yaml sets for both."""
        login = f"{ROLE}:{quote(ROLE_PASSWORD, safe='')}"
        redis = f"redis://:{quote(REDIS_PASSWORD, safe='')}@127.0.0.1:{self.redis.port}"
        return {
            "PREFECT_HOME": str(self.base / "home"),
            "PREFECT_API_URL": self.api,
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": (
                f"postgresql+asyncpg://{login}@127.0.0.1:{self.postgres.port}/prefect"
            ),
            "PREFECT_SERVER_API_AUTH_STRING": AUTH,
            "PREFECT_API_AUTH_STRING": AUTH,
            "PREFECT_MESSAGING_BROKER": "prefect_redis.messaging",
            "PREFECT_MESSAGING_CACHE": "prefect_redis.messaging",
            "PREFECT_SERVER_EVENTS_CAUSAL_ORDERING": "prefect_redis.ordering",
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect_redis.lease_storage",
            "PREFECT_REDIS_MESSAGING_URL": f"{redis}/0",
            "PREFECT_REDIS_MESSAGING_PORT": str(self.redis.port),  # for one that knows no URL yet
            "PREFECT_REDIS_MESSAGING_PASSWORD": REDIS_PASSWORD,
            "PREFECT_REDIS_MESSAGING_PUBLISHER_PUBLISH_EVERY": "1",
            "PREFECT_SERVER_DOCKET_URL": f"{redis}/1",
            "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
        }

    def start(self) -> None:
        """Both servers, then the API, which makes its tables; then the background services."""
        self.postgres.initdb()
        self.postgres.start()
        self.postgres.create_database("prefect")
        self.redis.start()
        for path in ("log", "home"):
            (self.base / path).mkdir()
        self.launch()

    def launch(self) -> None:
        """A supervisord, then the API, then what works in the background."""
        command = (str(self.python), "-m", "prefect", "server")
        api = (*command, "start", "--no-services", "--host", "127.0.0.1", "--port", str(self.port))
        programs = [("prefect-api", api), ("prefect-services", (*command, "services", "start"))]
        self.supervisor.write(
            [Program(name, argv, self.base, self.variables(), stop_group=True) for name, argv in programs]
        )
        self.supervisor.launch(operator_environment())
        self.supervisor.start("prefect-api")
        until(self.is_ready, what="Prefect's API", seconds=PATIENCE_SECONDS)
        self.supervisor.start("prefect-services")

    def is_ready(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.api}/ready", trust_env=False, timeout=10).status_code == 200
        return False

    def describe(self) -> Path:
        """The environment's TOML."""
        path = self.base / f"{NAME}.toml"
        path.write_text(
            TOML.format(
                name=NAME,
                base=self.base,
                postgres=self.postgres,
                redis=self.redis,
                supervisor=self.supervisor,
                operations=OPERATIONS.to_public(),
                escrowed=ESCROWED.to_public(),
                api=self.api,
            )
        )
        return path

    def environ(self) -> dict[str, str]:
        """What a shell of an operator's has."""
        return {
            "OPS_ENVIRONMENT": NAME,
            "OPS_ENVIRONMENT_FILE": str(self.describe()),
            "TRIAL_PASSWORD": ROLE_PASSWORD,
            "TRIAL_ADMIN_PASSWORD": ADMIN_PASSWORD,
            "TRIAL_REDIS_PASSWORD": REDIS_PASSWORD,
            "TRIAL_AUTH": AUTH,
            "TRIAL_IDENTITY": str(OPERATIONS),
            "OPS_SUPERVISOR_PASSWORD": SUPERVISOR_PASSWORD,
            "PREFECT_API_URL": self.api,
            "PREFECT_API_AUTH_STRING": AUTH,
        }

    @contextlib.contextmanager
    def client(self) -> Iterator[None]:
        """This process's Prefect client talks to it."""
        wanted = {
            prefect.settings.PREFECT_API_URL: self.api,
            prefect.settings.PREFECT_API_AUTH_STRING: AUTH,
            prefect.settings.PREFECT_CLIENT_MAX_RETRIES: 8,
            prefect.settings.PREFECT_FLOWS_HEARTBEAT_FREQUENCY: 30,
        }
        with other_server(wanted):
            yield

    def worker(self, pool: str, *options: str, api: str = "") -> subprocess.Popen[bytes]:
        """A process worker."""
        argv = [sys.executable, "-m", "prefect", "worker", "start", "--type", "process", "--pool", pool, *options]
        environment = {
            **operator_environment(),
            "PREFECT_HOME": str(self.base / "home"),
            "PREFECT_API_URL": api or self.api,
            "PREFECT_API_AUTH_STRING": AUTH,
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
            "PREFECT_CLIENT_MAX_RETRIES": "8",
            "PREFECT_CLIENT_RETRY_EXTRA_CODES": "500",
            "PYTHONPATH": str(CHECKOUT),
        }
        with (self.base / "log" / f"worker-{secrets.token_hex(3)}.log").open("wb") as log:
            self.workers.append(subprocess.Popen(argv, cwd=CHECKOUT, env=environment, stdout=log, stderr=log))
        return self.workers[-1]

    @contextlib.contextmanager
    def new_servers(self, *, put_back: bool = True) -> Iterator[None]:
        """A new cluster and an empty Redis on the same ports while the block runs; then the earlier ones again, unless
        nobody needs them any more."""
        earlier = self.postgres, self.redis
        self.postgres.stop(signal.SIGQUIT)
        self.redis.crash()
        self.postgres, self.redis = PostgresServer(port=self.postgres.port), RedisServer(port=self.redis.port)
        try:
            self.postgres.initdb()
            self.postgres.start()
            self.redis.start()
            self.describe()
            yield
        finally:
            if put_back:
                for program in ("prefect-services", "prefect-api"):
                    self.supervisor.stop(program)
            self.postgres.remove()
            self.redis.remove()
            self.postgres, self.redis = earlier
            if put_back:
                self.postgres.start()
                self.redis.start()
                self.describe()
                self.supervisor.start("prefect-api")
                until(self.is_ready, what="Prefect's API", seconds=PATIENCE_SECONDS)
                self.supervisor.start("prefect-services")

    def sql(self, statement: str, *parameters: object) -> list[tuple[object, ...]]:
        return self.postgres.sql(statement, *parameters, database="prefect")

    def remove(self) -> None:
        for worker in self.workers:
            worker.terminate()
        for worker in self.workers:
            with contextlib.suppress(subprocess.TimeoutExpired):  # one whose server is out of reach does not end
                worker.wait(30)
            worker.kill()
            worker.wait(PATIENCE_SECONDS)
        with contextlib.suppress(Exception):
            self.supervisor.shutdown()
        self.postgres.remove()
        self.redis.remove()


@contextlib.contextmanager
def running_installation(python: Path = Path(sys.executable)) -> Iterator[Installation]:
    """One that runs; its variables are this process's."""
    base = Path(tempfile.mkdtemp(prefix="ops-prefect-"))
    made = Installation(base, python)
    kept = dict(os.environ)
    try:
        made.start()
        os.environ.update(made.environ())
        yield made
    finally:
        made.remove()
        os.environ.clear()
        os.environ.update(kept)
        shutil.rmtree(base, ignore_errors=True)
