"""The lab's services, as its supervisor runs them, and the files that make them what they are."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from lab.application import install
from lab.processes import OsAccount, write
from lab.servers import postgres, replication, shipping, valkey
from lab.servers.binaries import Binaries
from lab.servers.nodes import Node, nodes, primary_first
from lab.servers.rotation import rotation
from lab.servers.supervision import Program, Supervisor
from lab.state.base import PYTHON
from lab.state.layout import STORES, Layout
from lab.state.state import LabState

APPLICATION = ("ai-providers", "grc-backend", "grc-frontend")
REDIS = ("redis", "redis-replica", *valkey.SENTINELS)
POSTGRES = ("postgresql", "postgresql-standby", replication.RECEIVER_PROGRAM, shipping.ARCHIVER_PROGRAM)
NAMES = (*POSTGRES, *REDIS, *APPLICATION)


@dataclass(frozen=True)
class LabServices:
    """One lab's services: what it takes to configure and to reach them."""

    layout: Layout
    state: LabState
    binaries: Binaries
    account: OsAccount

    @property
    def supervisor(self) -> Supervisor:
        return supervisor_of(self.layout, self.state)

    @property
    def provisioned(self) -> Path:
        """There once database, user and data are."""
        return self.layout.root / "provisioned"

    @property
    def nodes(self) -> tuple[Node, Node]:
        """PostgreSQL's two servers: the primary (or which is it when it starts), then the other one."""
        return primary_first(nodes(self.layout, self.state))

    @property
    def dsn(self) -> str:
        """The application's database as its role, on the primary."""
        return postgres.dsn(self.state, self.nodes[0].port)

    @property
    def admin_dsn(self) -> str:
        """The primary's superuser."""
        return postgres.admin_dsn(self.state, self.nodes[0].port)

    @property
    def url(self) -> str:
        """The application, where its users reach it."""
        return f"http://127.0.0.1:{self.state.ports.backend}"

    def programs(self) -> list[Program]:
        """In starting order."""
        backend, frontend = self.layout.application / "backend", self.layout.application / "frontend"
        return [
            *replication.programs(self.layout, self.state, self.binaries, self.account),
            shipping.program(self.layout, self.state, self.binaries, self.account),
            *valkey.programs(self.layout, self.binaries, self.account),
            Program("ai-providers", (PYTHON, "-m", "ai_providers"), backend),
            Program("grc-backend", (PYTHON, "-m", "grc_backend"), backend),
            Program("grc-frontend", (PYTHON, "-m", "grc_frontend"), frontend),
        ]

    def settings(self) -> dict[str, str]:
        """The application's `.env`; pool sizes as in manual §1.5."""
        ports = self.state.ports
        return {
            "HOST": "127.0.0.1",
            "PORT": str(ports.backend),
            "DATABASE_URL": self.dsn,
            "REDIS_URL": valkey.url(self.state),
            "REDIS_SENTINELS": ",".join(f"127.0.0.1:{port}" for port in ports.sentinels),
            "REDIS_MASTER": valkey.MASTER,
            "AI_PROVIDERS_URL": f"http://127.0.0.1:{ports.ai_providers}",
            "AI_PROVIDERS_PORT": str(ports.ai_providers),
            "FRONTEND_PORT": str(ports.frontend),
            "BACKEND_URL": self.url,
            "LOG_DIRECTORY": str(self.layout.application_logs),
            "AI_RATE_LIMIT": "100000",  # demos, drills and smoke checks share one user
            "DATABASE_POOL_SIZE": "20",
            "DATABASE_MAX_OVERFLOW": "10",
            "DATABASE_POOL_TIMEOUT": "30",
            "DATABASE_POOL_RECYCLE": "3600",
            "DATABASE_ECHO": "false",
        }

    def create_directories(self) -> None:
        """As on the manual's host; the servers' parts belong to the servers' user."""
        us, layout = OsAccount.current(), self.layout
        for path in (
            layout.root,
            layout.drop_ins,
            layout.etc.parent,
            layout.application,
            layout.logs,
            layout.application_logs,
        ):
            us.directory(path, 0o755)
        for path in (*(layout.store(name) for name in STORES), layout.reports):
            us.directory(path, 0o755)
        # CONFIG REWRITE writes a new file beside valkey.conf and renames it.
        for path in (layout.etc, layout.postgresql_conf.parent, layout.standby_conf.parent):
            self.account.directory(path, 0o755)
        for path in (layout.postgres_data, layout.standby_data, layout.redis_data, layout.replica_data):
            self.account.directory(path.parent, 0o755)
        self.account.directory(layout.sentinel_data(1).parent, 0o755)
        self.account.directory(layout.wal, 0o700)
        for path in (layout.redis_data, layout.replica_data, *(layout.sentinel_data(number) for number in (1, 2, 3))):
            self.account.directory(path, 0o700)

    def configurations(self) -> dict[Path, str]:
        """The text of every configuration file of the servers."""
        return {
            **replication.configurations(self.layout, self.state, self.binaries),
            **valkey.configurations(self.layout, self.state),
        }

    def configure(self) -> bool:
        """Write the configuration files whose text is new; False when all were up to date.

        A file that somebody edited stays as it is until our text of it changes.
        """
        ledger = self.layout.root / "configured.json"
        known: dict[str, str] = json.loads(ledger.read_text()) if ledger.exists() else {}
        changed = False
        for path, text in self.configurations().items():
            digest = hashlib.sha256(text.encode()).hexdigest()
            if not path.exists() or known.get(str(path)) != digest:
                write(path, text, 0o600, self.account)
                known[str(path)], changed = digest, True
        write(ledger, json.dumps(known, indent=2) + "\n", 0o600)
        write(self.layout.rotation, rotation(self.layout), 0o644)
        left = [*self.layout.drop_ins.glob("*.conf")]  # of a drill that was killed
        for path in left:
            path.unlink()
        return self._configure_supervisor() or changed or bool(left)

    def _configure_supervisor(self) -> bool:
        path = self.supervisor.configuration
        before = path.read_text() if path.exists() else ""
        self.supervisor.write(self.programs(), include=f"{self.layout.drop_ins.name}/*.conf")
        return path.read_text() != before

    def install_application(self) -> bool:
        """Copy the application to its place, if it is new; False when it was up to date."""
        stamp = self.layout.root / "installed"
        fingerprint = fingerprint_of(Path(install.__file__).parent, self.settings())
        if (self.layout.application / "backend").exists() and stamp.exists() and stamp.read_text() == fingerprint:
            return False
        install.install(self.layout.application, self.settings())
        write(stamp, fingerprint, 0o600)
        return True


def supervisor_of(layout: Layout, state: LabState) -> Supervisor:
    """The lab's supervisord."""
    return Supervisor(layout.supervisor, state.ports.supervisor, state.passwords.supervisor, layout.logs)


def fingerprint_of(sources: Path, settings: dict[str, str]) -> str:
    """Of everything that an installation is made from."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in sorted(sources.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(str(path.relative_to(sources)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
