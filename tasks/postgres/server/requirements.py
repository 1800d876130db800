"""Requirements of a backup on the server that will hold it, checked without changing anything.

A plan reports them, so that the confirmed run is not refused later for the same reason.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg import sql

from blocks.postgres.refusals import CLOSED, NO_DATABASE, NO_RIGHT, UNKNOWN, LoginRefused
from blocks.postgres.server import Connection, Postgres, execute, first_line
from runbook import shell
from runbook.errors import OpsError
from runbook.files import inside
from runbook.kinds import probe
from tasks.host.disk import is_here
from tasks.postgres.content.content import DatabaseContent
from tasks.postgres.server.properties import Properties
from tasks.postgres.server.server import Server, program_version

# Besides pg_restore's workers: this run's own sessions, the expectations and a migration.
OTHER_SESSIONS = 8
PROGRAMS = ("pg_restore", "vacuumdb")


@dataclass(frozen=True)
class Requirement:
    """One requirement of the server or this host. `value`: what was found."""

    name: str
    ok: bool
    value: str
    expected: str
    hint: str


@probe
def read_requirements(
    postgres: Postgres, content: DatabaseContent, server: Server, jobs: int
) -> tuple[Requirement, ...]:
    """Of a running server: rights, locale, tablespace, extensions and connections.

    Raises:
        Unreachable: it stopped answering.
    """
    with postgres.connect() as connection:
        found = [*_writable(connection, server), _rights(connection, content), _locale(connection, content.properties)]
        if not server.is_bare:  # a bare server gets the backup's roles and tablespaces from the run
            found.append(_tablespace(connection, content.properties))
        return (*found, _extensions(connection, content), _connections(connection, jobs))


@probe
def read_offline_requirements(postgres: Postgres, content: DatabaseContent, *, absent: bool) -> tuple[Requirement, ...]:
    """Requirements of a stopped or lost server that this host can check; none if the server is on another host."""
    if not is_here(postgres.host):
        return ()
    data, major = Path(postgres.data_directory), content.server_version // 10000
    hint = "correct [postgres] programs, or install PostgreSQL's programs of that version"
    expected = f"PostgreSQL {major} or newer"
    found = [_attempt("PostgreSQL's programs", hint, expected, lambda: _programs(postgres, major, absent))]
    if absent:
        return (*found, _owner(postgres.os_user), _parent(data))
    with suppress(OSError):  # not readable by this user
        version = inside.read_text(data / "PG_VERSION").strip()
        name = "version of the stopped server"
        program = found[0].value.removeprefix("PostgreSQL ")
        ok = not found[0].ok or version == program
        found.append(Requirement(name, ok, version, f"{program}, as the programs", hint))
    return tuple(found)


def _writable(connection: Connection, server: Server) -> Iterator[Requirement]:
    hint = "restore to the primary: correct [postgres] host and port, or promote this server (postgres-failover)"
    value = "in recovery: a standby" if server.in_recovery else "a primary"
    yield Requirement("server accepts writes", not server.in_recovery, value, "a primary", hint)
    setting = str(execute(connection, "SELECT current_setting('default_transaction_read_only')")[0][0])
    if setting == "on" and not server.in_recovery:
        hint = "set default_transaction_read_only to off for the administrator, then plan again"
        yield Requirement("transactions of the administrator", False, "read-only by default", "read-write", hint)


def _rights(connection: Connection, content: DatabaseContent) -> Requirement:
    rows = execute(connection, _RIGHTS, list(content.roles))
    superuser, creates, foreign = rows[0]
    ok = superuser or (creates and not foreign)
    value = "a superuser" if superuser else f"CREATEDB: {creates}; not a member of: {', '.join(foreign) or 'none'}"
    hint = "make [postgres] admin_user a superuser, or give it CREATEDB and membership in these roles"
    return Requirement("rights of the administrator", bool(ok), value, "a superuser, or CREATEDB and all roles", hint)


_RIGHTS = """
SELECT rolsuper, rolcreatedb,
       ARRAY(SELECT o.rolname::text FROM pg_roles o
             WHERE o.rolname = ANY (%s) AND NOT pg_has_role(r.oid, o.oid, 'MEMBER') ORDER BY 1)
FROM pg_roles r WHERE rolname = current_user
"""


def _locale(connection: Connection, properties: Properties) -> Requirement:
    """Try the locale by creating a collation, which loads it; the transaction is rolled back."""
    name, locale = "locale of the database", properties.locale or properties.collate
    expected = f"{properties.provider} {locale}"
    options = sql.SQL("provider = {}, ").format(sql.Identifier(properties.provider))
    if properties.provider == "libc":
        options += sql.SQL("lc_collate = {}, lc_ctype = {}").format(properties.collate, properties.ctype)
    else:
        options += sql.SQL("locale = {}").format(locale)
    hint = f"install {locale} on the server's host, then restart the server"
    try:
        with connection.transaction(force_rollback=True):
            connection.execute(sql.SQL("CREATE COLLATION pg_catalog.ops_trial ({})").format(options))
    except psycopg.errors.InsufficientPrivilege:  # reported as rights of the administrator
        return Requirement(name, True, "not tried", expected, "")
    except psycopg.errors.InvalidObjectDefinition as error:
        # The locale has another encoding than the maintenance database; CREATE DATABASE may still accept it.
        if "encoding" in first_line(error):
            return Requirement(name, True, "of another encoding", expected, "")
        return Requirement(name, False, first_line(error), expected, hint)
    except psycopg.errors.OperationalError:
        raise
    except psycopg.DatabaseError as error:
        return Requirement(name, False, first_line(error), expected, hint)
    return Requirement(name, True, "available", expected, "")


def _tablespace(connection: Connection, properties: Properties) -> Requirement:
    wanted = properties.tablespace
    there = bool(execute(connection, "SELECT 1 FROM pg_tablespace WHERE spcname = %s", wanted))
    hint = f"create it first: CREATE TABLESPACE {wanted} LOCATION '…' (globals.sql of the backup has the directory)"
    return Requirement("tablespace", there, wanted if there else "missing", wanted, hint)


def _extensions(connection: Connection, content: DatabaseContent) -> Requirement:
    rows = execute(connection, "SELECT name FROM pg_available_extensions")
    missing = sorted(set(content.extensions) - {str(row[0]) for row in rows})
    return _of_extensions(content, missing)


def _of_extensions(content: DatabaseContent, missing: list[str]) -> Requirement:
    hint = f"install the packages of {', '.join(missing)} on the server's host"
    value = f"not installed: {', '.join(missing)}" if missing else f"{len(content.extensions)} available"
    return Requirement("extensions", not missing, value, ", ".join(sorted(content.extensions)), hint)


def _connections(connection: Connection, jobs: int) -> Requirement:
    row = execute(connection, "SELECT current_setting('max_connections')::int")[0]
    most, needed = int(row[0]), jobs + OTHER_SESSIONS
    hint = f"run this with jobs={max(1, most - OTHER_SESSIONS)}, or raise max_connections"
    return Requirement("max_connections", most >= needed, str(most), f"{needed} or more for {jobs} jobs", hint)


@probe
def read_login(postgres: Postgres, server: Server, database: str, *, created: bool = False) -> tuple[Requirement, ...]:
    """Whether the application's role can log in to a database that a run restores, before it does.

    PostgreSQL authenticates before it opens the database, so the errors “does not exist” and “is not currently
    accepting connections” prove the password; pg_hba.conf is checked for the database's name
    (src/backend/utils/init/postinit.c, InitPostgres). `created`: the run creates the database, so privileges of one
    that an earlier run left there do not count.

    Raises:
        Unreachable: the server stopped answering.
    """
    name = "log-in of the application's role"
    if postgres.user not in server.roles:
        if server.is_bare:
            return ()  # the run creates it, with this password
        hint = f"create it (globals.sql of a backup may have it), or correct [postgres] user, which is {postgres.user}"
        return (Requirement(name, False, "the role does not exist", f"{postgres.user} can log in to {database}", hint),)
    hint, value = "", "accepted"
    try:
        postgres.connect(database, as_application=True).close()
    except LoginRefused as error:
        value = "accepted" if _is_admitted(error, database, created=created) else error.message
        hint = f"{error.hint}; or allow this role to connect to {database} in pg_hba.conf"
    return (Requirement(name, value == "accepted", value, f"{postgres.user} can log in to {database}", hint),)


@probe
def is_role_newer(postgres: Postgres, xid: int) -> bool:
    """Whether the application's role was dropped, or changed by the transaction `xid` or a later one.

    Raises:
        Unreachable: the server stopped answering.
    """
    query = "SELECT age(xmin) <= age(%s::text::xid) FROM pg_authid WHERE rolname = %s"
    with postgres.connect() as connection:
        rows = execute(connection, query, xid % (1 << 32), postgres.user)
    return not rows or bool(rows[0][0])


@probe
def read_superuser(postgres: Postgres) -> Requirement:
    """Whether the administrator may read every setting of a recovered copy, which isolates it, and promote it.

    Raises:
        Unreachable: the server stopped answering.
    """
    with postgres.connect() as connection:
        ((ok,),) = execute(connection, "SELECT rolsuper FROM pg_roles WHERE rolname = current_user")
    hint = "make [postgres] admin_user a superuser: the recovery reads every setting of the copy, and promotes it"
    return Requirement("rights of the administrator", bool(ok), "a superuser" if ok else "none", "a superuser", hint)


def _is_admitted(error: LoginRefused, database: str, *, created: bool) -> bool:
    """Whether the server refuses only the database, which it does after authentication.

    In an unknown language: a refusal by pg_hba.conf names that file, a missing database is named itself.
    """
    if error.sqlstate == UNKNOWN:
        text = error.message.partition(f" in database {database}: ")[2]
        return "pg_hba.conf" not in text and database in text
    return error.sqlstate in (NO_DATABASE, CLOSED) or (created and error.sqlstate == NO_RIGHT)


@probe
def read_preloads(postgres: Postgres, libraries: Sequence[str]) -> tuple[Requirement, ...]:
    """Whether the files of shared_preload_libraries exist: a server does not start without one.

    Raises:
        Unreachable: the server stopped answering.
    """
    missing = [name for name in libraries if not _loads(postgres, name)]
    value = f"not installed: {', '.join(missing)}" if missing else f"{len(libraries)} available"
    hint = f"install {', '.join(missing)} on the server's host, or remove it from shared_preload_libraries"
    return (Requirement("shared_preload_libraries", not missing, value, ", ".join(libraries), hint),) * bool(libraries)


def _loads(postgres: Postgres, library: str) -> bool:
    with postgres.connect() as connection:
        try:
            connection.execute(sql.SQL("LOAD {}").format(sql.Literal(library)))
        except psycopg.errors.UndefinedFile:
            return False
        except psycopg.errors.OperationalError:
            raise
        except psycopg.DatabaseError:  # it exists, but must be preloaded, or this role cannot load it
            return True
    return True


def _attempt(name: str, hint: str, expected: str, work: Callable[[], str]) -> Requirement:
    try:
        return Requirement(name, True, work(), expected, hint)
    except OpsError as error:
        return Requirement(name, False, error.message, expected, error.hint or hint)


def _programs(postgres: Postgres, major: int, absent: bool) -> str:
    for program in (*PROGRAMS, *(("initdb",) if absent else ())):
        postgres.program(program)
    found = program_version(postgres, "pg_restore")
    if found < major:
        raise OpsError(f"the programs in {postgres.programs} are of PostgreSQL {found}, the backup of {major}")
    return f"PostgreSQL {found}"


def _owner(user: str) -> Requirement:
    name, hint = "owner of a new data directory", f"run the worker as root or as {user}, or correct [postgres] os_user"
    try:
        account, _ = shell.owner_of(user)
    except OpsError as error:
        return Requirement(name, False, error.message, user, hint)
    me = os.geteuid()
    if me in (0, account):
        return Requirement(name, True, user, user, hint)
    with suppress(KeyError):
        return Requirement(name, False, f"this worker runs as {pwd.getpwuid(me).pw_name}", user, hint)
    return Requirement(name, False, f"this worker runs as {me}", user, hint)


def _parent(data: Path) -> Requirement:
    name, parent = "parent of a new data directory", data.resolve().parent
    if data.resolve().is_mount():
        hint = f"mount that disk at {parent}, or correct [postgres] data_directory: a mount point cannot be renamed"
        return Requirement(name, False, f"{data} is a mount point", f"a directory in {parent}", hint)
    ok = os.access(parent, os.W_OK | os.X_OK)
    hint = f"run the worker as root, or make {parent} writable for its user"
    return Requirement(name, ok, f"{parent} {'' if ok else 'not '}writable", "writable", hint)
