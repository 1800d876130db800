"""deployments/compose.yaml for real: every service from local images on the tests' engine, with nothing pulled.

The base of all three is the tests' Debian. The flows' image is built from deployments/Dockerfile, its packages with pip
and uv as everywhere; PostgreSQL's image stands for the official one by a script that keeps its contract.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from pyrage import x25519

from lab.state.base import CHECKOUT
from runbook.wait import until
from tests.fixtures.engine import Engine
from tests.fixtures.servers import free_port
from tests.system.image import IMAGE, host_engine

__all__ = ["host_engine"]
pytestmark = pytest.mark.system
PATIENCE_SECONDS = 420
NAME = "trial"
BASE = "compose-base:1"
AUTHORITIES = Path("/etc/ssl/certs/ca-certificates.crt")
BASE_FILE = f"""FROM {IMAGE}
COPY ca.crt {AUTHORITIES}
"""
POSTGRES_FILE = f"""FROM {IMAGE}
ENV PATH=/usr/lib/postgresql/17/bin:/usr/sbin:/usr/bin:/sbin:/bin PGDATA=/var/lib/postgresql/data
RUN install -d -m 700 -o postgres -g postgres /var/lib/postgresql/data
COPY start /start
USER postgres
ENTRYPOINT ["sh", "/start"]
"""
POSTGRES_START = """set -e
if [ ! -e "$PGDATA/PG_VERSION" ]; then
    printf '%s' "$POSTGRES_PASSWORD" >/tmp/password
    initdb --username="$POSTGRES_USER" --pwfile=/tmp/password --auth-local=trust $POSTGRES_INITDB_ARGS
    rm /tmp/password
    pg_ctl --wait --options="-c listen_addresses='' -c unix_socket_directories=/tmp" start
    createdb --host=/tmp --username="$POSTGRES_USER" "$POSTGRES_DB"
    pg_ctl --wait stop
fi
exec "$@" -c unix_socket_directories=/tmp
"""
REDIS_FILE = f"""FROM {IMAGE}
RUN install -d -o redis -g redis /data
"""
TOML = """
name = "trial"
reports = "/var/lib/interview-ops/reports"
[pools]
database = "trial-containers"
[objectives]
rpo = "1h"
rto = "4h"
[thresholds]
"backup.age_seconds" = [3600, 86400]
[services]
kind = "docker"
names = {{}}
[backups]
prefect = "/var/lib/interview-ops/backups"
postgres = "/var/lib/interview-ops/backups-postgresql"
spool = "/var/lib/interview-ops/spool"
recipients = ["{operations}", "{escrowed}"]
identity_env = "TRIAL_IDENTITY"
[prefect_server]
port = {database}
admin_user = "prefect"
password_env = "TRIAL_PASSWORD"
admin_password_env = "TRIAL_PASSWORD"
programs = "/usr/lib/postgresql/17/bin"
api_url = "http://127.0.0.1:{api}/api"
auth_env = "TRIAL_AUTH"
containers = {{ prefect-api = "interview-ops-api-1", prefect-services = "interview-ops-services-1" }}
"""


@dataclass
class Site:
    """The project on an engine, with ports and secrets of its own."""

    engine: Engine
    base: Path
    ports: dict[str, int] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict)

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.ports['PREFECT_PORT']}/api"

    def describe(self) -> None:
        """The env files and the environment's TOML, as an operator writes them."""
        names = (
            "PREFECT_PORT",
            "PREFECT_DATABASE_PORT",
            "PREFECT_REDIS_PORT",
            "PROCESS_WORKER_PORT",
            "DOCKER_WORKER_PORT",
        )
        self.ports = {name: free_port() for name in names}
        self.secrets = {
            "PREFECT_PASSWORD": secrets.token_hex(12),
            "PREFECT_DATABASE_PASSWORD": secrets.token_hex(12),
            "PREFECT_REDIS_PASSWORD": secrets.token_hex(12),
        }
        identities = x25519.Identity.generate(), x25519.Identity.generate()
        socket = Path(self.engine.host.removeprefix("unix://"))
        (self.base / "environments").mkdir()
        (self.base / "environments" / f"{NAME}.toml").write_text(
            TOML.format(
                operations=identities[0].to_public(),
                escrowed=identities[1].to_public(),
                database=self.ports["PREFECT_DATABASE_PORT"],
                api=self.ports["PREFECT_PORT"],
            )
        )
        lines = {
            **self.ports,
            **self.secrets,
            "OPS_ENVIRONMENT": NAME,
            "OPS_IMAGE": "interview-ops:test",
            "POSTGRES_IMAGE": "compose-postgres:1",
            "REDIS_IMAGE": "compose-redis:1",
            "DOCKER_SOCKET": socket,
            "DOCKER_GID": socket.stat().st_gid,
            "OPS_SECRETS_FILE": self.base / "secrets.env",
            "OPS_ENVIRONMENTS": self.base / "environments",
        }
        own = {
            "TRIAL_PASSWORD": self.secrets["PREFECT_DATABASE_PASSWORD"],
            "TRIAL_AUTH": f"ops:{self.secrets['PREFECT_PASSWORD']}",
            "TRIAL_IDENTITY": identities[0],
        }
        for name, values in (("compose.env", lines), ("secrets.env", own)):
            (self.base / name).write_text("".join(f"{key}={value}\n" for key, value in values.items()))
            (self.base / name).chmod(0o600)

    def docker(self, *words: str | Path, directory: Path = CHECKOUT) -> str:
        # What a shell has set wins over the env file, and this one has a lab's.
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("OPS_", "PREFECT_"))}
        done = subprocess.run(
            ["docker", *map(str, words)],
            cwd=directory,
            capture_output=True,
            text=True,
            check=False,
            env={**ours, "DOCKER_HOST": self.engine.host, "DOCKER_BUILDKIT": "0"},
        )
        assert done.returncode == 0, f"docker {words}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def compose(self, *words: str) -> str:
        return self.docker("compose", "-f", "deployments/compose.yaml", "--env-file", self.base / "compose.env", *words)

    def image(self, name: str, dockerfile: str, **files: bytes) -> None:
        """A small image on the tests' Debian."""
        directory = self.base / name.partition(":")[0]
        directory.mkdir()
        for path, content in {"Dockerfile": dockerfile.encode(), **files}.items():
            (directory / path.replace("_", ".")).write_bytes(content)
        self.docker("build", "--quiet", "--tag", name, ".", directory=directory)

    def build(self) -> None:
        """The image of the flows; what this machine's pip and uv are told (an index, certificates), they are there too."""
        told = {
            name: value
            for name, value in os.environ.items()
            if name.startswith(("PIP_INDEX", "PIP_CERT", "UV_", "SSL_CERT_FILE"))
        }
        lines = "".join(f"ENV {name}={json.dumps(value)}\n" for name, value in told.items())
        self.image(BASE, BASE_FILE + lines, ca_crt=AUTHORITIES.read_bytes())
        self.image("compose-postgres:1", POSTGRES_FILE, start=POSTGRES_START.encode())
        self.image("compose-redis:1", REDIS_FILE)
        self.docker(
            "build",
            "--quiet",
            "--network=host",
            f"--build-arg=BASE={BASE}",
            "--build-arg=PACKAGES=",
            "--file=deployments/Dockerfile",
            "--tag=interview-ops:test",
            ".",
        )

    def ask(self, method: str, path: str, body: object = None) -> Any:
        user, password = "ops", self.secrets["PREFECT_PASSWORD"]
        answer = httpx.request(
            method, f"{self.api}{path}", json=body, auth=(user, password), trust_env=False, timeout=60
        )
        assert answer.is_success, (path, answer.status_code, answer.text)
        return answer.json()

    def rest(self) -> None:
        """No schedule begins anything from now on, and what one has begun is at its end: what is launched by hand does
        not wait for the environment's lock, and at night (in Tokyo) a schedule takes that every few minutes."""
        for found in self.ask("POST", "/deployments/filter", {}):
            self.ask("POST", f"/deployments/{found['id']}/pause_deployment")
        under_way = {"flow_runs": {"state": {"type": {"any_": ["PENDING", "RUNNING"]}}}}
        until(
            lambda: self.ask("POST", "/flow_runs/count", under_way) == 0,
            what="the end of what is under way",
            seconds=PATIENCE_SECONDS,
            every_seconds=1,
        )

    def launch(self, deployment: str, **parameters: object) -> tuple[str, str]:
        """Run a deployment to its end; its state and message."""
        found = self.ask("GET", f"/deployments/name/{deployment}")
        run = self.ask("POST", f"/deployments/{found['id']}/create_flow_run", {"parameters": parameters})

        def state() -> dict[str, Any]:
            return dict(self.ask("GET", f"/flow_runs/{run['id']}")["state"])

        final = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
        until(lambda: state()["type"] in final, what=f"the end of {deployment}", seconds=PATIENCE_SECONDS)
        return state()["type"], str(state()["message"])


@pytest.fixture(scope="module")
def site(host_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site(host_engine, tmp_path_factory.mktemp("site"))
    made.describe()
    made.build()
    try:
        made.compose("up", "--detach", "--wait", "--wait-timeout", str(PATIENCE_SECONDS))
        yield made
    finally:
        for line in made.compose("ps", "--all", "--format", "json").splitlines():
            told = json.loads(line)
            print(told["Service"], told["Status"], told["Health"])
        print(made.compose("logs", "--tail=15"))
        made.compose("--profile", "*", "down", "--volumes", "--timeout", "20")


def test_the_compose_file_s_services_run_flows_and_show_no_secret(site: Site) -> None:
    states = [json.loads(line) for line in site.compose("ps", "--format", "json").splitlines()]
    assert {one["Service"]: one["Health"] for one in states} == dict.fromkeys(
        ("postgres", "redis", "api", "services", "process-worker", "docker-worker"), "healthy"
    )
    assert httpx.get(f"{site.api}/health", trust_env=False).status_code == 200
    refused = httpx.post(
        f"{site.api}/flows/filter", json={}, headers={"Origin": "https://example.com"}, trust_env=False
    )
    assert refused.status_code == 401
    assert "access-control-allow-origin" not in refused.headers
    page = httpx.get(f"{site.api.removesuffix('/api')}/v2", trust_env=False, follow_redirects=True)
    assert (page.status_code, "<html" in page.text.lower()) == (200, True), "the UI"
    assert "deployed" in site.compose("run", "--rm", "deploy")
    site.rest()
    assert site.launch(f"backup-prefect/{NAME}")[0] == "COMPLETED", "on the process worker"
    assert site.launch(f"verify-backup/{NAME}", kind="prefect")[0] == "COMPLETED", "in a container of its own"
    ended = site.compose("exec", "process-worker", "python", "-m", "deployments.stopping")
    # Whatever an automation has begun by now.
    assert re.fullmatch(r"\d+ flows were ended\n", ended), "it knows the worker among the container's processes"
    restored = site.compose("run", "--rm", "recover", "restore", "--environment", NAME, "--confirm", NAME)
    assert "proven by content" in restored, "into the containers, by a container"
    rehearsed = site.compose("run", "--rm", "recover", "upgrade", "--environment", NAME)
    assert "nothing to upgrade" in rehearsed, "this image wrote the backup itself"
    assert site.launch(f"backup-prefect/{NAME}")[0] == "COMPLETED", "after it"
    arguments = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    kept = [value.partition(":")[2] or value for value in site.secrets.values()]
    assert not [line for line in arguments for secret in kept if secret in line], "the list of processes"
    assert not [secret for secret in kept if secret in json.dumps(site.ask("POST", "/block_documents/filter", {}))]
    assert not [secret for secret in kept if secret in site.docker("history", "--no-trunc", "interview-ops:test")]
    # By its process: the output of a short `docker run` can be lost on a busy machine.
    container = site.compose("ps", "--quiet", "api").strip()
    process = int(site.docker("inspect", "--format", "{{.State.Pid}}", container))
    assert psutil.Process(process).uids().real == 10001
