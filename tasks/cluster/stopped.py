"""A stopped server judged by its files: whether it would start, and what a private copy of its catalogs needs.

Its data directory is not changed, and its programs run as the server's user.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from blocks.postgres.refusals import Starting
from blocks.postgres.server import Postgres
from blocks.services.service import DockerServices, Services
from runbook import shell
from runbook.errors import CommandFailed, OpsError
from runbook.files import inside
from runbook.kinds import probe
from tasks.cluster.container import ServerContainer, read_setting
from tasks.cluster.instance import servers_in
from tasks.host.disk import is_here
from tasks.postgres.server.requirements import Requirement
from tasks.wal.format.names import Segment, lsn_of

START, ANSWER = "start of the stopped server", "answer of the database server"
CONTROL, WAL = "control file of the stopped server", "WAL that the stopped server starts from"
_PRELOADED = "shared_preload_libraries"
_READ = ("hba_file", "ident_file", _PRELOADED)
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
def judge_silent(
    postgres: Postgres, services: Services, running: Mapping[str, bool], silence: OpsError
) -> tuple[Requirement, ...]:
    """Judge a server that does not answer, for the reason `silence`. If its processes run, a start changes nothing;
    without processes there is no finding. `running`: by role, as the service manager reports."""
    role = postgres.service
    name, then = services.names.get(role, role), "then run this again"
    here = is_here(postgres.host) and not isinstance(services, DockerServices)
    processes = servers_in(Path(postgres.data_directory).resolve()) if here else []
    if not processes and not running.get(role, False):
        return ()
    frozen = [str(one.pid) for one in processes if one.is_running() and one.status() == psutil.STATUS_STOPPED]
    value = f"{name} runs, but does not answer: {silence.message}"
    if isinstance(silence, Starting):
        hint = f"wait until it answers (its log shows how much WAL it has replayed), {then}"
    else:
        value += f"; suspended by a signal: process {', '.join(frozen)}" * bool(frozen)
        hint = f"if [postgres] host and port are right, stop {name}, {then}: it starts the server"
    return (Requirement(ANSWER, False, value, "an answer, or a stopped server", hint),)


@probe
def read_stopped(postgres: Postgres, container: ServerContainer | None = None) -> StoppedServer:
    """Judge a stopped server with a data directory. `container`: of the server, whose image reads its configuration."""
    data = Path(postgres.data_directory).resolve()
    if not is_here(postgres.host):
        return StoppedServer(unjudged=f"its data directory is on another host: {postgres.host}")
    try:
        inside.read_text(data / "PG_VERSION")  # unreadable for this user: an OSError, not a fault of the server
        return _read(postgres, data, container)
    except (OpsError, OSError) as error:
        return StoppedServer(
            unjudged=error.message if isinstance(error, OpsError) else f"{error.filename}: {error.strerror}"
        )


def _read(postgres: Postgres, data: Path, container: ServerContainer | None) -> StoppedServer:
    found, settings = list[Requirement](), last_options(data)
    if container:
        settings |= container.settings
        configuration, files = _configuration_in(container, settings)
    else:
        configuration, files = _configuration(postgres, data, settings)
    found.append(configuration)
    settings |= files
    preloaded = tuple(name.strip(" \"'") for name in settings.pop(_PRELOADED, "").split(",") if name.strip())
    control, damage = read_control(postgres, data)
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
    system = int(control["Database system identifier"])
    return StoppedServer(tuple(found), "", settings, preloaded, first, redo, system)


@probe
def judge_configuration(postgres: Postgres, container: ServerContainer | None = None) -> tuple[Requirement, ...]:
    """Whether the configuration of a server, running or not, can be read for its next start.

    Raises:
        OpsError: a program cannot be run here.
    """
    data = Path(postgres.data_directory).resolve()
    settings = last_options(data)
    if container:
        return (_configuration_in(container, {**settings, **container.settings})[0],)
    return (_configuration(postgres, data, settings)[0],)


def last_options(data: Path) -> dict[str, str]:
    """The settings on the command line of its last start: a service manager's."""
    try:
        return dict(_LAST_OPTION.findall(inside.read_text(data / "postmaster.opts")))
    except OSError:
        return {}


def config_file(postgres: Postgres, data: Path) -> Path:
    """The configuration file of the server."""
    return Path(postgres.config_file) if postgres.config_file else data / "postgresql.conf"


def _configuration(postgres: Postgres, data: Path, settings: dict[str, str]) -> tuple[Requirement, dict[str, str]]:
    """https://www.postgresql.org/docs/current/app-postgres.html: `postgres -C`"""
    file = settings.get("config_file") or str(config_file(postgres, data))
    hint = f"correct {file}: the server does not start with it"
    found = dict[str, str]()
    try:
        for name in _READ:
            found[name] = _setting(postgres, data, settings | {"config_file": file}, name)
    except CommandFailed as error:
        return Requirement(START, False, start_error(error.stderr), f"{file} can be read", hint), found
    return Requirement(START, True, f"{file} can be read", "its configuration can be read", hint), found


def _setting(postgres: Postgres, data: Path, settings: Mapping[str, str], name: str) -> str:
    """The value with which the server would start.

    Raises:
        CommandFailed: its configuration is invalid on this host.
    """
    options = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
    return shell.run(
        [postgres.program("postgres"), "-D", str(data), *options, "-C", name],
        user=postgres.os_user,
        directory=Path("/"),
        environment={"LC_ALL": "C"},
        timeout_seconds=30,
    ).stdout.strip()


def _configuration_in(container: ServerContainer, settings: dict[str, str]) -> tuple[Requirement, dict[str, str]]:
    """The same in a throw-away container of the server's image."""
    file = settings.get("config_file") or f"{container.data}/postgresql.conf"
    hint = f"correct {file} in container {container.name}: the server does not start with it"
    try:
        preloaded = read_setting(container, settings | {"config_file": file}, _PRELOADED)
    except CommandFailed as error:
        return Requirement(START, False, start_error(error.stderr), f"{file} can be read", hint), {}
    found = Requirement(START, True, f"{file} can be read", "its configuration can be read", hint)
    return found, {"config_file": file, _PRELOADED: preloaded}


def start_error(log: str) -> str:
    """Why a server did not start: the error in its log, and its last message."""
    lines = [re.sub(r"^.*? (?=LOG:|FATAL:|PANIC:)", "", line) for line in log.splitlines()]
    messages = [line for line in lines if line.startswith(("LOG:", "FATAL:", "PANIC:"))]
    ends = [number for number, line in enumerate(messages) if not line.startswith("LOG:")]
    if not ends:
        return (lines or ["it has no log"])[-1][:300]
    first = ends[0] - 1 if ends[0] and re.search("error|could not|invalid|syntax", messages[ends[0] - 1]) else ends[0]
    return " / ".join(line.partition(":")[2].strip() for line in messages[first : ends[0] + 1])[:300]


def read_control(postgres: Postgres, data: Path) -> tuple[dict[str, str], str]:
    """Read the lines of a stopped server's control file by name, and why they are invalid ("": they are valid).

    https://www.postgresql.org/docs/current/app-pgcontroldata.html
    """
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
