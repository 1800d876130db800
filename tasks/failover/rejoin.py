"""An old primary becomes a standby of the new one: by pg_rewind, or by a new base backup (§8.3).

https://www.postgresql.org/docs/current/app-pgrewind.html
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from blocks.postgres.server import Postgres
from runbook import shell
from runbook.current import leaves, removed
from runbook.errors import OpsError
from runbook.failpoint import failpoint
from runbook.files import inside
from runbook.files.durable import sync
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from tasks.cluster.configuration import (
    load_configuration,
    main_file,
    note_of,
    place_configuration,
    read_configuration,
    save_configuration,
)
from tasks.cluster.swap import free_name
from tasks.cluster.tablespaces import map_occupied
from tasks.failover.fencing import SIGNAL, look_for_processes
from tasks.failover.following import follow, upstream_of
from tasks.failover.member import MemberControl, ask_member, control_of
from tasks.failover.promotion import history_of
from tasks.failover.segments import Beyond, read_beyond
from tasks.postgres.replication.synchronous import address
from tasks.wal.discarded import parted_at
from tasks.wal.format.names import Timeline
from tasks.wal.reading.local import find_segments

REJOIN = "make a standby of"
REWINDING = ".rewinding"
"""The suffix of a data directory during a rewind, so that no service starts a server there. If it is found later, a run
was killed, and only a base backup is safe."""
CLEAN = ("shut down", "shut down in recovery")
Method = Literal["start", "rewind", "base_backup"]


@dataclass(frozen=True)
class Diverged:
    """WAL that an old primary wrote after the new timeline began, and where it is kept ("" where there is
    none)."""

    beyond: Beyond
    kept: str = ""
    files: int = 0


@dataclass(frozen=True)
class Rejoined:
    """The method, its seconds, and where the old data directory is kept ("" after a rewind)."""

    method: Method
    seconds: float
    kept: str = ""


def was_interrupted(postgres: Postgres) -> bool:
    """Whether a rewind of its data directory was killed."""
    return _rewinding(postgres).exists()


def _data(postgres: Postgres) -> Path:
    """Its data directory. A symbolic link stays: it points to the chosen disk."""
    return Path(postgres.data_directory).resolve()


def _rewinding(postgres: Postgres) -> Path:
    data = _data(postgres)
    return data.with_name(f"{data.name}{REWINDING}")


@probe
def parted_from(primary: Postgres, node: Postgres, control: MemberControl) -> int:
    """Where the history of a server's files left the primary's; 0 where the primary is still on their timeline.

    Raises:
        OpsError: they have no history in common, or that of the files is missing.
        Unreachable: the primary is down.
    """
    system = ask_member(primary).system
    if system and control.system != system:
        raise OpsError(f"{node.data_directory} is of another cluster", "run it with method=base_backup")
    live, number = history_of(primary), control.timeline
    if live.number == number:
        return 0
    path, text = Path(node.data_directory, "pg_wal", f"{number:08X}.history"), ""
    try:
        text = inside.read_text(path, "replace") if number > 1 else ""
    except OSError as error:
        if live.left_at(number) is None:
            hint = "run it with method=base_backup, which keeps the old files"
            raise OpsError(f"{path} cannot be read: {error.strerror}", hint) from None
        return live.left_at(number) or 0
    return parted_at(live, Timeline.read(number, text))


@probe
def read_diverged(postgres: Postgres, timeline: int, place: int) -> Beyond:
    """Read what a stopped server's pg_wal has of a timeline after a position.

    Raises:
        OpsError: it cannot be read, or is incomplete.
    """
    return read_beyond(postgres, Path(postgres.data_directory, "pg_wal"), timeline, place)


@action(of=lambda postgres: Act(REJOIN, address(postgres)), idempotent=True)
def save_diverged(postgres: Postgres, timeline: int, place: int) -> Diverged:
    """Copy the segments with WAL after `place`, if any, to a directory next to the data directory."""
    data = Path(postgres.data_directory)
    beyond = read_beyond(postgres, data / "pg_wal", timeline, place)
    if not beyond.bytes:
        return Diverged(beyond)
    target = data.with_name(f"{data.name}.diverged_{timeline}_{place:X}")
    beside = target.with_name(f"{target.name}.new")
    if not target.exists():
        shutil.rmtree(beside, ignore_errors=True)
        inside.make_directory(beside)
        for one in find_segments(data / "pg_wal"):
            if one.timeline == timeline and one.start + one.bytes > place and one.start <= beyond.end:
                inside.copy(one.path, beside / one.path.name)
                sync(beside / one.path.name)
        beside.rename(target)
        sync(target.parent)
    return Diverged(beyond, str(target), len(list(target.iterdir())))


@action(of=lambda standby: Act(REJOIN, address(standby)))
def rewind(primary: Postgres, standby: Postgres) -> Rejoined:
    """Run `pg_rewind` on the stopped server, then configure it as a standby. Its configuration files stay.

    The data directory has another name meanwhile, and gets its `standby.signal` before its own name again: if its
    service is started, even by a reboot, it finds no server or a standby, never a second primary.

    Raises:
        CommandFailed: pg_rewind failed. The data directory keeps the other name; a base backup replaces it.
        OpsError: a server still runs there.
    """
    started, data, aside = time.monotonic(), _data(standby), _rewinding(standby)
    _require_stopped(data)
    note, main = note_of(data), main_file(standby)
    configuration = read_configuration(data, main)
    save_configuration(note, configuration, aside)  # pg_rewind overwrites it
    upstream = upstream_of(primary, standby)
    _set_aside(data, aside)
    failpoint("rejoin: before pg_rewind")
    _finish_recovery(standby, aside)
    failpoint("rejoin: recovered")
    shell.run(
        [
            standby.program("pg_rewind"),
            "-D",
            aside,
            f"--source-server={_source(primary, 'rewind')}",
            "--no-ensure-shutdown",
        ],
        environment=_login(primary),
        user=standby.os_user,
        directory=Path("/"),
        stall=shell.Stall(primary.stall_seconds),
        hint=_instead(aside),
    )
    failpoint("rejoin: rewound")
    place_configuration(configuration, aside, data, main)
    follow(standby, upstream, aside)
    note.unlink()
    failpoint("rejoin: rewound, still aside")
    aside.rename(data)
    sync(data.parent)
    return Rejoined("rewind", time.monotonic() - started)


def _set_aside(data: Path, aside: Path) -> None:
    """Rename it, and undo that if a server started there in the last moment."""
    data.rename(aside)
    sync(data.parent)
    try:
        _require_stopped(aside)
    except OpsError:
        aside.rename(data)
        raise


def _finish_recovery(standby: Postgres, aside: Path) -> None:
    """Run crash recovery in single-user mode, as pg_rewind would, but in the renamed directory: a `data_directory` in
    the configuration has the old path. Single-user mode has no standby mode."""
    (aside / SIGNAL).unlink(missing_ok=True)
    control = control_of(standby.model_copy(update={"data_directory": str(aside)}))
    if control and control.state in CLEAN:
        return
    settings = ["-c", f"config_file={standby.config_file}"] if standby.config_file else []
    shell.run(
        [
            standby.program("postgres"),
            "--single",
            "-F",
            "-D",
            aside,
            *settings,
            "-c",
            f"data_directory={aside}",
            standby.maintenance_database,
        ],
        user=standby.os_user,
        directory=Path("/"),
        hint=_instead(aside),
    )


def _instead(aside: Path) -> str:
    return f"run rejoin-standby with method=base_backup; the old files are in {aside}"


@action(of=lambda standby: Act(REJOIN, address(standby)), idempotent=True)
def configure(primary: Postgres, standby: Postgres) -> Rejoined:
    """Set the primary of a stopped standby; nothing else changes.

    Raises:
        OpsError: a server still runs there.
    """
    _require_stopped(_data(standby))
    follow(standby, upstream_of(primary, standby))
    return Rejoined("start", 0.0)


@action(of=lambda standby: Act(REJOIN, address(standby)))
def copy_anew(primary: Postgres, standby: Postgres) -> Rejoined:
    """Run `pg_basebackup` into a new directory, then rename it into place. The old data directory is renamed, never
    deleted.

    The backup uses another application_name than the standby: otherwise commits would wait for a copy that is on no
    disk yet.
    """
    started, data, rewinding = time.monotonic(), _data(standby), _rewinding(standby)
    _require_stopped(data)
    note, main, beside = note_of(data), main_file(standby), data.with_name(f"{data.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    leaves(f"directory {beside}", "the next rejoin-standby deletes it")
    kept = load_configuration(note) if not data.exists() else None
    kept = kept or read_configuration(data if data.exists() else rewinding, main)
    upstream = upstream_of(primary, standby)
    options = ["--wal-method=stream", "--checkpoint=fast", "--no-password"]
    options += [f"--slot={standby.slot}"] if standby.slot else []
    for pair in map_occupied.work(primary, data).items():
        options.append("--tablespace-mapping=" + "=".join(str(path).replace("=", "\\=") for path in pair))
    shell.run(
        [standby.program("pg_basebackup"), *options, "-D", beside, "-d", _source(primary, "base-backup")],
        environment=_login(primary),
        user=standby.os_user,
        directory=Path("/"),
        stall=shell.Stall(primary.stall_seconds),
        hint="check the primary's log and the free disk space here, then run it again",
    )
    place_configuration(kept, beside, data, main)
    follow(standby, upstream, beside)
    failpoint("rejoin: copied")
    aside = [free_name(data)]
    save_configuration(note, kept, *aside, rewinding)
    for old in (data, rewinding):
        if old.exists():
            if aside[-1].exists():
                aside.append(free_name(data))
            old.rename(aside[-1])
    failpoint("rejoin: old one aside")
    beside.rename(data)
    removed(f"directory {beside}")
    sync(data.parent)
    note.unlink(missing_ok=True)
    return Rejoined("base_backup", time.monotonic() - started, ", ".join(str(one) for one in aside if one.exists()))


def _require_stopped(data: Path) -> None:
    left, _ = look_for_processes(data)
    if left:
        raise OpsError(
            f"processes still run in {data}: {', '.join(map(str, left[:5]))}",
            "stop its service, or end them, the oldest first: kill -INT; then run it again",
        )


def _source(primary: Postgres, name: str) -> str:
    """The connection string without the password, which is passed in the environment."""
    login = f"host={primary.host} port={primary.port} user={primary.admin_user}"
    return f"{login} dbname={primary.maintenance_database} application_name={name}"


def _login(primary: Postgres) -> dict[str, str]:
    return {"PGPASSWORD": primary.admin_password.get_secret_value(), "LC_ALL": "C", **primary.security()}
