"""Access to a PostgreSQL server: its roles, and their privileges in the application's database.

https://www.postgresql.org/docs/current/view-pg-roles.html
https://www.postgresql.org/docs/current/ddl-priv.html
"""

from __future__ import annotations

from dataclasses import dataclass

from blocks.postgres.server import Postgres, execute
from runbook.kinds import probe


@dataclass(frozen=True)
class Role:
    """One role, without its password. `attributes`: superuser, createdb …; `of`: the roles that it is a member of."""

    name: str
    attributes: tuple[str, ...]
    of: tuple[str, ...]
    connections: int
    valid_until: str
    has_password: bool | None


@dataclass(frozen=True)
class Right:
    """A role's privilege on relations of a schema: their number, and one by name."""

    role: str
    schema: str
    privilege: str
    relations: int
    one: str


@dataclass(frozen=True)
class AccessSetting:
    """A setting that differs from the server's default, and its source."""

    name: str
    value: str
    source: str


@dataclass(frozen=True)
class ServerAccess:
    """Access to one server and one database. `rules`: lines of pg_hba.conf, empty if this login cannot read them."""

    roles: tuple[Role, ...]
    rights: tuple[Right, ...]
    rules: tuple[str, ...]
    settings: tuple[AccessSetting, ...]


@probe
def read_access(postgres: Postgres) -> ServerAccess:
    """Roles, rights on tables and views, the rules of pg_hba.conf, and settings that differ from the defaults.

    Raises:
        Unreachable: the server does not answer.
        OpsError: this login cannot read it.
    """
    with postgres.connect(postgres.database, as_configured=True) as connection:
        superuser = bool(execute(connection, "SELECT rolsuper FROM pg_roles WHERE rolname = current_user")[0][0])
        with_password = {str(row[0]) for row in execute(connection, _PASSWORDS)} if superuser else set[str]()
        roles = tuple(
            Role(
                str(row[0]),
                tuple(row[1]),
                tuple(row[2]),
                int(row[3]),
                str(row[4] or ""),
                str(row[0]) in with_password if superuser else None,
            )
            for row in execute(connection, _ROLES)
        )
        rights = tuple(
            Right(str(row[0]), str(row[1]), str(row[2]), int(row[3]), str(row[4]))
            for row in execute(connection, _RIGHTS)
        )
        rules = tuple(str(row[0]) for row in execute(connection, _RULES)) if superuser else ()
        return ServerAccess(
            roles, rights, rules, tuple(AccessSetting(*map(str, row)) for row in execute(connection, _SETTINGS))
        )


_PASSWORDS = "SELECT rolname FROM pg_authid WHERE rolpassword IS NOT NULL"
_ROLES = """
SELECT rolname,
       array_remove(ARRAY[CASE WHEN rolsuper THEN 'superuser' END, CASE WHEN rolcreaterole THEN 'createrole' END,
                          CASE WHEN rolcreatedb THEN 'createdb' END, CASE WHEN rolreplication THEN 'replication' END,
                          CASE WHEN rolbypassrls THEN 'bypassrls' END, CASE WHEN rolcanlogin THEN 'login' END], NULL),
       ARRAY(SELECT granted.rolname::text FROM pg_auth_members JOIN pg_roles granted ON granted.oid = roleid
             WHERE member = pg_roles.oid ORDER BY 1),
       rolconnlimit, rolvaliduntil::text
FROM pg_roles WHERE rolname !~ '^pg_' ORDER BY 1
"""
_RIGHTS = """
SELECT CASE WHEN grantee = 0 THEN 'PUBLIC' ELSE grantee::regrole::text END, nspname, privilege_type, count(*),
       min(relname)
FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace,
     aclexplode(coalesce(relacl, acldefault('r', relowner)))
WHERE relkind IN ('r', 'p', 'v', 'm', 'f') AND nspname <> 'information_schema' AND nspname !~ '^pg_'
GROUP BY 1, 2, 3 ORDER BY 1, 2, 3
"""
_RULES = """
SELECT concat_ws(' ', type, array_to_string(database, ','), array_to_string(user_name, ','), address, netmask,
                 auth_method, error)
FROM pg_hba_file_rules ORDER BY line_number
"""
# A connection string can contain a password.
_SETTINGS = """
SELECT name, CASE WHEN name IN ('primary_conninfo', 'ssl_passphrase_command') THEN '(not shown)'
       ELSE current_setting(name) END, source
FROM pg_settings WHERE source NOT IN ('default', 'override', 'client', 'session') ORDER BY name
"""
