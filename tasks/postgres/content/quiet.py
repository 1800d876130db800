"""Sessions in a copy without event triggers: neither a guard against DDL nor a login trigger that writes.

https://www.postgresql.org/docs/current/runtime-config-client.html#GUC-EVENT-TRIGGERS
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import LiteralString

from psycopg import sql

from blocks.postgres.server import Connection, Postgres, execute

# Before 17 ENABLE ALWAYS (or REPLICA) triggers still fire: a restore creates them last, and `quiet` disables them.
# Login triggers exist since 17.
_SETTING = """
SELECT format('-c %s=%s', name, value) FROM (VALUES ('event_triggers', 'off', 170000, 990000),
    ('session_replication_role', 'replica', 150000, 170000)) AS known(name, value, since, until)
WHERE current_setting('server_version_num')::int >= since AND current_setting('server_version_num')::int < until
  AND has_parameter_privilege(name, 'SET')
"""


def copy_options(postgres: Postgres) -> str:
    """The options of such a session, as PGOPTIONS; empty if the administrator lacks the privilege.

    Only a superuser owns an event trigger, so that role could not restore one either.
    """
    with postgres.connect() as connection:
        return " ".join(str(row[0]) for row in execute(connection, _SETTING))


@contextmanager
def quiet(postgres: Postgres, database: str) -> Iterator[Connection]:
    """A transaction in a copy without event triggers, also before 17: it disables them and restores them at its end."""
    with postgres.connect(database, options=copy_options(postgres)) as connection, connection.transaction():
        execute(connection, "SET TRANSACTION READ WRITE")
        enabled = disable_event_triggers(connection)
        yield connection
        for name, how in enabled:
            execute(
                connection, sql.SQL("ALTER EVENT TRIGGER {} {}").format(sql.Identifier(name), sql.SQL(_ENABLE[how]))
            )


def disable_event_triggers(connection: Connection) -> list[tuple[str, str]]:
    """Disable all event triggers; returns their names and modes. `event_triggers = off` needs 17, and
    session_replication_role does not stop ENABLE ALWAYS."""
    found = execute(connection, "SELECT evtname, evtenabled::text FROM pg_event_trigger WHERE evtenabled <> 'D'")
    for name, _ in found:
        execute(connection, sql.SQL("ALTER EVENT TRIGGER {} DISABLE").format(sql.Identifier(name)))
    return [(str(name), str(how)) for name, how in found]


_ENABLE: dict[str, LiteralString] = {"O": "ENABLE", "A": "ENABLE ALWAYS", "R": "ENABLE REPLICA"}
