"""The copy of a cluster in the place of the live one: two renames, with every server of both stopped. The old data
directory is kept beside."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from blocks.postgres.server import Postgres
from runbook.errors import OpsError
from runbook.failpoint import failpoint
from runbook.files.durable import sync
from runbook.guard.permit import Permit
from runbook.kinds import action
from runbook.wait import until
from tasks.cluster.instance import Instance
from tasks.cluster.unpack import give
from tasks.stores.directory import told

REPLACE_CLUSTER = "replace cluster"
SUPERSEDED = ".superseded_"
# Of a server whose configuration is in its data directory: what operators changed since the backup stays.
CONFIGURATION = ("postgresql.conf", "pg_hba.conf", "pg_ident.conf")


@dataclass(frozen=True)
class ClusterSwapped:
    """The live data directory, and where the old one is kept (None: there was none)."""

    live: Path
    kept: Path | None


@action
def swap_cluster(permit: Permit, postgres: Postgres, instance: Instance) -> ClusterSwapped:
    """Rename the live data directory aside (`<dir>.superseded_<stamp>`) and the copy's into its place.

    Both servers must be stopped. Killed between the renames, no directory is live: launched again, the restore builds
    and swaps again, and the old one is where it was renamed to.

    Raises:
        NotConfirmed: not permitted.
        OpsError: a server works in one of them, or a rename is refused.
    """
    permit.require(REPLACE_CLUSTER, postgres.data_directory)
    live = Path(postgres.data_directory).resolve()  # a link stays: it leads to the disk that was chosen
    for data in (live, instance.data):
        _require_stopped(data)
    kept = None
    with told(live):
        failpoint("cluster: before first rename")
        if live.exists():
            _keep_configuration(postgres, live, instance.data)
            kept = free_name(live)
            live.rename(kept)
        failpoint("cluster: between renames")
        instance.data.rename(live)
        sync(live.parent)
        failpoint("cluster: after second rename")
    return ClusterSwapped(live, kept)


@action
def set_wal_aside(permit: Permit, postgres: Postgres, directory: Path) -> Path | None:
    """The receiver's directory renamed aside, and an empty one in its place: what it holds of the old timeline lies
    behind the point at which the new one begins, and no server could go on from there. The receiver must be stopped.

    Returns where it is; None where it was empty.
    """
    permit.require(REPLACE_CLUSTER, postgres.data_directory)
    with told(directory):
        if not directory.is_dir() or not any(directory.iterdir()):
            return None
        found = directory.stat()
        kept = free_name(directory)
        directory.rename(kept)
        failpoint("cluster: receiver's directory aside")
        directory.mkdir(mode=0o700)
        directory.chmod(found.st_mode & 0o777)
        if os.geteuid() == 0:
            os.chown(directory, found.st_uid, found.st_gid)
        sync(directory.parent)
    return kept


def ensure_wal_directory(postgres: Postgres, directory: Path) -> None:
    """There again where a run was killed between the rename and the new one."""
    if not directory.exists():
        with told(directory):
            directory.mkdir(mode=0o700)
        give(directory, postgres.os_user)


def superseded_clusters(postgres: Postgres) -> list[Path]:
    """What earlier swaps kept beside the live data directory, oldest first."""
    live = Path(postgres.data_directory).resolve()
    beside = live.parent.iterdir() if live.parent.is_dir() else iter(())
    return sorted(path for path in beside if path.name.startswith(live.name + SUPERSEDED))


def free_name(path: Path) -> Path:
    """`<path>.superseded_<stamp>`, which nothing has."""

    def free() -> Path | None:
        aside = path.with_name(f"{path.name}{SUPERSEDED}{datetime.now(UTC):%Y%m%d_%H%M%S}")
        return None if aside.exists() else aside

    found = until(free, what="a free name for what is kept", seconds=5)
    assert found is not None
    return found


def _keep_configuration(postgres: Postgres, live: Path, new: Path) -> None:
    for name in () if postgres.config_file else CONFIGURATION:
        if (live / name).is_file():
            shutil.copy2(live / name, new / name)
            give(new / name, postgres.os_user)


def _require_stopped(data: Path) -> None:
    pid_file = data / "postmaster.pid"
    with contextlib.suppress(FileNotFoundError, ValueError, IndexError, psutil.Error):
        pid = int(pid_file.read_text().splitlines()[0])
        if Path(psutil.Process(pid).cwd()) == data:
            raise OpsError(
                f"a server still works in {data} (process {pid})",
                "stop its service, see that its supervisor does not start it again, and launch this again",
            )
