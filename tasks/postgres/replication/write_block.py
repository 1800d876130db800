"""Writes of an application held off, and let in again: its roles begin every transaction read-only in this database.

What it stops: every new transaction of these roles, whatever client begins it; those that are open are ended with their
sessions. What it does not stop: a client that asks for a writing transaction by name (BEGIN READ WRITE, SET), prepared
transactions that somebody commits, superusers, subscriptions. PostgreSQL has no stronger way that leaves readers alone
and can be taken back exactly: privileges can be granted again by the tables' owner, which the application is.
https://www.postgresql.org/docs/current/runtime-config-client.html#GUC-DEFAULT-TRANSACTION-READ-ONLY
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import psycopg
from psycopg import errors, sql

from blocks.postgres.server import Connection, Postgres, execute
from runbook.errors import OpsError, Unreachable
from runbook.failpoint import failpoint
from runbook.guard.permit import Permit
from runbook.kinds import action, probe
from runbook.wait import until

BLOCK, LET_IN = "block writes of role", "let in writes of role"
SETTING = "default_transaction_read_only"
END_SECONDS = 20.0
QUIET_LOOKS = 10  # a tenth of a second apart


@dataclass(frozen=True)
class Writer:
    """A role that may write in the database, what its setting there is ("" where none), and its sessions."""

    role: str
    setting: str
    sessions: int


@dataclass(frozen=True)
class Writers:
    """All of them, and what cannot be held off: sessions of superusers, prepared transactions, subscriptions."""

    roles: tuple[Writer, ...]
    superusers: int
    prepared: tuple[str, ...]
    subscriptions: tuple[str, ...]


@probe
def find_writers(postgres: Postgres) -> Writers:
    """Who may write.

    Raises:
        Unreachable: the server is down: nobody writes.
    """
    with postgres.connect(postgres.database) as connection:
        rows = execute(connection, _WRITERS)
        superusers = execute(connection, _SUPERUSERS)[0][0]
        prepared = execute(connection, "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()")
        subscriptions = execute(connection, _SUBSCRIPTIONS)
    return Writers(
        tuple(Writer(str(role), str(setting), int(sessions)) for role, setting, sessions in rows),
        int(superusers),
        tuple(str(row[0]) for row in prepared),
        tuple(str(row[0]) for row in subscriptions),
    )


_WRITERS = """
SELECT r.rolname,
       coalesce((SELECT split_part(entry, '=', 2) FROM pg_db_role_setting s, unnest(s.setconfig) AS entry
                 WHERE s.setrole = r.oid AND s.setdatabase = d.oid
                   AND entry LIKE 'default_transaction_read_only=%'), ''),
       (SELECT count(*) FROM pg_stat_activity a WHERE a.datid = d.oid AND a.usesysid = r.oid
                                                 AND a.backend_type = 'client backend')
FROM pg_roles r, pg_database d
WHERE d.datname = current_database() AND r.rolcanlogin AND NOT r.rolsuper AND (
    d.datdba = r.oid
    OR EXISTS (SELECT FROM pg_namespace n WHERE n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
                                           AND has_schema_privilege(r.oid, n.oid, 'CREATE'))
    OR EXISTS (SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
               WHERE c.relkind IN ('r', 'p', 'f', 'v') AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
                 AND (has_any_column_privilege(r.oid, c.oid, 'INSERT, UPDATE')
                      OR has_table_privilege(r.oid, c.oid, 'DELETE, TRUNCATE'))))
ORDER BY 1
"""
_SUPERUSERS = """
SELECT count(*) FROM pg_stat_activity a JOIN pg_roles r ON r.oid = a.usesysid
WHERE a.datname = current_database() AND r.rolsuper AND a.backend_type = 'client backend'
  AND a.application_name <> 'interview-ops'
"""
_SUBSCRIPTIONS = """
SELECT subname FROM pg_subscription s JOIN pg_database d ON d.oid = s.subdbid
WHERE d.datname = current_database() AND s.subenabled ORDER BY 1
"""


@action(idempotent=True)
def block_writes(permit: Permit, postgres: Postgres, role: str) -> int:
    """Make a role's transactions in the database read-only, and end its sessions that began before that; returns how
    many are left: those that wait for a standby to confirm a commit, which nobody may cancel."""
    permit.require(BLOCK, role)
    return _turn(postgres, role, "on")


@action(idempotent=True)
def let_in(permit: Permit, postgres: Postgres, role: str, before: str) -> str:
    """Give a role back what it had ("": nothing), and end its sessions: those that began meanwhile stay read-only.

    Returns why not, where somebody has set something else since.
    """
    permit.require(LET_IN, role)
    found = [one.setting for one in find_writers.work(postgres).roles if one.role == role]
    if found != ["on"]:
        return f"{role} has {SETTING}={found[0] or 'nothing'} by now" if found else f"{role} may not write any more"
    _turn(postgres, role, before)
    return ""


def _turn(postgres: Postgres, role: str, value: str) -> int:
    with postgres.connect(postgres.database) as connection:
        # A commit that waits for a dead standby must not hold this up.
        execute(connection, "SET synchronous_commit = local")
        names = {"role": sql.Identifier(role), "database": sql.Identifier(postgres.database)}
        statement = _SET if value else _RESET
        execute(connection, statement.format(setting=sql.Identifier(SETTING), value=sql.Literal(value), **names))
        failpoint("writes: set")
        began = execute(connection, "SELECT clock_timestamp()")[0][0]
        return _end_all(connection, role, began)


def _end_all(connection: Connection, role: str, began: object) -> int:
    """End the sessions that began before; returns how many are left. One that was still logging in is not to be seen at
    first, and may have read the setting as it was: it counts as over when none has been seen for a while."""
    left = quiet = 0

    def over() -> bool:
        nonlocal left, quiet
        left = _end(connection, role, began)
        quiet = 0 if left else quiet + 1
        return quiet >= QUIET_LOOKS

    with contextlib.suppress(Unreachable):
        until(over, what=f"the end of {role}'s sessions", seconds=END_SECONDS)
    return left


_SET = sql.SQL("ALTER ROLE {role} IN DATABASE {database} SET {setting} = {value}")
_RESET = sql.SQL("ALTER ROLE {role} IN DATABASE {database} RESET {setting}")


def _end(connection: Connection, role: str, began: object) -> int:
    """Ask those that began before to end, but for those that wait for a standby: a cancelled wait answers “committed”.
    Returns how many there were."""
    execute(connection, _END, role, began)
    return int(execute(connection, _LEFT, role, began)[0][0])


_END = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND usename = %s AND backend_start < %s AND backend_type = 'client backend'
  AND wait_event IS DISTINCT FROM 'SyncRep'
"""
_LEFT = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND usename = %s AND backend_start < %s AND backend_type = 'client backend'
"""


@probe
def try_to_write(postgres: Postgres) -> str:
    """Try, as the application's role, in a new session: what refuses it, "" where it could write (a temporary table
    only).

    Raises:
        OpsError, Unreachable: it could not log in.
    """
    with postgres.connect(postgres.database, as_application=True) as connection:
        try:
            execute(connection, "CREATE TEMPORARY TABLE ops_probe ()")
        except errors.ReadOnlySqlTransaction as error:
            return str(error).splitlines()[0]
        except psycopg.Error as error:
            raise OpsError(f"that writes are refused could not be proven: {error}", "look by hand") from None
    return ""
