"""PostgreSQL and Redis: each log-in, versions of the programs here, data directories, configuration files, clocks."""

from __future__ import annotations

import os
import pwd
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg

from blocks.environment import Environment
from blocks.postgres import refusals
from blocks.postgres.refusals import hint_for, sqlstate_of
from blocks.postgres.server import DIRECT, POOLED, Connection, Postgres, execute, first_line, is_pooled
from blocks.services.service import DockerServices
from deployments.doctor.host import clock
from deployments.doctor.line import DoctorLine, expect, prefer, refused
from runbook import shell
from runbook.errors import OpsError
from tasks.host.disk import is_here
from tasks.postgres.server.server import program_version
from tasks.redis.server import connected, family, setting, version_of
from tasks.redis.server import program_version as redis_program

POSTGRES_PROGRAMS = ("psql", "pg_dump", "pg_dumpall", "pg_restore", "vacuumdb", "pg_basebackup", "initdb")
CONNECT_SECONDS = 5
_SERVER = """
SELECT current_setting('server_version'), extract(epoch FROM now()), rolsuper FROM pg_roles WHERE rolname = current_user
"""
_FILES = "SELECT current_setting('data_directory'), current_setting('config_file')"


def databases(env: Environment) -> dict[str, Postgres]:
    """The PostgreSQL servers by the name of their table in the TOML."""
    found = dict(zip(("postgres", "standby"), env.nodes(), strict=False)) if env.has("postgres") else {}
    return found | ({"prefect_server": env.prefect_server} if env.has("prefect_server") else {})


def look_at_postgres(env: Environment, part: str, postgres: Postgres) -> Iterator[DoctorLine]:
    """Each role logs in; the programs here are of its major version; its clock is this host's; its files are where the
    TOML says."""
    with postgres.connect() as connection:
        asked = time.time()
        version, now, superuser = execute(connection, _SERVER)[0]
        answered = time.time()
        yield DoctorLine(f"[{part}] PostgreSQL {version} at {postgres.host}:{postgres.port} answers")
        told = "a superuser" if superuser else "not a superuser"
        yield prefer(
            superuser,
            f"[{part}] admin_user {postgres.admin_user} is {told}",
            "name a superuser: dumps need BYPASSRLS, restores need owners",
            "a superuser",
        )
        if is_pooled(connection):
            yield expect(False, f"[{part}] a connection pooler answers: {POOLED}", DIRECT, "PostgreSQL itself")
        yield from _log_ins(env, part, postgres)
        yield from _programs(part, postgres, int(str(version).split(".")[0]))
        yield clock(f"[{part}] PostgreSQL", float(now), (asked, answered))
        if is_here(postgres.host) and part != "prefect_server":  # of that one no base backup is taken
            yield from _files(env, part, postgres, connection)


def _log_ins(env: Environment, part: str, postgres: Postgres) -> Iterator[DoctorLine]:
    yield _logs_in(
        f"[{part}] user {postgres.user}",
        f"to {postgres.database}",
        lambda: postgres.connect(postgres.database, as_application=True).close(),
    )
    if env.has("standby") and part != "prefect_server":
        yield _logs_in(f"[{part}] admin_user {postgres.admin_user}", "for replication", lambda: _replicate(postgres))


def _logs_in(who: str, where: str, connect: Callable[[], object]) -> DoctorLine:
    try:
        connect()
    except OpsError as error:
        return refused(f"{who} does not log in {where}", error)
    return DoctorLine(f"{who} logs in {where}")


def _replicate(postgres: Postgres) -> None:
    found = postgres.environment()
    try:
        psycopg.connect(
            host=postgres.host,
            port=postgres.port,
            user=found["PGUSER"],
            password=found["PGPASSWORD"],
            replication="true",
            connect_timeout=CONNECT_SECONDS,
            **postgres.transport(),
        ).close()
    except psycopg.Error as error:
        said = str(error)
        match sqlstate_of(said):
            case refusals.NO_RIGHT:
                hint = f"ALTER ROLE {postgres.admin_user} REPLICATION"
            case refusals.NOT_ADMITTED if "pg_hba.conf" in said:
                hint = "add a line for replication to pg_hba.conf, then reload it (SELECT pg_reload_conf())"
            case _:
                hint = hint_for(said) if "FATAL" in said else "start it, or read its log"
        raise OpsError(first_line(error), hint) from None


def _programs(part: str, postgres: Postgres, major: int) -> Iterator[DoctorLine]:
    missing = [name for name in POSTGRES_PROGRAMS if not (Path(postgres.programs) / name).exists()]
    yield expect(
        not missing,
        f"[{part}] programs in {postgres.programs}",
        f"{', '.join(missing)} not there: install PostgreSQL's, or correct [{part}] programs",
        f"{', '.join(POSTGRES_PROGRAMS)}",
    )
    if "pg_dump" not in missing:
        found = program_version(postgres, "pg_dump")
        yield expect(
            found == major,
            f"[{part}] programs are of PostgreSQL {found}",
            f"the server is {major}: install its programs, or correct [{part}] programs",
            f"PostgreSQL {major}",
        )


def _files(env: Environment, part: str, postgres: Postgres, connection: Connection) -> Iterator[DoctorLine]:
    """A base backup is put in the place of the data, beside it: the directory above must be writable too."""
    path = Path(postgres.data_directory)
    for directory in (path, path.parent):
        ok = directory.is_dir() and os.access(directory, os.W_OK | os.X_OK)
        line = expect if env.has("wal") else prefer  # a dump is restored without
        yield line(
            ok,
            f"[{part}] {directory} is {'' if ok else 'not '}writable",
            "run the worker as root, or as its owner: no base backup could be restored",
        )
    if not _is_container(env):  # there its paths and users are the container's own
        data, configuration = (str(one) for one in execute(connection, _FILES)[0])
        yield expect(
            _same(data, path),
            f"[{part}] data_directory is {path}",
            f"correct [{part}] data_directory",
            f"{data}, the server's own",
        )
        yield from _owner(f"[{part}]", path, postgres.os_user)
        yield from _configuration(part, path, postgres.config_file, configuration)


def _configuration(part: str, data: Path, described: str, configuration: str) -> Iterator[DoctorLine]:
    own = described or str(data / "postgresql.conf")
    line = expect if described else prefer
    yield line(
        _same(configuration, Path(own)),
        f"[{part}] config_file is {described or 'in the data directory'}",
        f'set [{part}] config_file = "{configuration}"',
        f"{configuration}, the server's own",
    )


def look_at_redis(env: Environment) -> Iterator[DoctorLine]:
    """It answers to its password, its program is here (a backup is proven on a scratch server), and its files are where
    the TOML says."""
    block = env.redis
    with connected(block) as client:
        version = version_of(client)
        info = client.info("server")
        try:
            directory = setting(client, "dir")
        except OpsError:
            directory = ""
    where = f"at {block.host}:{block.port}"
    yield DoctorLine(f"[redis] {version} {where} answers")
    program = redis_program(block)
    same = family(program) == family(version) and program.split()[1].split(".")[0] == version.split()[1].split(".")[0]
    hint = f"the server is {version}: install its program, or correct [redis] server_program"
    yield expect(same, f"[redis] program is {program}", hint, version)
    if not is_here(block.host) or block.remote or _is_container(env):
        return
    path = Path(block.data_directory)
    yield expect(
        _same(directory, path),
        f"[redis] data_directory is {path}",
        "correct [redis] data_directory",
        f"{directory or 'unknown: CONFIG GET dir is refused'}, the server's own",
    )
    ok = path.is_dir() and os.access(path, os.W_OK | os.X_OK)
    yield expect(
        ok,
        f"[redis] {path} is writable",
        "it is not there, or not for this user: run the worker as root, or as its owner",
    )
    yield from _owner("[redis]", path, block.os_user)
    own = str(info.get("config_file", ""))
    line = expect if "config_file" in block.model_fields_set else prefer
    yield line(
        Path(block.config_file).is_file(),
        f"[redis] config_file is {block.config_file}",
        "it is not there: correct [redis] config_file",
        f"{own or 'a file'}, the server's own",
    )


def _owner(where: str, path: Path, os_user: str) -> Iterator[DoctorLine]:
    if path.exists():
        own = path.stat().st_uid
        yield expect(
            shell.owner_of(os_user)[0] == own,
            f"{where} os_user is {os_user}",
            f"correct {where} os_user",
            f"{_user(own)}, the owner of {path}",
        )


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _same(one: str, other: Path) -> bool:
    return bool(one) and os.path.realpath(one) == os.path.realpath(other)


def _is_container(env: Environment) -> bool:
    return env.has("services") and isinstance(env.services, DockerServices)
