"""The swap of a cluster: the copy takes the live directory's name by two renames, with both servers stopped. The
replaced data directory is kept."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import psutil

from blocks.postgres.server import Postgres
from runbook import shell
from runbook.errors import CommandFailed, OpsError
from runbook.failpoint import failpoint
from runbook.files import inside
from runbook.files.durable import sync
from runbook.guard.permit import Act
from runbook.kinds import action
from runbook.wait import until
from tasks.cluster.configuration import (
    live_configuration,
    main_file,
    note_of,
    place_configuration,
    save_configuration,
)
from tasks.cluster.instance import PrivateInstance
from tasks.cluster.tablespaces import move_out
from tasks.cluster.unpack import give
from tasks.stores.directory import told

REPLACE_CLUSTER = "replace cluster"
SUPERSEDED = ".superseded_"


@dataclass(frozen=True)
class ClusterSwapped:
    """The live data directory, and the path of the replaced one (None: there was none). `tablespaces`: the directories
    of those that the recovery created, by OID."""

    live: Path
    kept: Path | None
    tablespaces: Mapping[str, Path] = field(default_factory=dict)


def replacement(postgres: Postgres) -> Act:
    """Return the act that replaces a live cluster."""
    return Act(REPLACE_CLUSTER, postgres.data_directory)


@action(idempotent=True)
def sync_cluster(instance: PrivateInstance) -> Path:
    """Bring every file of the stopped copy to disk: it recovered without fsync.

    https://www.postgresql.org/docs/current/app-initdb.html (--sync-only)

    Raises:
        CommandFailed: the disk fails.
    """
    postgres = instance.postgres
    argv = [postgres.program("initdb"), "--sync-only", f"--pgdata={instance.data}"]
    shell.run(argv, user=postgres.os_user, environment={"LC_ALL": "C"}, directory=Path("/"))
    return instance.data


@action(idempotent=True)
def flush_cluster(instance: PrivateInstance) -> None:
    """Bring the files of the running copy to disk ahead of `sync_cluster`, which then has less to do. A file that the
    server deletes meanwhile is no error."""
    with contextlib.suppress(CommandFailed):
        sync_cluster.work(instance)


@action(of=replacement)
def swap_cluster(postgres: Postgres, instance: PrivateInstance) -> ClusterSwapped:
    """Rename the live data directory to `<dir>.superseded_<stamp>`, and the copy to the live name. Before that, every
    file of the copy is on disk; after `sync_cluster`, that takes a moment.

    Both servers must be stopped. The configuration of the live data directory stays. After a kill between the renames
    no directory is live: the next run builds and swaps again, and the old directory keeps its new name.

    Raises:
        OpsError: a server runs in one of them, a rename or the disk fails.
    """
    live = Path(postgres.data_directory).resolve()  # a symbolic link stays: it points to the chosen disk
    for data in (live, instance.data):
        _require_stopped(data)
    kept = None
    with told(live):
        configuration = live_configuration(postgres)
        if configuration:
            place_configuration(configuration, instance.data, live, main_file(postgres))
        moved = move_out(instance.data, live)
        failpoint("cluster: tablespaces moved")
        sync_cluster.work(instance)
        failpoint("cluster: before first rename")
        if live.exists():
            kept = free_name(live)
            if configuration:
                save_configuration(note_of(live), configuration, kept)
            live.rename(kept)
        failpoint("cluster: between renames")
        instance.data.rename(live)
        note_of(live).unlink(missing_ok=True)
        sync(live.parent)
        failpoint("cluster: after second rename")
    return ClusterSwapped(live, kept, moved)


@action(of=replacement)
def set_wal_aside(postgres: Postgres, directory: Path) -> Path | None:
    """Rename the receiver's directory, and make an empty one: its WAL of the old timeline goes beyond the start of the
    new one, and the receiver could not continue from there. The receiver must be stopped.

    Returns the new path; None where the directory was empty.
    """
    with told(directory):
        if not directory.is_dir() or not any(directory.iterdir()):
            return None
        found = directory.stat()
        kept = free_name(directory)
        directory.rename(kept)
        failpoint("cluster: receiver's directory aside")
        inside.make_directory(directory, found.st_mode & 0o777, (found.st_uid, found.st_gid))
        sync(directory.parent)
    return kept


def ensure_wal_directory(postgres: Postgres, directory: Path) -> None:
    """Make it if a run was killed between the rename and the new directory."""
    if not directory.exists():
        with told(directory):
            inside.make_directory(directory)
        give(directory, postgres.os_user)


def superseded_clusters(postgres: Postgres) -> list[Path]:
    """The data directories that earlier swaps kept, oldest first."""
    live = Path(postgres.data_directory).resolve()
    found = live.parent.iterdir() if live.parent.is_dir() else iter(())
    return sorted(path for path in found if path.name.startswith(live.name + SUPERSEDED))


def free_name(path: Path) -> Path:
    """`<path>.superseded_<stamp>`, which does not exist yet."""

    def free() -> Path | None:
        aside = path.with_name(f"{path.name}{SUPERSEDED}{datetime.now(UTC):%Y%m%d_%H%M%S}")
        return None if aside.exists() else aside

    found = until(free, what="a free name for the replaced directory", seconds=5)
    assert found is not None
    return found


def _require_stopped(data: Path) -> None:
    pid_file = data / "postmaster.pid"
    with contextlib.suppress(FileNotFoundError, ValueError, IndexError, psutil.Error):
        pid = int(inside.read_text(pid_file).splitlines()[0])
        if Path(psutil.Process(pid).cwd()) == data:
            raise OpsError(
                f"a server still runs in {data} (process {pid})",
                "stop its service so that its supervisor does not restart it, then run this again",
            )
