"""A private server for the verification of a dump: a new cluster on this host, without durability, archive or standby.

A verification on the live server writes the size of the database into its WAL, to its standbys and to every archive.
Here nothing of it leaves the host, and nothing waits for the disk: a crash only ends the verification.
https://www.postgresql.org/docs/current/non-durability.html
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from blocks.postgres.server import Postgres, execute
from runbook.errors import OpsError
from runbook.files import durable
from runbook.guard.process import is_abandoned, this_process
from runbook.kinds import Pending
from runbook.units import size
from runbook.wait import until
from tasks.backups.catalogue import Backup
from tasks.cluster.instance import (
    ISOLATED,
    PrivateInstance,
    log_of,
    prepare_instance,
    put_away,
    serving,
    sweep_instance,
)
from tasks.cluster.stopped import start_error
from tasks.cluster.trial import make_cluster
from tasks.cluster.unpack import give
from tasks.host.disk import disk_of, is_here
from tasks.postgres.content.content import DatabaseContent
from tasks.postgres.restore.staged_copy import unpacking_of
from tasks.postgres.server.requirements import read_requirements
from tasks.postgres.server.roles import has_tablespaces, try_roles
from tasks.postgres.server.server import read_server

MARK = ".verifying_dump."
PROGRAMS = ("initdb", "postgres")
SPACE_RATIO = 1.1
"""Of the database's size: its tables and indexes, and the WAL since the last checkpoint; and the unpacked dump."""
START_SECONDS = 60.0
_HBA = "local all all trust\n"  # its socket is in a directory that only its user may enter
_SETTINGS = {
    **ISOLATED,
    "listen_addresses": "",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "wal_init_zero": "off",
    "wal_recycle": "off",
    "max_wal_size": "1GB",
    "checkpoint_timeout": "1h",
    "autovacuum": "off",
    "huge_pages": "off",
    "shared_buffers": "256MB",
    "logging_collector": "off",
    "log_destination": "stderr",
    "lc_messages": "C",
    "external_pid_file": "",
}
_AS_LIVE = ("max_connections", "max_locks_per_transaction", "max_prepared_transactions")
_WORK_WITHOUT_PRELOAD = {"pg_stat_statements"}


@dataclass(frozen=True)
class NewCluster:
    """A cluster that `initdb` makes in the background, and its server's settings."""

    instance: PrivateInstance
    settings: dict[str, str]
    made: Pending[bool]
    cleaner: ThreadPoolExecutor


@contextlib.contextmanager
def new_cluster(live: Postgres, backup: Backup, content: DatabaseContent) -> Iterator[NewCluster]:
    """Begin to make a cluster on which the backup can be restored; its files are deleted after the block. What a killed
    run left is deleted first.

    Raises:
        OpsError: this host cannot run a server.
    """
    unpacked = sum(unpacking_of(live, backup).values())
    root = _root(live, backup.store.spool, int(content.bytes * SPACE_RATIO) + unpacked)
    settings = _settings_like(live, content)
    instance = prepare_instance.work(live, root)
    made = make_cluster.submit(instance)
    with ThreadPoolExecutor(1) as cleaner:
        try:
            yield NewCluster(instance, settings, made, cleaner)
        finally:
            with contextlib.suppress(OpsError):
                made.result()  # initdb would write into a deleted directory
            cleaner.submit(put_away, instance).result()


@contextlib.contextmanager
def verification_server(
    cluster: NewCluster, live: Postgres, backup: Backup, content: DatabaseContent, jobs: int
) -> Iterator[Postgres]:
    """Run the private server of a new cluster, with the backup's roles, and yield how to connect to it. After the block
    its files are deleted in the background.

    Raises:
        OpsError: it cannot be made or started, or differs from the live server in something that the backup needs.
    """
    cluster.made.result()
    with _running(cluster.instance, cluster.settings) as private:
        _require_fit(live, private, backup, content, jobs)
        yield private
    cluster.cleaner.submit(put_away, cluster.instance)


def _root(live: Postgres, spool: Path, needed_bytes: int) -> Path:
    """A directory for the server: next to the live data, where that is on this host, otherwise in the spool."""
    for program in PROGRAMS:
        live.program(program)
    data = Path(live.data_directory).resolve()
    parents = [data.parent] if is_here(live.host) and data.parent.is_dir() else []
    places = [one for one in (*parents, spool) if os.access(one, os.W_OK | os.X_OK)]
    if not places:
        raise OpsError(f"{' and '.join(map(str, (*parents, spool)))} cannot be written by this worker")
    for place in places:
        for left in place.glob(f"*{MARK}*"):
            if is_abandoned(left.name.rpartition(MARK)[2], left):
                sweep_instance.work(left)
    free = {place: disk_of(place).free_bytes for place in places}
    chosen = next((place for place in places if free[place] > needed_bytes), None)
    if chosen is None:
        raise OpsError(f"it needs {size(needed_bytes)}, but only {size(max(free.values()))} are free at {places[0]}")
    return chosen / f"{data.name}{MARK}{this_process().text}"


def _settings_like(live: Postgres, content: DatabaseContent) -> dict[str, str]:
    with live.connect() as connection:
        settings = {name: str(execute(connection, _SETTING, name)[0][0]) for name in _AS_LIVE}
        preloaded = str(execute(connection, _SETTING, "shared_preload_libraries")[0][0])
    libraries = {Path(name.strip().strip('"')).name for name in preloaded.split(",")}
    if needed := sorted(libraries & set(content.extensions) - _WORK_WITHOUT_PRELOAD):
        raise OpsError(f"{', '.join(needed)} must be preloaded, and may act outside the database")
    return {**_SETTINGS, **settings}


_SETTING = "SELECT current_setting(%s)"


@contextlib.contextmanager
def _running(instance: PrivateInstance, settings: dict[str, str]) -> Iterator[Postgres]:
    files = {"config_file": "", "hba_file": _HBA, "ident_file": ""}
    for name, text in files.items():
        durable.write(instance.root / name, text, mode=0o600)
    give(instance.root, instance.postgres.os_user)
    own = {
        **settings,
        **{name: str(instance.root / name) for name in files},
        "port": str(instance.postgres.port),
        "unix_socket_directories": instance.postgres.host,
    }
    private = instance.postgres.model_copy(
        update={"sslmode": "", "require_auth": "", "maintenance_database": "postgres"}
    )
    with serving(instance, own, signal.SIGQUIT) as child:

        def answers() -> bool:
            if child.poll() is not None:
                raise OpsError(f"it did not start: {start_error(log_of(instance))}")
            private.connect(seconds=2).close()
            return True

        until(answers, what="the start of the private server", seconds=START_SECONDS, every_seconds=0.05)
        yield private


def _require_fit(live: Postgres, private: Postgres, backup: Backup, content: DatabaseContent, jobs: int) -> None:
    """Create the backup's roles, and require of this server what a restore requires of the live one."""
    if has_tablespaces(backup):
        raise OpsError("the backup has tablespaces")
    there, here = read_server(live), read_server(private)
    if there.major != here.major:
        raise OpsError(f"the programs in {live.programs} are of PostgreSQL {here.text}, the server is {there.text}")
    versions = [_versions(one, content) for one in (live, private)]
    if differing := sorted(name for name in versions[0] if versions[0][name] != versions[1].get(name)):
        raise OpsError(f"this host has other versions of {', '.join(differing)} than the live server")
    found = [
        *try_roles(private, backup, here.roles, keep=True),
        *read_requirements(private, content, here, jobs),
    ]
    if problems := [f"{one.name}: {one.value}" for one in found if not one.ok]:
        raise OpsError("; ".join(problems))


def _versions(postgres: Postgres, content: DatabaseContent) -> dict[str, str]:
    with postgres.connect() as connection:
        rows = execute(connection, _VERSIONS, list(content.extensions))
    return {str(name): str(version) for name, version in rows}


_VERSIONS = "SELECT name, default_version FROM pg_available_extensions WHERE name = ANY(%s)"
