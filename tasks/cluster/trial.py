"""A private instance on which a plan judges a stopped server: with a copy of its catalogs, or with a new cluster where
its data directory is missing.

The copy has the shared catalogs, template1, the maintenance database, and the WAL since the last checkpoint in which
only their records have an effect. It is next to the live data directory, runs on a separate port without archiving,
streaming or preloaded libraries, and is deleted after the plan. Nothing live is written. It asks the host for as much
shared memory as the server does (`shared_buffers`, `huge_pages`), and uses little of it. That of a container's server
runs in a throw-away container of the same image: its locales, extensions and libraries are the image's.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from blocks.postgres.server import Postgres, execute
from runbook import shell
from runbook.errors import CommandFailed, OpsError
from runbook.files import durable, inside
from runbook.guard.process import is_abandoned, this_process
from runbook.kinds import action
from runbook.units import size
from runbook.wait import until
from tasks.cluster.catalog import databases_in
from tasks.cluster.catalog_wal import keep_databases
from tasks.cluster.container import ServerContainer, remove_trials, serving_in
from tasks.cluster.instance import ALONE, PrivateInstance, log_of, prepare_instance, put_away, serving, sweep_instance
from tasks.cluster.stopped import StoppedServer, config_file, start_error
from tasks.cluster.unpack import give
from tasks.host.disk import disk_of
from tasks.host.space import taken_by
from tasks.postgres.server.new_cluster import make_data
from tasks.stores.directory import told
from tasks.wal.format.header import HEADER, read_header
from tasks.wal.format.names import Segment

MARK = ".trial."
MOST_BYTES = 4 << 30
MOST_DATABASE_BYTES = 512 << 20
SPARE_BYTES = 128 << 20
WAL_SECONDS, START_SECONDS = 120.0, 120.0
TEMPLATE = "template1"
_TEMPLATE_OID = 1
_COPIED = ("global", "pg_xact", "pg_multixact", "pg_commit_ts", "pg_twophase", "pg_replslot", "pg_logical")
_EMPTY = (
    "base",
    "pg_subtrans",
    "pg_notify",
    "pg_serial",
    "pg_snapshots",
    "pg_stat",
    "pg_stat_tmp",
    "pg_dynshmem",
    "pg_tblspc",
)
_LEFT_OUT = ("postmaster.pid", "postmaster.opts", "current_logfiles", "backup_manifest", "tablespace_map")
_MOST_FILE_BYTES = 1 << 20  # of the data directory's own files: configuration, certificates
_OWN_HBA = "local all all {0}\nhost all all all {0}\n"
_TRUSTING = re.compile(r"^\s*host\w*\s+(?!.*\s(?:127\.0\.0\.1|::1)[/\s]).*\strust\s*$", re.MULTILINE)
_STARTS = "database system was"
_SETTINGS = {
    **ALONE,
    "fsync": "off",
    "full_page_writes": "off",
    "wal_recycle": "off",
    "wal_init_zero": "off",
    "recovery_prefetch": "off",
    "ignore_invalid_pages": "on",
    "max_wal_size": "4GB",
}


class StartRefused(OpsError):
    """The server itself would not start: the trial failed before it read data, for a reason that the server shares."""


def roots_of(postgres: Postgres) -> list[Path]:
    """The directories of all trials next to the live data directory, those of killed runs included."""
    live = Path(postgres.data_directory).resolve()
    return sorted(live.parent.glob(f"{live.name}{MARK}*"))


@contextlib.contextmanager
def trial(
    postgres: Postgres, stopped: StoppedServer | None, container: ServerContainer | None = None
) -> Iterator[Postgres]:
    """Run a trial, and yield how to connect to it. `stopped` None: a new cluster, as the run would make it.
    `container`: of the server.

    Raises:
        StartRefused: the server would not start, or the new cluster cannot be made.
        LoginRefused: it refuses the administrator's log-in.
        OpsError: the trial cannot be made.
    """
    for root in roots_of(postgres):
        if is_abandoned(root.name.rpartition(MARK)[2], root):
            if container:
                remove_trials(container, root)
            sweep_instance.work(root)
    live = Path(postgres.data_directory).resolve()
    instance = prepare_instance.work(postgres, live.with_name(f"{live.name}{MARK}{this_process().text}"))
    try:
        kept = copy_catalogs(postgres, instance, stopped) if stopped else make_cluster(instance)
        settings = _settings(postgres, instance, stopped, in_container=container is not None)
        with serving_in_place(instance, settings, container) as has_ended:
            reached = reached_at(postgres, instance, settings)
            if not kept:
                reached = reached.model_copy(update={"maintenance_database": TEMPLATE})
            _wait(instance, reached, has_ended)
            yield reached
    finally:
        put_away(instance)


def reached_at(postgres: Postgres, instance: PrivateInstance, settings: Mapping[str, str]) -> Postgres:
    """How to connect to an instance that runs with these settings, as to the server itself: by TCP or by its socket."""
    return instance.postgres.model_copy(update={"host": postgres.host} if settings["listen_addresses"] else {})


@contextlib.contextmanager
def serving_in_place(
    instance: PrivateInstance, settings: dict[str, str], container: ServerContainer | None
) -> Iterator[Callable[[], bool]]:
    """Run its server where the live one runs: here, or in a container. Yields whether it has ended."""
    if container:
        with serving_in(container, instance, settings) as server:
            yield server.has_ended
    else:
        with serving(instance, settings, signal.SIGQUIT) as child:
            yield lambda: child.poll() is not None


@action(idempotent=True)
def make_cluster(instance: PrivateInstance) -> bool:
    """Make a new cluster, as the run does. Returns True: it has the maintenance database.

    Raises:
        StartRefused: `initdb` ends with an error.
    """
    inside.change_mode(instance.root, 0o711)  # another user may make a container's cluster
    try:
        with told(instance.data):
            make_data(instance.postgres, instance.data, "--no-sync")
    except CommandFailed as error:
        raise StartRefused(error.message, "fix the cause on this host, then plan again") from None
    return True


@action(idempotent=True)
def copy_catalogs(postgres: Postgres, instance: PrivateInstance, stopped: StoppedServer) -> bool:
    """Copy what the trial needs. Returns whether it has the maintenance database.

    Raises:
        OpsError: it is too large, there is not enough free space, or a file cannot be read.
    """
    live, data = Path(postgres.data_directory).resolve(), instance.data
    assert stopped.first is not None
    with told(live):
        wal = segments_from(live / "pg_wal", stopped.first, stopped.system)
        there = [name for name in _COPIED if (live / name).is_dir()]
        files = [one.path for one in os.scandir(live) if _is_small_file(one)]
        maintenance = databases_in(live, postgres.maintenance_database)
        named = {_TEMPLATE_OID} | maintenance | databases_in(live, "postgres")
        kept = {oid for oid in named if 0 < taken_by(live / "base" / str(oid)).bytes <= MOST_DATABASE_BYTES}
        databases = [live / "base" / str(oid) for oid in sorted(kept)]
        _require_space(instance.root, [*(live / name for name in there), *databases], wal)
        _as_server(postgres, "mkdir", "--mode=700", data, *(data / name for name in _EMPTY))
        _as_server(postgres, "cp", "--recursive", "--dereference", *(live / name for name in there), data)
        _as_server(postgres, "cp", "--recursive", "--dereference", *databases, data / "base")
        _as_server(postgres, "cp", "--dereference", *files, data, accepted=(0, 1))  # root may own one
        _copy_wal(postgres, instance, live / "pg_wal", wal, stopped.redo, frozenset(kept))
    return postgres.maintenance_database == TEMPLATE or bool(kept & maintenance)


def _is_small_file(entry: os.DirEntry[str]) -> bool:
    named = entry.name in _LEFT_OUT or entry.name.endswith(".signal")
    return entry.is_file() and not named and entry.stat().st_size <= _MOST_FILE_BYTES


def _as_server(postgres: Postgres, *argv: str | Path, accepted: tuple[int, ...] = (0,)) -> None:
    """Run it as the server's user: root would follow that user's links to files that only root may read."""
    shell.run(argv, user=postgres.os_user, directory=Path("/"), accepted=accepted)


def segments_from(directory: Path, first: Segment, system: int) -> list[Segment]:
    """The consecutive segments. The files after them are recycled ones."""
    found, one = list[Segment](), first
    while (path := directory / one.name).exists():
        with inside.reading(path) as file, contextlib.suppress(OpsError):
            header = read_header(file.read(HEADER.size), one.name)
            if header.start == one.start and header.system == system:
                found.append(one)
        if not found or found[-1] != one:
            break
        one = Segment(one.number + 1, one.timeline, one.bytes)
    return found


def _require_space(root: Path, parts: list[Path], wal: list[Segment]) -> None:
    needed = sum(taken_by(part).bytes for part in parts) + sum(one.bytes for one in wal) + SPARE_BYTES
    if needed > MOST_BYTES:
        raise OpsError(
            f"its catalogs and the WAL since its last checkpoint need {size(needed)}, above {size(MOST_BYTES)}"
        )
    if (free := disk_of(root).free_bytes) < 2 * needed:
        raise OpsError(f"a copy of its catalogs needs {size(needed)}, but only {size(free)} are free at {root.parent}")


def _copy_wal(
    postgres: Postgres, instance: PrivateInstance, source: Path, wal: list[Segment], redo: int, kept: frozenset[int]
) -> None:
    """Copy WAL into a directory of this user, who may be root, then give it to the server's user."""
    directory = instance.root / "wal"
    for path in (directory, directory / "archive_status", directory / "summaries"):
        inside.make_directory(path)
    for history in source.glob("*.history"):
        inside.copy(history, directory / history.name)
    for segment in wal:
        inside.copy(source / segment.name, directory / segment.name)
    keep_databases([(one, directory / one.name) for one in wal], redo, kept, seconds=WAL_SECONDS)
    give(directory, postgres.os_user)
    _as_server(postgres, "ln", "--symbolic", directory, instance.data / "pg_wal")


def _settings(
    postgres: Postgres, instance: PrivateInstance, stopped: StoppedServer | None, *, in_container: bool
) -> dict[str, str]:
    """The settings of the server's start, overridden by those that isolate the trial."""
    given = dict(stopped.settings) if stopped else {}
    live = Path(postgres.data_directory).resolve() if stopped else instance.data
    files = {"config_file": str(config_file(postgres, live))}
    if in_container:
        durable.write(instance.root / "config_file", "", mode=0o600)
        files = {"config_file": str(instance.root / "config_file")}
        given |= log_in_files(instance, live)
    give(instance.root, postgres.os_user)
    return {**files, **given, **_SETTINGS, **place_of(postgres, instance, in_container=in_container)}


def log_in_files(instance: PrivateInstance, data: Path) -> dict[str, str]:
    """The settings of a pg_hba.conf and a pg_ident.conf for a container's server, by the server's own in `data`."""
    files = {name: instance.root / name for name in ("hba_file", "ident_file")}
    durable.write(files["hba_file"], _hba_of(data), mode=0o600)
    durable.write(files["ident_file"], "", mode=0o600)
    return {name: str(path) for name, path in files.items()}


def place_of(postgres: Postgres, instance: PrivateInstance, *, in_container: bool) -> dict[str, str]:
    """The settings that give an instance its own data directory and port, on the interface of the server."""
    over_socket = in_container or postgres.host.startswith(("/", "@"))
    return {
        "data_directory": str(instance.data),
        "listen_addresses": "" if over_socket else postgres.host,
        "port": str(instance.postgres.port),
        "unix_socket_directories": instance.postgres.host,
    }


def _hba_of(data: Path) -> str:
    """For a container's server, which sees other client addresses than its copy here: verify passwords (md5 accepts
    SCRAM too), unless its own file trusts more than loopback."""
    try:
        trusts = bool(_TRUSTING.search(inside.read_text(data / "pg_hba.conf")))
    except (OSError, UnicodeDecodeError):
        trusts = False
    return _OWN_HBA.format("trust" if trusts else "md5")


def _wait(instance: PrivateInstance, reached: Postgres, has_ended: Callable[[], bool]) -> None:
    def answers() -> bool:
        if has_ended():
            log = log_of(instance)
            why = start_error(log)
            if _STARTS in log and "checkpoint record" not in why:  # it had read data: the copy may be the cause
                raise OpsError(f"the copy of its catalogs did not start: {why}")
            raise StartRefused(why, "fix the cause on the server's host, then plan again")
        with reached.connect(seconds=2) as connection:
            execute(connection, "SELECT 1")
        return True

    until(answers, what="the start of the copy of its catalogs", seconds=START_SECONDS, every_seconds=0.05)
