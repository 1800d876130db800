"""Where a lab lives: one directory per lab in the base directory, laid out like a Debian host."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lab.state.base import SECOND

STORES = ("postgresql", "redis", "files", "cluster", "wal")


@dataclass(frozen=True)
class Layout:
    """The paths of one lab."""

    base: Path
    name: str

    @property
    def root(self) -> Path:
        """Everything of this lab."""
        return self.base / self.name

    @property
    def first(self) -> Layout:
        """Of the lab whose second region this is; a lab's own."""
        return Layout(self.base, self.name.removesuffix(SECOND))

    @property
    def second(self) -> Layout:
        """Of the lab's second region; a second region's own."""
        return Layout(self.base, self.first.name + SECOND)

    @property
    def endpoint(self) -> Path:
        """Where users are sent; of neither region: it outlives them."""
        return self.base / f"{self.first.name}.endpoint"

    @property
    def state(self) -> Path:
        """Ports and passwords; mode 0600."""
        return self.root / "state.json"

    @property
    def supervisor(self) -> Path:
        """Configuration of the lab's own supervisord; mode 0600: it holds passwords."""
        return self.root / "supervisord.conf"

    @property
    def drop_ins(self) -> Path:
        """What a drill changes in a program's start: read by the lab's supervisord, removed when the lab comes up."""
        return self.root / "supervisord.d"

    @property
    def etc(self) -> Path:
        """Configuration, outside the data directories: a recovery may put a new one in place."""
        return self.root / "etc"

    @property
    def rotation(self) -> Path:
        """logrotate's configuration for the application's logs."""
        return self.root / "etc" / "logrotate.conf"

    @property
    def postgresql_conf(self) -> Path:
        return self.etc / "postgresql" / "postgresql.conf"

    @property
    def standby_conf(self) -> Path:
        return self.etc / "postgresql-standby" / "postgresql.conf"

    @property
    def pg_hba_conf(self) -> Path:
        """Of both nodes."""
        return self.etc / "postgresql" / "pg_hba.conf"

    @property
    def pgpass(self) -> Path:
        """With which nodes and receiver log in to each other; mode 0600."""
        return self.etc / "postgresql" / "pgpass"

    @property
    def host_settings(self) -> Path:
        """Settings of this host for the application, over those of its `.env`: only a second region has them."""
        return self.etc / "grc.env"

    @property
    def valkey_conf(self) -> Path:
        return self.etc / "valkey.conf"

    @property
    def replica_conf(self) -> Path:
        return self.etc / "valkey-replica.conf"

    def sentinel_conf(self, number: int) -> Path:
        """Of one of the Sentinels, which write into it what they learn."""
        return self.etc / f"sentinel-{number}.conf"

    @property
    def postgres_data(self) -> Path:
        return self.root / "postgresql" / "data"

    @property
    def standby_data(self) -> Path:
        return self.root / "postgresql-standby" / "data"

    @property
    def wal(self) -> Path:
        """What the receiver of WAL has received."""
        return self.root / "wal"

    @property
    def redis_data(self) -> Path:
        return self.root / "redis" / "data"

    @property
    def replica_data(self) -> Path:
        return self.root / "redis-replica" / "data"

    def sentinel_data(self, number: int) -> Path:
        """A Sentinel's working directory; it is empty."""
        return self.root / "sentinel" / str(number)

    @property
    def redis_pids(self) -> dict[Path, Path]:
        """The pid file of each of Redis's servers → the directory that it works in."""
        directories = (self.redis_data, self.replica_data, *(self.sentinel_data(number) for number in (1, 2, 3)))
        return {self.redis_pid(directory): directory for directory in directories}

    def redis_pid(self, directory: Path) -> Path:
        """Beside the directory of a server."""
        return directory.with_suffix(".pid")

    @property
    def application(self) -> Path:
        """`/opt/grc` of the manual."""
        return self.root / "opt" / "grc"

    @property
    def repository(self) -> Path:
        """The application's git checkout, beside what runs."""
        return self.root / "srv" / "grc"

    @property
    def remote(self) -> Path:
        """What that one pushes to: it stands for a git server."""
        return self.root / "srv" / "grc.git"

    @property
    def release(self) -> Path:
        """Which commit of the checkout runs; `deploy-application` reads and writes it."""
        return self.application / "RELEASE"

    @property
    def application_logs(self) -> Path:
        """`/var/log/grc` of the manual."""
        return self.root / "var" / "log" / "grc"

    @property
    def logs(self) -> Path:
        """The servers' own logs, one file per program."""
        return self.root / "var" / "log"

    @property
    def reports(self) -> Path:
        return self.root / "reports"

    def store(self, resource: str) -> Path:
        """`/var/backups/<resource>`, one of `STORES`."""
        return self.root / "var" / "backups" / resource


@dataclass(frozen=True)
class ControlLayout:
    """The paths of the Prefect server and its workers: one per base directory."""

    base: Path

    @property
    def root(self) -> Path:
        return self.base / "control"

    @property
    def state(self) -> Path:
        return self.root / "state.json"

    @property
    def supervisor(self) -> Path:
        return self.root / "supervisord.conf"

    @property
    def home(self) -> Path:
        """`PREFECT_HOME`: database, leases, results."""
        return self.root / "prefect"

    @property
    def logs(self) -> Path:
        return self.root / "log"

    @property
    def workers(self) -> Path:
        """The workers' parts of the supervisor's configuration."""
        return self.root / "workers"

    def worker(self, name: str) -> Path:
        """One worker's part; mode 0600: it holds the lab's passwords."""
        return self.workers / f"{name}.conf"

    @property
    def deployments(self) -> Path:
        """Per environment a fingerprint of what was last registered and deployed to it."""
        return self.root / "deployed"

    def done(self, what: str, name: str) -> Path:
        """The environment's fingerprint."""
        return self.deployments / f"{what}-{name}"
