"""The manual's settings on the server (§1.3, §1.5), and their change by ALTER SYSTEM.

https://www.postgresql.org/docs/current/view-pg-settings.html
https://www.postgresql.org/docs/current/sql-altersystem.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psycopg
from psycopg import sql

from blocks.postgres.server import Connection, Postgres, execute
from runbook.errors import OpsError, Unreachable
from runbook.failpoint import failpoint
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from runbook.wait import until
from tasks.postgres.server.recommended import MANUAL, RecommendedSetting

CHANGE, RELOAD = "alter system", "reload"
RELOAD_SECONDS = 15


@dataclass(frozen=True)
class Narrower:
    """A value of one database or role, which overrides the server's."""

    where: str
    name: str
    value: str


@dataclass(frozen=True)
class PostgresServerSettings:
    """The manual's settings on the server, overrides of databases and roles, and facts that limit a change."""

    by_name: Mapping[str, RecommendedSetting]
    narrower: tuple[Narrower, ...]
    file_errors: tuple[str, ...]
    system_identifier: str
    in_recovery: bool
    standbys: int
    clients: int
    reserved: int

    @property
    def identity(self) -> str:
        """The cluster's identifier; a standby has its primary's."""
        return self.system_identifier

    def is_written(self, name: str, value: str | None) -> bool:
        """Whether ALTER SYSTEM's file has this value; None: whether it has none."""
        setting = self.by_name.get(name)
        return setting is not None and (setting.auto is None if value is None else setting.is_filed(value))

    def shown(self, name: str, value: str | None = None) -> str:
        """The value, by default that of ALTER SYSTEM's file."""
        return value if value is not None else self.by_name[name].auto or "reset"


@dataclass(frozen=True)
class PostgresSettingChange:
    """The value for ALTER SYSTEM; None resets it, so that postgresql.conf applies again."""

    name: str
    value: str | None

    def __str__(self) -> str:
        return f"{self.name} = {self.value}" if self.value is not None else f"{self.name} (reset)"


@probe
def read_settings(postgres: Postgres) -> PostgresServerSettings:
    """The 19 settings of §1.3 and §1.5.

    Raises:
        Unreachable: the server does not answer.
        OpsError: this login cannot read pg_file_settings.
    """
    try:
        with postgres.connect() as connection:
            return _read(connection)
    except psycopg.errors.InsufficientPrivilege:
        hint = "use a superuser as admin_user"
        raise OpsError(f"{postgres.admin_user} cannot read pg_file_settings", hint) from None


def _read(connection: Connection) -> PostgresServerSettings:
    rows = execute(connection, _SETTINGS, list(MANUAL))
    narrower = execute(connection, _NARROWER_ROWS, list(MANUAL))
    errors = execute(connection, _FILE_ERRORS)
    identifier, in_recovery, standbys, clients, reserved = execute(connection, _SERVER)[0]
    return PostgresServerSettings(
        {str(row[0]): RecommendedSetting(*row) for row in rows},
        tuple(Narrower(*row) for row in narrower),
        tuple(str(row[0]) for row in errors),
        str(identifier),
        bool(in_recovery),
        int(standbys),
        int(clients),
        int(reserved),
    )


_SETTINGS = """
SELECT s.name, current_setting(s.name), s.setting, coalesce(s.unit, ''), s.vartype, s.context, s.source,
       s.pending_restart, coalesce(s.min_val, ''), coalesce(s.max_val, ''),
       coalesce((SELECT f.setting FROM pg_file_settings f WHERE f.name = s.name ORDER BY f.seqno DESC LIMIT 1), ''),
       (SELECT f.setting FROM pg_file_settings f
        WHERE f.name = s.name AND f.sourcefile LIKE '%%/postgresql.auto.conf' ORDER BY f.seqno DESC LIMIT 1)
FROM pg_settings s WHERE s.name = ANY(%s)
"""
_NARROWER_ROWS = """
SELECT coalesce('role ' || r.rolname, '') || CASE WHEN r.oid IS NOT NULL AND d.oid IS NOT NULL THEN ' in ' ELSE '' END
       || coalesce('database ' || d.datname, ''),
       split_part(c.entry, '=', 1), substr(c.entry, strpos(c.entry, '=') + 1)
FROM pg_db_role_setting s CROSS JOIN LATERAL unnest(s.setconfig) AS c (entry)
LEFT JOIN pg_roles r ON r.oid = s.setrole LEFT JOIN pg_database d ON d.oid = s.setdatabase
WHERE split_part(c.entry, '=', 1) = ANY(%s) ORDER BY 1, 2
"""
# pg_file_settings lists a setting that needs a restart as an error too, without its name if it was removed.
_FILE_ERRORS = """
SELECT format('%s:%s %s: %s', f.sourcefile, f.sourceline, coalesce(f.name, ''), f.error) FROM pg_file_settings f
WHERE f.error IS NOT NULL AND NOT EXISTS (
    SELECT FROM pg_settings s WHERE s.context = 'postmaster' AND s.pending_restart
      AND (s.name = f.name OR f.sourcefile IS NULL AND strpos(f.error, format('"%s"', s.name)) > 0))
ORDER BY f.seqno
"""
_SERVER = """
SELECT (SELECT system_identifier FROM pg_control_system()), pg_is_in_recovery(),
       (SELECT count(*) FROM pg_stat_replication),
       (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'),
       current_setting('superuser_reserved_connections')::int
       + coalesce(current_setting('reserved_connections', true), '0')::int
"""


@action(of=lambda changes: [Act(CHANGE, what) for what in (*map(str, changes), RELOAD)], idempotent=True)
def alter_system(postgres: Postgres, changes: Sequence[PostgresSettingChange]) -> tuple[RecommendedSetting, ...]:
    """Write each change, reload, and wait until changes without a restart are in effect; returns the settings.

    A killed run leaves complete lines in postgresql.auto.conf (the server replaces the file), some not yet loaded: the
    next run writes the rest and reloads.

    Raises:
        OpsError: the server refuses a value, or does not reload it.
    """
    try:
        _write(postgres, changes)
    except Unreachable as error:
        hint = "start it, then run this again: it writes the missing settings"
        raise Unreachable(f"while writing settings: {error.message}", hint) from None
    names = [change.name for change in changes]
    until(
        lambda: all(_is_loaded(setting) for setting in _settings(postgres, names)),
        what=f"the reload of {', '.join(names)}",
        seconds=RELOAD_SECONDS,
        hint="check the server's log: an error in a configuration file stops the reload",
    )
    return _settings(postgres, names)


def _write(postgres: Postgres, changes: Sequence[PostgresSettingChange]) -> None:
    with postgres.connect() as connection:
        for change in changes:
            _alter(connection, change)
            failpoint("settings: written")
        execute(connection, "SELECT pg_reload_conf()")


def _is_loaded(setting: RecommendedSetting) -> bool:
    if setting.is_fixed or setting.is_narrower or setting.pending_restart:
        return True
    return setting.is_value(setting.filed) if setting.filed else setting.source != "configuration file"


def _settings(postgres: Postgres, names: Sequence[str]) -> tuple[RecommendedSetting, ...]:
    """Read in a new session: an old one applies a reload only between its statements."""
    with postgres.connect() as connection:
        return tuple(RecommendedSetting(*row) for row in execute(connection, _SETTINGS, list(names)))


def _alter(connection: Connection, change: PostgresSettingChange) -> None:
    name = sql.Identifier(change.name)
    try:
        if change.value is None:
            connection.execute(sql.SQL("ALTER SYSTEM RESET {}").format(name))
        else:
            connection.execute(sql.SQL("ALTER SYSTEM SET {} = {}").format(name, sql.Literal(change.value)))
    except psycopg.Error as error:
        if error.sqlstate is None or error.sqlstate.startswith("57P"):  # the server stopped
            raise
        what = error.diag.message_primary or type(error).__name__
        raise OpsError(f"the server refuses {change}: {what}", "correct it and run this again") from None
