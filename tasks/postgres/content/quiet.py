"""Sessions of a copy in which no event trigger fires: neither a guard against DDL nor what writes at each log-in.

https://www.postgresql.org/docs/current/runtime-config-client.html#GUC-EVENT-TRIGGERS
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import LiteralString

from psycopg import sql

from blocks.postgres.server import Connection, Postgres, execute

# Before 17 those that are ENABLE ALWAYS (or REPLICA) fire still: a restore makes them last, and `quiet` disables them.
# Triggers at log-in came with 17.
_SETTING = """
SELECT format('-c %s=%s', name, value) FROM (VALUES ('event_triggers', 'off', 170000, 990000),
    ('session_replication_role', 'replica', 150000, 170000)) AS known(name, value, since, until)
WHERE current_setting('server_version_num')::int >= since AND current_setting('server_version_num')::int < until
  AND has_parameter_privilege(name, 'SET')
"""


def copy_options(postgres: Postgres) -> str:
    """The options of such a session, as libpq's PGOPTIONS; empty where the administrator may not set it: only a
    superuser owns an event trigger, so that role could not restore one either."""
    with postgres.connect() as connection:
        return " ".join(str(row[0]) for row in execute(connection, _SETTING))


@contextmanager
def quiet(postgres: Postgres, database: str) -> Iterator[Connection]:
    """A transaction in a copy in which none fires, on versions before 17 neither: they are disabled in it, and are
    enabled again as they were at its end."""
    with postgres.connect(database, options=copy_options(postgres)) as connection, connection.transaction():
        execute(connection, "SET TRANSACTION READ WRITE")
        enabled = disable_event_triggers(connection)
        yield connection
        for name, how in enabled:
            execute(
                connection, sql.SQL("ALTER EVENT TRIGGER {} {}").format(sql.Identifier(name), sql.SQL(_ENABLE[how]))
            )


def disable_event_triggers(connection: Connection) -> list[tuple[str, str]]:
    """Disable all; returns their names and how they were enabled. `event_triggers = off` needs 17, and
    session_replication_role leaves those that are ENABLE ALWAYS."""
    found = execute(connection, "SELECT evtname, evtenabled::text FROM pg_event_trigger WHERE evtenabled <> 'D'")
    for name, _ in found:
        execute(connection, sql.SQL("ALTER EVENT TRIGGER {} DISABLE").format(sql.Identifier(name)))
    return [(str(name), str(how)) for name, how in found]


_ENABLE: dict[str, LiteralString] = {"O": "ENABLE", "A": "ENABLE ALWAYS", "R": "ENABLE REPLICA"}
