"""An old primary made a standby of the new one: rewound to where their ways parted, or copied anew (§8.3).

https://www.postgresql.org/docs/current/app-pgrewind.html
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from blocks.postgres import Postgres
from runbook import shell
from runbook.errors import OpsError
from runbook.failpoint import failpoint
from runbook.kinds import action, probe
from runbook.permit import Permit
from tasks.failover.fencing import SIGNAL, give_like, look_for_processes
from tasks.failover.following import follow, put_back, read_kept, upstream_of
from tasks.failover.segments import Beyond, read_beyond
from tasks.postgres.synchronous import address
from tasks.wal.local import find_segments

REJOIN = "make a standby of"
KEPT = "interview-ops.rejoin.json"
"""Beside the data directory while it is rewound: its own configuration, which pg_rewind overwrites. Where it is found
later, a run was killed meanwhile, and only a base backup is safe."""
Way = Literal["start", "rewind", "base_backup"]


@dataclass(frozen=True)
class Diverged:
    """WAL that an old primary wrote after its ways with the new one parted, and where it is kept ("" where there is
    none)."""

    beyond: Beyond
    kept: str = ""
    files: int = 0


@dataclass(frozen=True)
class Rejoined:
    """How, in how many seconds, and where the old data directory is kept ("" where it was rewound)."""

    way: Way
    seconds: float
    kept: str = ""


def was_interrupted(postgres: Postgres) -> bool:
    """Whether a rewind of its data directory was killed."""
    return Path(postgres.data_directory).with_name(KEPT).exists()


@probe
def read_diverged(postgres: Postgres, timeline: int, place: int) -> Beyond:
    """What a stopped server's own directory of WAL holds of a timeline after a position.

    Raises:
        OpsError: it cannot be read, or not all of it is there.
    """
    return read_beyond(postgres, Path(postgres.data_directory, "pg_wal"), timeline, place)


@action(idempotent=True)
def save_diverged(permit: Permit, postgres: Postgres, timeline: int, place: int) -> Diverged:
    """Copy the segments with WAL after `place`, where there is any, to a directory beside the data directory."""
    permit.require(REJOIN, address(postgres))
    data = Path(postgres.data_directory)
    beyond = read_beyond(postgres, data / "pg_wal", timeline, place)
    if not beyond.bytes:
        return Diverged(beyond)
    target = data.with_name(f"{data.name}.diverged_{timeline}_{place:X}")
    beside = target.with_name(f"{target.name}.new")
    if not target.exists():
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(mode=0o700)
        for one in find_segments(data / "pg_wal"):
            if one.timeline == timeline and one.start + one.bytes > place and one.start <= beyond.end:
                shutil.copy2(one.path, beside / one.path.name)
                _sync(beside / one.path.name)
        beside.rename(target)
        _sync(target.parent)
    return Diverged(beyond, str(target), len(list(target.iterdir())))


@action
def rewind(permit: Permit, primary: Postgres, standby: Postgres) -> Rejoined:
    """`pg_rewind` of the stopped server, then the configuration of a standby. Its own configuration files stay.

    Raises:
        CommandFailed: pg_rewind could not; the data directory may be unusable then, a base backup replaces it.
        OpsError: something still runs there.
    """
    permit.require(REJOIN, address(standby))
    started, data = time.monotonic(), Path(standby.data_directory)
    _require_stopped(standby)
    note = data.with_name(KEPT)
    give_like(data, note, json.dumps(read_kept(data)))
    upstream = upstream_of(primary, standby)
    (data / SIGNAL).unlink(missing_ok=True)  # pg_rewind recovers a crashed server in single-user mode
    failpoint("rejoin: before pg_rewind")
    settings = [f"--config-file={standby.config_file}"] if standby.config_file else []
    shell.run(
        [standby.program("pg_rewind"), "-D", data, f"--source-server={_source(primary, 'rewind')}", *settings],
        environment=_login(primary), user=standby.os_user, directory=Path("/"),
        stall=shell.Stall(primary.stall_seconds), hint="launch rejoin-standby with method=base_backup",
    )  # fmt: skip
    failpoint("rejoin: rewound")
    kept = json.loads(note.read_text(encoding="utf-8"))
    put_back(data, kept)
    follow(standby, upstream)
    note.unlink()
    return Rejoined("rewind", time.monotonic() - started)


@action(idempotent=True)
def configure(permit: Permit, primary: Postgres, standby: Postgres) -> Rejoined:
    """A stopped standby is told whom to follow; nothing else of it changes.

    Raises:
        OpsError: something still runs there.
    """
    permit.require(REJOIN, address(standby))
    _require_stopped(standby)
    follow(standby, upstream_of(primary, standby))
    return Rejoined("start", 0.0)


@action
def copy_anew(permit: Permit, primary: Postgres, standby: Postgres) -> Rejoined:
    """`pg_basebackup` beside, then renamed into place; the old data directory is renamed aside, never removed.

    The copying has a name of its own: under the standby's, commits would wait for it, and it is on no disk yet.
    """
    permit.require(REJOIN, address(standby))
    started, data = time.monotonic(), Path(standby.data_directory).resolve()
    _require_stopped(standby)
    note, beside = data.with_name(KEPT), data.with_name(f"{data.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    kept = json.loads(note.read_text(encoding="utf-8")) if note.exists() else read_kept(data)
    upstream = upstream_of(primary, standby)
    slot = [f"--slot={standby.slot}"] if standby.slot else []
    shell.run(
        [standby.program("pg_basebackup"), "-D", beside, "-X", "stream", "-c", "fast", "--no-password", *slot,
         "-d", _source(primary, "base-backup")],
        environment=_login(primary), user=standby.os_user, directory=Path("/"),
        stall=shell.Stall(primary.stall_seconds),
        hint="look at the primary's log and at the room on this disk, then launch it again",
    )  # fmt: skip
    put_back(beside, kept)
    follow(standby, upstream, beside)
    failpoint("rejoin: copied")
    aside = ""
    if data.exists():
        aside = str(data.with_name(f"{data.name}.superseded_{datetime.now(UTC):%Y%m%d_%H%M%S}"))
        data.rename(aside)
    failpoint("rejoin: old one aside")
    beside.rename(data)
    note.unlink(missing_ok=True)
    return Rejoined("base_backup", time.monotonic() - started, aside)


def _require_stopped(standby: Postgres) -> None:
    left, _ = look_for_processes(Path(standby.data_directory))
    if left:
        raise OpsError(
            f"processes still work in {standby.data_directory}: {', '.join(map(str, left[:5]))}",
            "stop its service, or end them, the oldest first: kill -INT; then launch it again",
        )


def _source(primary: Postgres, name: str) -> str:
    """Without the password: that goes in the environment."""
    login = f"host={primary.host} port={primary.port} user={primary.admin_user}"
    return f"{login} dbname={primary.maintenance_database} application_name={name}"


def _login(primary: Postgres) -> dict[str, str]:
    return {"PGPASSWORD": primary.admin_password.get_secret_value(), "LC_ALL": "C", **primary.security()}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
