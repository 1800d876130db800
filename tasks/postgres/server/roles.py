"""Create a backup's roles and tablespaces on a server that lacks them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg import sql

from blocks.postgres.server import Connection, Postgres, execute, first_line
from runbook.errors import OpsError
from runbook.files import inside
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from runbook.shell import owner_of
from tasks.backups.catalogue import Backup
from tasks.host.disk import is_here
from tasks.postgres.dump.dump import GLOBALS
from tasks.postgres.restore.staged_copy import REPLACE
from tasks.postgres.server.requirements import Requirement
from tasks.postgres.upkeep.session import refusals


@dataclass(frozen=True)
class MadeRoles:
    """The created roles, and those of them that can log in but have no password yet."""

    names: tuple[str, ...]
    without_password: tuple[str, ...]


@action(of=lambda postgres: Act(REPLACE, postgres.database), idempotent=True)
def create_roles(postgres: Postgres, backup: Backup, existing: Sequence[str]) -> MadeRoles:
    """Create the backup's missing roles and tablespaces on a server without databases.

    Backups contain no passwords: the application's comes from the secrets. CREATE TABLESPACE runs outside a
    transaction.

    Raises:
        OpsError: a tablespace's directory is missing, or the server refuses a role.
    """
    lines = _globals(backup)
    with postgres.connect() as connection, refusals(connection):
        made = _make_roles(connection, postgres, lines, existing)
        for line in lines:
            if line.startswith(("CREATE TABLESPACE", "ALTER TABLESPACE")):
                _make_tablespace(connection, line)
    return made


@probe
def try_roles(postgres: Postgres, backup: Backup, existing: Sequence[str], *, keep: bool) -> tuple[Requirement, ...]:
    """Whether a server without databases accepts the backup's roles and tablespaces.

    The roles are created in a transaction, which is rolled back unless `keep` (a private instance); the directories are
    only checked.

    Raises:
        Unreachable: the server stopped answering.
    """
    lines, hint = _globals(backup), f"correct it in {GLOBALS} of {backup.where}, or create the roles by hand"
    expected, value = "the server creates them", "can be created"
    with postgres.connect() as connection:
        try:
            with connection.transaction(force_rollback=not keep):
                _make_roles(connection, postgres, lines, existing)
        except psycopg.errors.OperationalError:
            raise
        except psycopg.Error as error:
            value = first_line(error)
        roles = Requirement("roles of the backup", value == "can be created", value, expected, hint)
        return (roles, *_directories(postgres, connection, lines))


def _directories(postgres: Postgres, connection: Connection, lines: Sequence[str]) -> Iterator[Requirement]:
    """The directories of tablespaces to create: they exist, belong to the server's user, and no other cluster uses
    them."""
    existing = {str(row[0]) for row in execute(connection, "SELECT quote_ident(spcname) FROM pg_tablespace")}
    found = [parts for parts in map(_TABLESPACE.match, lines) if parts and parts[1] not in existing]
    places = {parts[1]: parts[2].replace("''", "'") for parts in found}
    try:
        wrong = {name: _refusal(postgres, connection, place) for name, place in places.items()}
    except psycopg.errors.InsufficientPrivilege:  # only a superuser can read files and create tablespaces
        wrong = dict.fromkeys(places, "only a superuser can create it")
    problems = "; ".join(f"{name}: {why}" for name, why in wrong.items() if why)
    hint = "create these directories, empty and owned by the server's user; move another cluster's files out of them"
    if places:
        expected = ", ".join(places.values())
        yield Requirement("directories of tablespaces", not problems, problems or "empty", expected, hint)


_TABLESPACE = re.compile(r"""CREATE TABLESPACE ("(?:[^"]|"")+"|\S+) .*?LOCATION '((?:[^']|'')*)'""")


def _refusal(postgres: Postgres, connection: Connection, place: str) -> str:
    """The error of CREATE TABLESPACE for a directory, empty if it accepts it (commands/tablespace.c)."""
    row = execute(connection, "SELECT isdir FROM pg_stat_file(%s, true)", place)
    if not row or not row[0][0]:
        return f"{place} is not a directory" if row and row[0][0] is not None else f"{place} is missing"
    if execute(connection, _IN_USE, place):
        return f"{place} is in use by another cluster"
    with suppress(OSError, OpsError):
        if is_here(postgres.host) and Path(place).stat().st_uid != owner_of(postgres.os_user)[0]:
            return f"{place} is not owned by {postgres.os_user}"
    return ""


_IN_USE = """
SELECT name FROM pg_ls_dir(%s) AS name
WHERE name = format('PG_%%s_%%s', current_setting('server_version_num')::int / 10000,
                    (SELECT catalog_version_no FROM pg_control_system()))
"""


def has_tablespaces(backup: Backup) -> bool:
    """Whether a backup's cluster had tablespaces besides its own two."""
    return any(line.startswith("CREATE TABLESPACE") for line in _globals(backup))


def _globals(backup: Backup) -> list[str]:
    return inside.read_text(backup.path / GLOBALS).splitlines()


def _make_roles(connection: Connection, postgres: Postgres, lines: Sequence[str], existing: Sequence[str]) -> MadeRoles:
    """Create them in one transaction, so that a killed run leaves none or all.

    Existing roles are not changed: the administrator's attributes can differ from those in the backup.
    """
    quoted = [str(execute(connection, "SELECT quote_ident(%s)", role)[0][0]) for role in existing]
    kept = tuple(form.format(role) for role in quoted for form in ("CREATE ROLE {};", "ALTER ROLE {} "))
    wanted = [line for line in lines if line.startswith(("CREATE ROLE ", "ALTER ROLE ", "GRANT "))]
    wanted = [line for line in wanted if not line.startswith(kept)]
    if not any(line.startswith("CREATE ROLE ") for line in wanted):
        return MadeRoles((), ())
    with connection.transaction():
        for line in wanted:
            connection.execute(line.encode())
        if postgres.user not in existing:
            secret = postgres.password.get_secret_value().encode()
            hashed = connection.pgconn.encrypt_password(secret, postgres.user.encode(), b"scram-sha-256").decode()
            connection.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(sql.Identifier(postgres.user), hashed))
        rows = execute(connection, _LOGINS, list(existing))
    return MadeRoles(tuple(str(name) for name, _ in rows), tuple(str(name) for name, lacks in rows if lacks))


_LOGINS = """
SELECT rolname, rolcanlogin AND rolpassword IS NULL FROM pg_authid
WHERE rolname !~ '^pg_' AND rolname <> ALL (%s) ORDER BY 1
"""


def _make_tablespace(connection: Connection, statement: str) -> None:
    try:
        connection.execute(statement.encode())
    except psycopg.errors.DuplicateObject:
        return
    except (psycopg.errors.UndefinedFile, psycopg.errors.ObjectInUse) as error:
        raise OpsError(
            f"a tablespace cannot be created: {error.diag.message_primary}",
            "create that directory, empty and owned by the server's user, then run this again",
        ) from None
