"""Hosts of the interview system: one whose systemd runs it from units, and one whose engine runs it in containers."""

from __future__ import annotations

import abc
import contextlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from docker.types import Mount

from lab.processes import OsAccount, run
from lab.state.base import CHECKOUT, PYTHON
from lab.state.state import LabState, Ports
from runbook.wait import until
from tests.fixtures.engine import Engine
from tests.fixtures.servers import free_port, taken_ports
from tests.system.image import IMAGE, USER

NAME = "interview"
PROGRAMS = Path("/usr/lib/postgresql/17/bin")
START_SECONDS = 180
POSTGRES_USER, REDIS_USER = 4001, 4002
REDIS_SETTINGS = "bind 127.0.0.1\nport {port}\nrequirepass {password}\n"
POSTGRES_SETTINGS = {"listen_addresses": "127.0.0.1", "shared_preload_libraries": "pg_stat_statements"}
UNITS = {"postgres": "postgresql@17-main", "redis": "redis-server", "backend": "grc-backend"}
UNIT = """
[Unit]
After=postgresql.service redis-server.service
StartLimitIntervalSec=3600
[Service]
User=grc
Environment=LANG=C.UTF-8 "PAGE_TITLE=AI interview" 'TOKEN=secret-value'
WorkingDirectory={directory}
ExecStart={python} -m grc_backend
Restart=on-failure
RestartSec=100ms
[Install]
WantedBy=multi-user.target
"""


@dataclass(frozen=True)
class Turn:
    """When a service last ended and began (in one clock), and a name of that run."""

    ended: float
    began: float
    run: str


@dataclass(frozen=True)
class Done:
    """What a program on the host said."""

    code: int
    text: str


H = TypeVar("H", bound="Host")


class Host(abc.ABC):
    """A host with PostgreSQL, Redis and the backend. What is in `base` has the same paths there as here."""

    postgres_user: str
    redis_user: str
    postgres_data: Path
    redis_data: Path
    redis_configuration: Path
    services: str
    """[services] of the environment."""

    def __init__(self, engine: Engine, base: Path) -> None:
        self.engine, self.base = engine, base
        self.state = LabState(str(base), Ports.chosen(taken_ports()))
        self.application = base / "opt" / "grc"
        self.logs = base / "log"
        self.shared = {str(path): {"bind": str(path), "mode": "ro"} for path in (CHECKOUT, *_python())}

    @property
    def variables(self) -> dict[str, str]:
        """What an operator's worker has in its environment."""
        passwords = self.state.passwords
        return {
            "OPS_ENVIRONMENT": NAME,
            "OPS_ENVIRONMENT_FILE": str(self.base / f"{NAME}.toml"),
            "OPS_POSTGRES_PASSWORD": passwords.postgres,
            "OPS_POSTGRES_ADMIN_PASSWORD": passwords.postgres_admin,
            "OPS_REDIS_PASSWORD": passwords.redis,
            "OPS_APPLICATION_PASSWORD": passwords.application,
            "PYTHONPATH": str(CHECKOUT),
        }

    @abc.abstractmethod
    def boot(self) -> None:
        """Start everything."""

    @abc.abstractmethod
    def program(self, *argv: str | Path) -> Done:
        """Run a program as the operator's worker would."""

    @abc.abstractmethod
    def turn(self, role: str) -> Turn:
        """The last life of a service, by the manager's own book."""

    @abc.abstractmethod
    def kill(self, role: str) -> None:
        """The service dies at once; returns when its manager has given it up."""

    @abc.abstractmethod
    def start(self, role: str) -> None:
        """By hand."""

    @abc.abstractmethod
    def broken(self, role: str) -> contextlib.AbstractContextManager[None]:
        """Stopped, the service does not start again until the block is left."""


class SystemdHost(Host):
    """A container with Debian's systemd as its init, and Debian's own units, directories and configuration. An
    operator's worker runs in it."""

    postgres_user, redis_user = "postgres", "redis"
    postgres_data = Path("/var/lib/postgresql/17/main")
    redis_data = Path("/var/lib/redis")
    redis_configuration = Path("/etc/redis/redis.conf")
    services = """\
kind = "systemd"
names = { postgres = "postgresql", redis = "redis", backend = "grc-backend" }
"""
    container: Any

    def boot(self) -> None:
        """Configured before its first start; the administrator's password is set from the server's own account."""
        self.container = self.engine.client.containers.create(
            IMAGE,
            "/lib/systemd/systemd",
            network_mode="host",
            privileged=True,
            cgroupns="private",
            tmpfs={"/run": ""},
            environment={"container": "docker"},
            # A directory of an image's layer cannot be renamed: on a host it is on a disk.
            volumes={**self.shared, str(self.base): {"bind": str(self.base)}},
            mounts=[Mount("/var/lib", None, type="volume")],
        )
        ports, passwords = self.state.ports, self.state.passwords
        settings = {**POSTGRES_SETTINGS, "port": ports.postgres}
        text = "".join(f"{name} = '{value}'\n" for name, value in settings.items())
        self.put("/etc/postgresql/17/main/conf.d/here.conf", text)
        self._append(self.redis_configuration, REDIS_SETTINGS.format(port=ports.redis, password=passwords.redis))
        unit = UNIT.format(directory=self.application / "backend", python=PYTHON)
        self.put("/etc/systemd/system/grc-backend.service", unit)
        self.container.start()
        until(self._booted, what="the start of systemd", seconds=START_SECONDS)
        self._systemctl("enable", "--now", "grc-backend")
        sentence = f"ALTER ROLE postgres PASSWORD '{passwords.postgres_admin}'"
        argv = ["psql", "--quiet", "-p", str(ports.postgres), "-c", sentence]
        until(lambda: not self.container.exec_run(argv, user="postgres")[0], what="PostgreSQL", seconds=START_SECONDS)

    def program(self, *argv: str | Path) -> Done:
        code, text = self.container.exec_run(
            [str(word) for word in argv], environment={**self.variables, "LANG": "C.UTF-8"}, workdir=str(CHECKOUT)
        )
        return Done(code, text.decode())

    def turn(self, role: str) -> Turn:
        names = "InactiveEnterTimestampMonotonic,ActiveEnterTimestampMonotonic,InvocationID"
        text = self._systemctl("show", UNITS[role], f"--property={names}")
        found = dict(line.split("=", 1) for line in text.splitlines())
        ended, began, life = (found[name] for name in names.split(","))
        return Turn(float(ended), float(began), life)

    def kill(self, role: str) -> None:
        self._systemctl("kill", "--signal=KILL", UNITS[role])
        until(lambda: self.active(UNITS[role]) == "failed", what="that systemd gives up", seconds=START_SECONDS)

    def start(self, role: str) -> None:
        self._systemctl("reset-failed", UNITS[role])
        self._systemctl("start", UNITS[role])

    @contextlib.contextmanager
    def broken(self, role: str) -> Iterator[None]:
        place = f"/etc/systemd/system/{UNITS[role]}.service.d"
        self.put(f"{place}/broken.conf", "[Service]\nExecStart=\nExecStart=/bin/false\n")
        self._systemctl("daemon-reload")
        yield
        self.program("rm", "-r", place)
        self._systemctl("daemon-reload")

    def log_in_with(self, key: str) -> int:
        """Let root in by ssh with that public key; the port on loopback."""
        port = free_port()
        self.put("/etc/ssh/sshd_config.d/here.conf", f"Port {port}\nListenAddress 127.0.0.1\n")
        self.put("/root/.ssh/authorized_keys", key)
        self._systemctl("start", "ssh")
        return port

    def active(self, unit: str) -> str:
        """ActiveState of a unit."""
        return self._systemctl("show", unit, "--property=ActiveState", "--value")

    def _systemctl(self, *words: str) -> str:
        done = self.program("systemctl", *words)
        assert not done.code, done.text
        return done.text.strip()

    def _booted(self) -> bool:
        """A container has no kernel modules to load, which is why one unit has failed."""
        return self.program("systemctl", "is-system-running").text.strip() in ("running", "degraded")

    def put(self, path: str | Path, text: str) -> None:
        """A file of root's that all may read."""
        entry = tarfile.TarInfo(str(path).lstrip("/"))
        entry.mode = 0o644
        self._write(entry, text.encode())

    def _append(self, path: Path, text: str) -> None:
        """As an editor would: the file keeps its owner and mode."""
        chunks, _ = self.container.get_archive(str(path))
        with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as archive:
            entry = archive.getmembers()[0]
            file = archive.extractfile(entry)
            assert file
            content = file.read()
        entry.name = str(path).lstrip("/")
        self._write(entry, content + text.encode())

    def _write(self, entry: tarfile.TarInfo, content: bytes) -> None:
        packed = io.BytesIO()
        entry.size = len(content)
        with tarfile.open(fileobj=packed, mode="w") as archive:
            archive.addfile(entry, io.BytesIO(content))
        self.container.put_archive("/", packed.getvalue())


class DockerHost(Host):
    """Three containers, each with a user of its own for whom the host has no name. An operator's worker runs on the
    host, which is this one."""

    postgres_user, redis_user = str(POSTGRES_USER), f"{REDIS_USER}:{REDIS_USER}"

    def __init__(self, engine: Engine, base: Path) -> None:
        super().__init__(engine, base)
        self.postgres_data, self.redis_data = base / "postgresql" / "data", base / "redis" / "data"
        self.redis_configuration = base / "redis" / "redis.conf"
        names = ", ".join(f'{role} = "{base.name}-{role}"' for role in ("postgres", "redis", "backend"))
        self.services = f'kind = "docker"\nhost = "{engine.host}"\nnames = {{ {names} }}\n'

    def boot(self) -> None:
        (self.base / "broken").mkdir()
        self._make_cluster()
        ports = self.state.ports
        settings = {**POSTGRES_SETTINGS, "port": ports.postgres, "unix_socket_directories": ""}
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        postgres = [str(PROGRAMS / "postgres"), "-D", str(self.postgres_data), *options]
        # A smart shutdown would wait for the clients; PostgreSQL's own image says so too.
        self._run("postgres", postgres, POSTGRES_USER, [self.postgres_data], stop_signal="SIGINT")
        self.redis_data.mkdir(parents=True)
        text = REDIS_SETTINGS.format(port=ports.redis, password=self.state.passwords.redis)
        self.redis_configuration.write_text(f"{text}dir {self.redis_data}\nappendonly yes\n")
        for path in (self.redis_data, self.redis_configuration):
            os.chown(path, REDIS_USER, REDIS_USER)
        redis = ["redis-server", str(self.redis_configuration)]
        self._run("redis", redis, REDIS_USER, [self.redis_data, self.redis_configuration])
        backend = self.application / "backend"
        self._run(
            "backend", [str(PYTHON), "-m", "grc_backend"], USER, [self.application, self.logs], working_dir=str(backend)
        )

    def program(self, *argv: str | Path) -> Done:
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        done = subprocess.run(
            [str(word) for word in argv],
            cwd=CHECKOUT,
            env={**kept, **self.variables, "LANG": "C.UTF-8"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return Done(done.returncode, done.stdout)

    def turn(self, role: str) -> Turn:
        state = self.container(role).attrs["State"]
        ended, began = (datetime.fromisoformat(state[name]).timestamp() for name in ("FinishedAt", "StartedAt"))
        return Turn(ended, began, state["StartedAt"])

    def kill(self, role: str) -> None:
        self.container(role).kill()
        self.container(role).wait()

    def start(self, role: str) -> None:
        self.container(role).start()

    @contextlib.contextmanager
    def broken(self, role: str) -> Iterator[None]:
        marker = self._marker(role)
        marker.touch()
        yield
        marker.unlink()

    def container(self, role: str) -> Any:
        """As the engine knows it now."""
        return self.engine.client.containers.get(f"{self.base.name}-{role}")

    def _marker(self, role: str) -> Path:
        return self.base / "broken" / role

    def _make_cluster(self) -> None:
        """By an account that has a name, which initdb wants."""
        account = OsAccount.of_servers()
        account.directory(self.postgres_data.parent, 0o755)
        password = self.base / "password"
        password.write_text(self.state.passwords.postgres_admin)
        password.chmod(0o444)
        run(
            [
                PROGRAMS / "initdb",
                "-D",
                self.postgres_data,
                "-U",
                "postgres",
                f"--pwfile={password}",
                "--auth=scram-sha-256",
                "--encoding=UTF8",
                "--locale=C.UTF-8",
                "--data-checksums",
            ],
            account=account,
            cwd=Path("/"),
        )
        password.unlink()
        run(["chown", "--recursive", f"{POSTGRES_USER}:{POSTGRES_USER}", self.postgres_data])

    def _run(self, role: str, argv: list[str], user: int, places: list[Path], **options: Any) -> None:
        """It dies at once where its marker is there."""
        script = f'[ ! -e {self._marker(role)} ] || {{ echo "{role}: broken on purpose"; exit 1; }}; exec "$@"'
        own = {str(path): {"bind": str(path)} for path in (*places, self._marker(role).parent)}
        self.engine.client.containers.run(
            IMAGE,
            ["/bin/sh", "-c", script, "sh", *argv],
            name=f"{self.base.name}-{role}",
            detach=True,
            network_mode="host",
            user=f"{user}:{user}",
            volumes={**self.shared, **own},
            environment={"LANG": "C.UTF-8"},
            **options,
        )


@contextlib.contextmanager
def new_host(kind: type[H], engine: Engine) -> Iterator[H]:
    """A host that has not been started; it is gone when the block is left."""
    base = Path(tempfile.mkdtemp(prefix="ops-host-", dir="/var/tmp"))
    base.chmod(0o755)  # servers with users of their own reach their data
    try:
        yield kind(engine, base)
    finally:
        for container in engine.client.containers.list(all=True):
            container.remove(force=True, v=True)
        shutil.rmtree(base, ignore_errors=True)


def _python() -> list[Path]:
    """Where this Python is installed; Debian's own is in the image."""
    return [] if sys.base_prefix == "/usr" else [Path(sys.base_prefix)]
