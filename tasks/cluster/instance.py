"""A private instance: an isolated copy of a cluster in its own directory, on its own port.

It listens on loopback and on a socket in a directory that only the server's user may enter. It archives nothing,
streams from no server, waits for no standby, and starts no subscription worker. All of that is set on its command line,
which overrides the copy's configuration files.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from blocks.exclusion import Directory
from blocks.postgres.server import Postgres
from runbook import shell
from runbook.current import current_report, leaves, removed
from runbook.errors import Unreachable
from runbook.files import durable, inside
from runbook.kinds import action
from runbook.wait import until
from tasks.cluster.tablespaces import IN_PLACE, delete_moved, tablespaces_inside
from tasks.cluster.target import Stop
from tasks.cluster.unpack import give
from tasks.stores.directory import told
from tasks.wal.format.names import lsn_text

RESTORING, VERIFYING = ".restoring", ".verifying"
_HBA = "local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\n"
# A standby needs at least the values of the server whose WAL it replays.
_AT_LEAST = {
    "max_connections": "max_connections setting",
    "max_worker_processes": "max_worker_processes setting",
    "max_wal_senders": "max_wal_senders setting",
    "max_prepared_transactions": "max_prepared_xacts setting",
    "max_locks_per_transaction": "max_locks_per_xact setting",
}
ISOLATED = {
    "archive_mode": "off",
    "archive_cleanup_command": "",
    "recovery_end_command": "",
    "restore_command": "false",  # its pg_wal has all WAL that it needs
    "primary_conninfo": "",
    "primary_slot_name": "",
    "synchronous_standby_names": "",
    "max_logical_replication_workers": "0",
    "shared_preload_libraries": "",
    "listen_addresses": "127.0.0.1",
}
ALONE = {
    **ISOLATED,
    "archive_command": "",
    "archive_library": "",
    "external_pid_file": "",
    "logging_collector": "off",
    "log_destination": "stderr",
    "log_line_prefix": "%m [%p] ",
    "lc_messages": "C",
    "autovacuum": "off",
}
"""For a server that has the live one's configuration: nothing leaves it, and its log is one file."""

UNSYNCED = {
    "fsync": "off",
    # No restartpoint interrupts the replay: all WAL stays in its pg_wal until it ends.
    "checkpoint_timeout": "1d",
    "max_wal_size": "1TB",
}
"""A copy that is built again if its host dies syncs nothing while it recovers. `sync_cluster` does before a swap."""


@dataclass(frozen=True)
class PrivateInstance:
    """`root`: its directory, with `data` in it; `postgres`: how to connect to it, and its user."""

    root: Path
    postgres: Postgres

    @property
    def data(self) -> Path:
        """The data directory."""
        return self.root / "data"

    @property
    def wal(self) -> Path:
        """Where its WAL is."""
        return self.data / "pg_wal"

    @property
    def log(self) -> Path:
        """Its log."""
        return self.root / "postgresql.log"


def root_for(postgres: Postgres, suffix: str = RESTORING) -> Path:
    """Next to the live data directory, on the same file system: the swap is a rename."""
    live = Path(postgres.data_directory).resolve()
    return live.with_name(live.name + suffix)


_claimed = dict[Path, Directory]()


def _claim(root: Path) -> None:
    """Lock an instance's directory for this process, unless it has: its name is the same for each run on that server.

    Raises:
        Locked: another run uses it.
    """
    if root not in _claimed:
        report = current_report()
        run = f"interview-ops {report.environment}: {report.runbook}" if report else "interview-ops"
        claimed = Directory(str(root), run, by_place=False)
        claimed.take()
        _claimed[root] = claimed


def _release(root: Path) -> None:
    if claimed := _claimed.pop(root, None):
        claimed.close()


@action(idempotent=True)
def sweep_instance(root: Path) -> bool:
    """End the server of a killed run's instance, and delete its files. Returns whether there was one.

    Raises:
        Locked: another run uses it, of another environment perhaps.
        OpsError: it does not end, or cannot be removed.
    """
    if not root.exists():
        return False
    _claim(root)
    for process in servers_in(root / "data"):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended with the postmaster, which got the signal before it
            process.send_signal(signal.SIGQUIT)
    until(lambda: not servers_in(root / "data"), what=f"the end of the server in {root}", seconds=30)
    with told(root):
        delete_moved(root / "data")
        shutil.rmtree(root)
    _release(root)
    return True


def servers_in(data: Path) -> list[psutil.Process]:
    """The server processes whose working directory is that data directory."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if Path(process.cwd()) == data and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@action(idempotent=True)
def prepare_instance(postgres: Postgres, root: Path) -> PrivateInstance:
    """Make an empty directory for an instance, and choose a free port.

    Raises:
        OpsError: the directory cannot be made.
    """
    leaves(f"directory {root}", "the next run of this kind deletes it")
    with told(root):
        inside.make_directory(root)
    _claim(root)
    sockets = Path(tempfile.mkdtemp(prefix="ops-pg-"))  # a socket's path must be short
    give(root, postgres.os_user)
    give(sockets, postgres.os_user)
    there = {"host": str(sockets), "port": free_port(postgres.port), "data_directory": str(root / "data")}
    block = postgres.model_copy(update=there)
    return PrivateInstance(root, block)


def free_port(but: int) -> int:
    """A free port of loopback, other than the live server's, which may be down."""
    while True:
        with socket.socket() as line:
            line.bind(("127.0.0.1", 0))
            if (port := int(line.getsockname()[1])) != but:
                return port


def settings_of(instance: PrivateInstance, stop: Stop | None, timeline: int) -> dict[str, str]:
    """The settings of its command line. `stop` None: it starts as a primary."""
    control = _control(instance)
    least = {name: control[key] for name, key in _AT_LEAST.items() if key in control}
    settings = {
        **ISOLATED,
        **least,
        "port": str(instance.postgres.port),
        "unix_socket_directories": instance.postgres.host,
        "config_file": str(instance.root / "postgresql.conf"),
        "hba_file": str(instance.root / "pg_hba.conf"),
        "ident_file": "/dev/null",
        "external_pid_file": "",
        "logging_collector": "off",
        "log_destination": "stderr",
        "lc_messages": "C",
        "hot_standby": "on",
        "max_wal_size": "4GB",
    }
    if stop is None:
        return settings
    where = (
        {"recovery_target_lsn": lsn_text(stop.lsn), "recovery_target_inclusive": "on" if stop.inclusive else "off"}
        if stop.lsn
        else {"recovery_target": "immediate"}
    )
    return {
        **settings,
        **IN_PLACE,
        **where,
        "recovery_target_action": "pause",
        "recovery_target_timeline": str(timeline),
    }


def _control(instance: PrivateInstance) -> dict[str, str]:
    printed = shell.run(
        [instance.postgres.program("pg_controldata"), str(instance.data)],
        user=instance.postgres.os_user,
        environment={"LC_ALL": "C"},
        directory=Path("/"),
    ).stdout
    pairs = (line.partition(":") for line in printed.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


@contextlib.contextmanager
def running(
    instance: PrivateInstance,
    stop: Stop | None,
    timeline: int = 1,
    *,
    as_standby: bool = False,
    unsynced: bool = False,
) -> Iterator[PrivateInstance]:
    """Run the instance, which recovers up to `stop`, until the block ends. It is a child process: it ends with its run.

    Args:
        as_standby: as a standby without a primary
        unsynced: without fsync; only for a copy, never for the only files with its data
    """
    # The directory belongs to the server's user: a run as root opens nothing there that it did not make.
    durable.write(instance.root / "postgresql.conf", "", mode=0o600)
    durable.write(instance.root / "pg_hba.conf", _HBA, mode=0o600)
    signals = [instance.data / name for name in ("standby.signal", "recovery.signal")]
    for path in signals:
        path.unlink(missing_ok=True)
    if recovers := as_standby or stop is not None:
        durable.write(signals[0 if as_standby else 1], "", mode=0o600)
    give(instance.root, instance.postgres.os_user)
    settings = settings_of(instance, stop, timeline) | (UNSYNCED if unsynced else {})
    inside = tablespaces_inside(instance.wal) if recovers else contextlib.nullcontext()
    with inside, serving(instance, settings):
        yield instance


def log_of(instance: PrivateInstance) -> str:
    """The log of its server, which runs as another account; "" where it has none.

    Raises:
        OpsError: it cannot be read.
    """
    with told(instance.log), contextlib.suppress(FileNotFoundError):
        return inside.read_text(instance.log, "replace")
    return ""


@contextlib.contextmanager
def serving(
    instance: PrivateInstance, settings: Mapping[str, str], stop: signal.Signals = signal.SIGINT
) -> Iterator[subprocess.Popen[bytes]]:
    """Run its server with these settings on the command line, and end it with the signal `stop` after the block. It is
    a child process: it ends with its run."""
    options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    argv = [instance.postgres.program("postgres"), "-D", str(instance.data), *options]
    with (
        durable.append(instance.log) as log,
        shell.spawn(argv, user=instance.postgres.os_user, directory=instance.root, stdout=log, stderr=log) as child,
    ):
        try:
            yield child
        finally:
            if child.poll() is None:
                child.send_signal(stop)
                with contextlib.suppress(Unreachable):
                    until(lambda: child.poll() is not None, what="its end", seconds=60)


def put_away(instance: PrivateInstance) -> None:
    """Delete what is left of it."""
    sweep_instance.work(instance.root)
    removed(f"directory {instance.root}")
    shutil.rmtree(instance.postgres.host, ignore_errors=True)
