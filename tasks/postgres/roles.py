"""The roles and tablespaces of a backup, on a server that lacks them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psycopg
from psycopg import sql

from blocks.postgres import Connection, Postgres, execute
from runbook.errors import OpsError
from runbook.kinds import action
from runbook.permit import Permit
from tasks.catalogue import Backup
from tasks.postgres.copy import REPLACE
from tasks.postgres.dump import GLOBALS
from tasks.postgres.upkeep import refusals


@dataclass(frozen=True)
class MadeRoles:
    """The roles that were made, and those of them that may log in but have no password yet."""

    names: tuple[str, ...]
    without_password: tuple[str, ...]


@action(idempotent=True)
def create_roles(permit: Permit, postgres: Postgres, backup: Backup, existing: Sequence[str]) -> MadeRoles:
    """On a server without databases: what it lacks of the backup's roles, and its tablespaces.

    Backups hold no passwords: the application's comes from the secrets. Tablespaces cannot be made in a transaction.

    Raises:
        OpsError: a tablespace's directory is not there, or the server refuses a role.
    """
    permit.require(REPLACE, postgres.database)
    lines = (backup.path / GLOBALS).read_text(encoding="utf-8").splitlines()
    with postgres.connect() as connection, refusals(connection):
        made = _make_roles(connection, postgres, lines, existing)
        for line in lines:
            if line.startswith(("CREATE TABLESPACE", "ALTER TABLESPACE")):
                _make_tablespace(connection, line)
    return made


def _make_roles(connection: Connection, postgres: Postgres, lines: Sequence[str], existing: Sequence[str]) -> MadeRoles:
    """In one transaction, so that a run that is killed leaves none or all of them. Those that are there stay as they
    are: the administrator's attributes may be others here than where the backup was taken."""
    quoted = [str(execute(connection, "SELECT quote_ident(%s)", role)[0][0]) for role in existing]
    there = tuple(form.format(role) for role in quoted for form in ("CREATE ROLE {};", "ALTER ROLE {} "))
    wanted = [line for line in lines if line.startswith(("CREATE ROLE ", "ALTER ROLE ", "GRANT "))]
    wanted = [line for line in wanted if not line.startswith(there)]
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
            f"a tablespace cannot be made: {error.diag.message_primary}",
            "create that directory, empty and the server's user's, and launch this again",
        ) from None
