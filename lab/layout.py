"""Where a lab lives: one base directory per checkout, one directory per lab in it, laid out like a Debian host."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from runbook.errors import OpsError

CHECKOUT = Path(__file__).resolve().parents[1]
PYTHON = Path(sys.prefix) / "bin" / "python"
"""Not sys.executable, which is one of several links: configurations must not change with the one that was called."""
_NAME = re.compile(r"[a-z][a-z0-9-]{0,27}")
_SECOND = "-dr"
_RESERVED = frozenset({"bin", "control"})
STORES = ("postgresql", "redis", "files", "cluster", "wal")


def checked_name(name: str) -> str:
    """The environment's name, unchanged.

    Raises:
        OpsError: it cannot name an environment, a directory and a work pool.
    """
    if not _NAME.fullmatch(name.removesuffix(_SECOND)):
        raise OpsError(
            f"{name!r} cannot name a lab: a lower-case letter first, then at most 27 letters, digits or hyphens"
        )
    if name in _RESERVED:
        raise OpsError(f"{name!r} cannot name a lab: the base directory uses that name itself")
    return name


def base_directory() -> Path:
    """`.lab` in the checkout, or what `OPS_LAB_BASE` says; a directory under /var/tmp where root's servers need one.

    Started by root, the servers run as an unprivileged user, who must be able to traverse to their data.
    """
    wanted = Path(os.environ.get("OPS_LAB_BASE") or CHECKOUT / ".lab").absolute()
    if os.geteuid() != 0 or _open_to_all(wanted.parent):
        return wanted
    digest = hashlib.sha256(str(wanted.parent if wanted.name == ".lab" else wanted).encode()).hexdigest()
    return Path("/var/tmp") / f"ops-lab-{digest[:12]}"  # noqa: S108 (a name nobody else computes, owner checked)


def create_base() -> Path:
    """The base directory, created, with the link from the checkout where it lies elsewhere.

    Raises:
        OpsError: it cannot be created here, or belongs to somebody else.
    """
    base = base_directory()
    try:
        base.mkdir(parents=True, exist_ok=True)
        if base.stat().st_uid != os.geteuid():
            raise OpsError(f"{base} belongs to another user", "run the lab as that user, or set OPS_LAB_BASE")
        base.chmod(0o755)
        _link(Path(os.environ.get("OPS_LAB_BASE") or CHECKOUT / ".lab").absolute(), base)
    except OSError as error:
        raise OpsError(f"the lab's directory {base} cannot be created: {error.strerror}", "set OPS_LAB_BASE") from error
    return base


def _open_to_all(directory: Path) -> bool:
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    return all(path.stat().st_mode & 0o001 for path in (existing.resolve(), *existing.resolve().parents))


def _link(wanted: Path, base: Path) -> None:
    if wanted == base:
        return
    wanted.parent.mkdir(parents=True, exist_ok=True)
    if wanted.is_symlink():  # a copied checkout brings the link of the one it was copied from
        wanted.unlink()
    if wanted.exists():
        raise OpsError(
            f"{wanted} is a directory that the servers' user cannot reach",
            "remove it: the lab is rebuilt under /var/tmp",
        )
    wanted.symlink_to(base)


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
        return Layout(self.base, self.name.removesuffix(_SECOND))

    @property
    def second(self) -> Layout:
        """Of the lab's second region; a second region's own."""
        return Layout(self.base, self.first.name + _SECOND)

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

    def deployed(self, name: str) -> Path:
        """The environment's fingerprint."""
        return self.deployments / name
