"""Sessions of a copy in which no event trigger fires: neither a guard against DDL nor what writes at each log-in.

https://www.postgresql.org/docs/current/runtime-config-client.html#GUC-EVENT-TRIGGERS
"""

from __future__ import annotations

from blocks.postgres import Postgres, execute

# Before 17 only those that are ENABLE ALWAYS (or REPLICA) fire still; triggers at log-in came with 17.
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
