"""Block an application's writes: its roles begin every transaction in this database read-only.

Blocked: every new transaction of these roles; open ones end with their sessions. Not blocked: a client that sends BEGIN
READ WRITE or SET, prepared transactions that somebody commits, superusers, subscriptions. PostgreSQL has no stronger
way that keeps readers working and can be undone exactly: revoked privileges can be granted again by the tables' owner,
which the application is.
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
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from runbook.wait import until

BLOCK, LET_IN = "block writes of role", "let in writes of role"
SETTING = "default_transaction_read_only"
END_SECONDS = 20.0
QUIET_LOOKS = 10  # a tenth of a second apart


@dataclass(frozen=True)
class WritingRole:
    """A role that can write to the database, its setting ("" if there is none), and its sessions."""

    role: str
    setting: str
    sessions: int


@dataclass(frozen=True)
class Writers:
    """Every role that can write; and what cannot be blocked: superusers, prepared transactions, subscriptions."""

    roles: tuple[WritingRole, ...]
    superusers: int
    prepared: tuple[str, ...]
    subscriptions: tuple[str, ...]


@probe
def find_writers(postgres: Postgres) -> Writers:
    """Which roles can write.

    Raises:
        Unreachable: the server is down.
    """
    with postgres.connect(postgres.database) as connection:
        rows = execute(connection, _WRITERS)
        superusers = execute(connection, _SUPERUSERS)[0][0]
        prepared = execute(connection, "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()")
        subscriptions = execute(connection, _SUBSCRIPTIONS)
    return Writers(
        tuple(WritingRole(str(role), str(setting), int(sessions)) for role, setting, sessions in rows),
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


@action(of=lambda role: Act(BLOCK, role), idempotent=True)
def block_writes(postgres: Postgres, role: str) -> int:
    """Make a role's transactions in the database read-only, and end its earlier sessions. Returns how many are left:
    their commits wait for a standby, and must not be cancelled."""
    return _set(postgres, role, "on")


@action(of=lambda role: Act(LET_IN, role), idempotent=True)
def let_in(postgres: Postgres, role: str, before: str) -> str:
    """Restore a role's setting ("": none), and end its sessions, which would stay read-only.

    Returns the reason if the setting was changed since, and is therefore kept; else "".
    """
    found = [one.setting for one in find_writers.work(postgres).roles if one.role == role]
    if found != ["on"]:
        return (
            f"{role} has {SETTING}={found[0] or 'nothing'} by now: unchanged"
            if found
            else f"{role} cannot write any more"
        )
    _set(postgres, role, before)
    return ""


def _set(postgres: Postgres, role: str, value: str) -> int:
    with postgres.connect(postgres.database) as connection:
        # The commit of ALTER ROLE must not wait for a dead standby.
        execute(connection, "SET synchronous_commit = local")
        names = {"role": sql.Identifier(role), "database": sql.Identifier(postgres.database)}
        statement = _SET if value else _RESET
        execute(connection, statement.format(setting=sql.Identifier(SETTING), value=sql.Literal(value), **names))
        failpoint("writes: set")
        began = execute(connection, "SELECT clock_timestamp()")[0][0]
        return _end_all(connection, role, began)


def _end_all(connection: Connection, role: str, began: object) -> int:
    """End the sessions that began before; returns how many are left. A session that is logging in is not visible yet,
    and may have read the old setting: it is over when none was seen for a while."""
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
    """End earlier sessions, except those that wait for a standby: a cancelled wait answers “committed”. Returns how
    many there were."""
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
    """Try to create a temporary table as the application's role in a new session. Returns the refusal, "" if it worked.

    Raises:
        OpsError, Unreachable: it could not log in.
    """
    with postgres.connect(postgres.database, as_application=True) as connection:
        try:
            execute(connection, "CREATE TEMPORARY TABLE ops_probe ()")
        except errors.ReadOnlySqlTransaction as error:
            return str(error).splitlines()[0]
        except psycopg.Error as error:
            raise OpsError(
                f"the write block could not be tested: {error}", "try to write as the application by hand"
            ) from None
    return ""
