"""Subscriptions of a copied database: a dump creates them with the slot of the original, which is not the copy's.

https://www.postgresql.org/docs/current/logical-replication-subscription.html#LOGICAL-REPLICATION-SUBSCRIPTION-SLOT
"""

from __future__ import annotations

from psycopg import sql

from blocks.postgres.server import Connection, Postgres, execute
from tasks.postgres.content.quiet import quiet


def find_subscriptions(connection: Connection, database: str) -> tuple[str, ...]:
    """Their names, from a session in any database."""
    return tuple(str(name) for (name,) in execute(connection, _SUBSCRIPTIONS, database))


_SUBSCRIPTIONS = """
SELECT subname FROM pg_subscription s JOIN pg_database d ON d.oid = s.subdbid WHERE d.datname = %s ORDER BY 1
"""


def detach_subscriptions(postgres: Postgres, database: str, *, dropped: bool = False) -> tuple[str, ...]:
    """Disable a copy's subscriptions and take their slots from them, so that dropping them leaves the publisher's slot
    alone; `dropped`: drop them too, without which the database cannot be dropped. Returns their names."""
    with postgres.connect() as connection:
        names = find_subscriptions(connection, database)
    if not names:
        return ()
    with quiet(postgres, database) as connection:
        for name in map(sql.Identifier, names):
            connection.execute(sql.SQL("ALTER SUBSCRIPTION {} DISABLE").format(name))
            connection.execute(sql.SQL("ALTER SUBSCRIPTION {} SET (slot_name = NONE)").format(name))
            if dropped:
                connection.execute(sql.SQL("DROP SUBSCRIPTION {}").format(name))
    return names
