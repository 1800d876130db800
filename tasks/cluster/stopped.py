"""A stopped server judged by its files: whether it would start, and what a private copy of its catalogs needs.

Its data directory is not changed, and its programs run as the server's user.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from blocks.postgres.server import Postgres
from runbook import shell
from runbook.errors import CommandFailed, OpsError
from runbook.kinds import probe
from tasks.cluster.instance import servers_in
from tasks.host.disk import is_here
from tasks.postgres.server.requirements import Requirement
from tasks.wal.format.names import Segment, lsn_of

START = "start of the stopped server"
CONTROL, WAL = "control file of the stopped server", "WAL that the stopped server starts from"
_PRELOADED = "shared_preload_libraries"
_READ = ("hba_file", "ident_file", _PRELOADED)
# For a container's server, whose configuration is not read: the values of its last run.
_AS_IT_RAN = {
    "wal_level": "wal_level setting",
    "max_connections": "max_connections setting",
    "max_prepared_transactions": "max_prepared_xacts setting",
}
_DAMAGED = "CRC checksum does not match"
_LAST_OPTION = re.compile(r'"-c" "([a-z_.]+)=([^"]*)"')


@dataclass(frozen=True)
class StoppedServer:
    """The findings. `unjudged`: why its catalogs cannot be copied, "" if they can. `settings`: those of its command
    line, and the paths of its pg_hba.conf and pg_ident.conf. `first`: the WAL segment that a start reads from LSN
    `redo` on. `preloaded`: shared_preload_libraries."""

    requirements: tuple[Requirement, ...] = ()
    unjudged: str = ""
    settings: dict[str, str] = field(default_factory=dict)
    preloaded: tuple[str, ...] = ()
    first: Segment | None = None
    redo: int = 0
    system: int = 0


@probe
def read_stopped(postgres: Postgres, *, in_container: bool) -> StoppedServer:
    """Judge a stopped server with a data directory. `in_container`: its configuration has the container's paths, and is
    not read."""
    data = Path(postgres.data_directory).resolve()
    if not is_here(postgres.host):
        return StoppedServer(unjudged=f"its data directory is on another host: {postgres.host}")
    try:
        if servers_in(data):
            return StoppedServer(unjudged="its processes still run, but it does not answer")
        (data / "PG_VERSION").read_text()  # unreadable for this user: an OSError, not a fault of the server
        return _read(postgres, data, in_container=in_container)
    except (OpsError, OSError) as error:
        return StoppedServer(
            unjudged=error.message if isinstance(error, OpsError) else f"{error.filename}: {error.strerror}"
        )


def _read(postgres: Postgres, data: Path, *, in_container: bool) -> StoppedServer:
    found, settings, preloaded = list[Requirement](), dict[str, str](), tuple[str, ...]()
    if not in_container:
        settings = last_options(data)
        configuration, files = _configuration(postgres, data, settings)
        found.append(configuration)
        settings |= files
        preloaded = tuple(name.strip(" \"'") for name in settings.pop(_PRELOADED, "").split(",") if name.strip())
    control, damage = _control(postgres, data)
    hint = f"mv {data} {data}.broken, then run this again: a new cluster is created"
    found.append(Requirement(CONTROL, not damage, damage or control["Database cluster state"], "readable", hint))
    if damage:
        return StoppedServer(tuple(found))
    if (data / "standby.signal").exists():
        hint = "restore to the primary: correct [postgres] host and port, or promote this server (postgres-failover)"
        found.append(Requirement("server accepts writes", False, "standby.signal: a standby", "a primary", hint))
        return StoppedServer(tuple(found))
    for name in ("recovery.signal", "backup_label"):
        if (data / name).exists():
            return StoppedServer(tuple(found), unjudged=f"{name} is in its data directory: it starts with a recovery")
    size = int(control["Bytes per WAL segment"])
    first = Segment.named(control["Latest checkpoint's REDO WAL file"], size)
    last = Segment(lsn_of(control["Latest checkpoint location"]) // size, first.timeline, size)
    missing = [one.name for one in (first, last) if not (data / "pg_wal" / one.name).exists()]
    value = f"missing: {missing[0]}" if missing else f"{first.name} is present"
    hint = f"copy that segment into {data}/pg_wal, or {hint}"
    found.append(Requirement(WAL, not missing, value, "every segment since the last checkpoint", hint))
    redo = lsn_of(control["Latest checkpoint's REDO location"])
    if in_container:
        settings = {name: control[line] for name, line in _AS_IT_RAN.items()} | {"max_replication_slots": "1000"}
    return StoppedServer(tuple(found), "", settings, preloaded, first, redo, int(control["Database system identifier"]))


def last_options(data: Path) -> dict[str, str]:
    """The settings on the command line of its last start: a service manager's."""
    try:
        return dict(_LAST_OPTION.findall((data / "postmaster.opts").read_text()))
    except OSError:
        return {}


def config_file(postgres: Postgres, data: Path) -> Path:
    """The configuration file of the server."""
    return Path(postgres.config_file) if postgres.config_file else data / "postgresql.conf"


def _configuration(postgres: Postgres, data: Path, settings: dict[str, str]) -> tuple[Requirement, dict[str, str]]:
    """https://www.postgresql.org/docs/current/app-postgres.html: `postgres -C`"""
    file = settings.get("config_file") or str(config_file(postgres, data))
    options = [word for name, value in (settings | {"config_file": file}).items() for word in ("-c", f"{name}={value}")]
    hint = f"correct {file}: the server does not start with it"
    found = dict[str, str]()
    try:
        for name in _READ:
            program, directory = postgres.program("postgres"), str(data)
            found[name] = shell.run(
                [program, "-D", directory, *options, "-C", name],
                user=postgres.os_user,
                directory=Path("/"),
                environment={"LC_ALL": "C"},
                timeout_seconds=30,
            ).stdout.strip()
    except CommandFailed as error:
        return Requirement(START, False, start_error(error.stderr), f"{file} can be read", hint), found
    return Requirement(START, True, f"{file} can be read", "its configuration can be read", hint), found


def start_error(log: str) -> str:
    """Why a server did not start: the error in its log, and its last message."""
    lines = [re.sub(r"^.*? (?=LOG:|FATAL:|PANIC:)", "", line) for line in log.splitlines()]
    messages = [line for line in lines if line.startswith(("LOG:", "FATAL:", "PANIC:"))]
    ends = [number for number, line in enumerate(messages) if not line.startswith("LOG:")]
    if not ends:
        return (lines or ["it has no log"])[-1][:300]
    first = ends[0] - 1 if ends[0] and re.search("error|could not|invalid|syntax", messages[ends[0] - 1]) else ends[0]
    return " / ".join(line.partition(":")[2].strip() for line in messages[first : ends[0] + 1])[:300]


def _control(postgres: Postgres, data: Path) -> tuple[dict[str, str], str]:
    """Its lines by name, and why they are invalid ("": they are valid)."""
    try:
        printed = shell.run(
            [postgres.program("pg_controldata"), "-D", data],
            user=postgres.os_user,
            environment={"LC_ALL": "C"},
            directory=Path("/"),
            timeout_seconds=30,
        )
    except CommandFailed as error:
        return {}, error.message
    if _DAMAGED in printed.stdout + printed.stderr:
        return {}, "global/pg_control is damaged: its checksum does not match"
    return dict(re.findall(r"^([^:\n]+):[ \t]+(.+)$", printed.stdout, re.MULTILINE)), ""
