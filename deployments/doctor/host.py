"""What this host must have for an environment's runbooks: programs, rights, a way to the servers, the right time."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from blocks.environment import Environment
from blocks.places import Backups
from blocks.postgres import Postgres, execute
from deployments.doctor.line import Line, expect
from tasks.application import read_problems
from tasks.host import is_here
from tasks.postgres.server import program_version
from tasks.redis.server import connected, family, version_of
from tasks.redis.server import program_version as redis_program

POSTGRES_PROGRAMS = ("psql", "pg_dump", "pg_dumpall", "pg_restore", "vacuumdb", "pg_basebackup", "initdb")
CLOCK_SECONDS = 2.0
ANSWER_SECONDS = 10.0
RESOURCES = ("postgres", "redis", "files", "cluster", "wal", "prefect")
# A backup's day, a certificate's end, a lock's age: all of them are told by this host's clock.
CLOCK = "set this host's clock by NTP (timedatectl set-ntp true)"


def databases(env: Environment) -> dict[str, Postgres]:
    """The PostgreSQL servers by the name of their table in the TOML."""
    found = dict(zip(("postgres", "standby"), env.nodes(), strict=False))
    return found | ({"prefect_server": env.prefect_server} if env.has("prefect_server") else {})


def look_at_postgres(part: str, postgres: Postgres) -> Iterator[Line]:
    """It answers, with programs of its own major version here, and its clock is this host's."""
    with postgres.connect() as connection:
        asked = time.time()
        version, now = execute(connection, "SELECT current_setting('server_version'), extract(epoch FROM now())")[0]
        answered = time.time()
    where = f"[{part}] PostgreSQL {version} at {postgres.host}:{postgres.port}"
    yield Line(f"{where} answers")
    missing = [name for name in POSTGRES_PROGRAMS if not (Path(postgres.programs) / name).exists()]
    yield expect(not missing, f"[{part}] programs in {postgres.programs}",
                 f"{', '.join(missing)} not there: install PostgreSQL's, or correct [{part}] programs")  # fmt: skip
    if "pg_dump" not in missing:
        major, found = int(str(version).split(".")[0]), program_version(postgres, "pg_dump")
        yield expect(found == major, f"[{part}] programs are of PostgreSQL {found}",
                     f"the server is {major}: install its programs, or correct [{part}] programs")  # fmt: skip
    yield clock(f"[{part}] PostgreSQL", float(now), (asked, answered))
    if is_here(postgres.host) and part != "prefect_server":  # of that one no base backup is taken
        yield from _data_directory(part, Path(postgres.data_directory))


def _data_directory(part: str, path: Path) -> Iterator[Line]:
    """A base backup is put in its place, beside it: the directory above must be writable too."""
    for directory in (path, path.parent):
        ok = directory.is_dir() and os.access(directory, os.W_OK | os.X_OK)
        yield expect(ok, f"[{part}] {directory} is writable",
                     "it is not there, or not for this user: run the worker as root, or as its owner")  # fmt: skip


def look_at_redis(env: Environment) -> Iterator[Line]:
    """It answers, and its program is here: a backup is proven on a scratch server."""
    block = env.redis
    with connected(block) as client:
        version = version_of(client)
    yield Line(f"[redis] {version} answers")
    program = redis_program(block)
    same = family(program) == family(version) and program.split()[1].split(".")[0] == version.split()[1].split(".")[0]
    yield expect(same, f"[redis] program is {program}",
                 f"the server is {version}: install its program, or correct [redis] server_program")  # fmt: skip


def look_at_application(env: Environment) -> Iterator[Line]:
    """Backend and frontend are healthy."""
    problems = read_problems.work(env.application)
    for name, problem in problems.items():
        yield expect(not problem, f"[application] {problem or f'{name} is healthy'}", "launch diagnose-application: it "
                     "finds out why")  # fmt: skip
    if not problems:
        yield Line("[application] no health check is configured: only that its services run is checked")


def look_at_programs(env: Environment) -> Iterator[Line]:
    """What every host of a worker needs besides."""
    yield expect(shutil.which("setpriv"), "setpriv", "install util-linux: programs could not be run as other users")
    if env.has("services") and type(env.services).__name__ == "SystemdServices":
        yield expect(shutil.which("systemctl"), "systemctl", "there is no systemd here: correct [services] kind")


def look_at_places(env: Environment) -> Iterator[Line]:
    """Where reports and backups are written."""
    yield _writable("reports", env.reports_directory)
    for which in ("backups", "copies"):
        if not env.has(which):
            continue
        stores: Backups = env.stores(which)
        places = [(resource, str(getattr(stores, resource))) for resource in RESOURCES]
        for resource, place in places:
            if place and not place.startswith("s3://"):
                yield _writable(f"[{which}] {resource}", Path(place))
        if any(place.startswith("s3://") for _, place in places):
            yield _writable(f"[{which}] spool", Path(stores.spool))
    if env.has("backups") and env.backups.recipients:
        yield expect(len(env.backups.recipients) > 1, "[backups] keys", "add a second, escrowed recipient: a lost key "
                     "loses every backup")  # fmt: skip


def _writable(what: str, path: Path) -> Line:
    """It, or what it will be made in."""
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    ok = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    return expect(ok, f"{what} {path} is writable", f"{there} is not writable for this user: correct its owner or mode")


def clock(whose: str, told: float, between: tuple[float, float], vague_seconds: float = 0.0) -> Line:
    """How far another clock is from this host's, at least: it told its time, or one that is older by up to
    `vague_seconds`, at some moment `between` the question and the answer. On a busy host seconds lie between them."""
    asked, answered = between
    offset_seconds = max(told - answered, 0.0) or min(told + vague_seconds - asked, 0.0)
    ok = abs(offset_seconds) <= CLOCK_SECONDS
    return expect(ok, f"clock of {whose} is {offset_seconds:+.1f} s from this host's", CLOCK)
