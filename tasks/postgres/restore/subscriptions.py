"""Subscriptions of a copied database: a dump creates them with the original's slot.

https://www.postgresql.org/docs/current/logical-replication-subscription.html#LOGICAL-REPLICATION-SUBSCRIPTION-SLOT
"""

from __future__ import annotations

from psycopg import sql

from blocks.postgres.server import Connection, Postgres, execute
from tasks.postgres.content.quiet import quiet


def find_subscriptions(connection: Connection, database: str) -> tuple[str, ...]:
    """The names of a database's subscriptions, read in any database's session."""
    return tuple(str(name) for (name,) in execute(connection, _SUBSCRIPTIONS, database))


_SUBSCRIPTIONS = """
SELECT subname FROM pg_subscription s JOIN pg_database d ON d.oid = s.subdbid WHERE d.datname = %s ORDER BY 1
"""


def detach_subscriptions(postgres: Postgres, database: str, *, dropped: bool = False) -> tuple[str, ...]:
    """Disable a copy's subscriptions and detach their slots, so that dropping them keeps the publisher's slot.

    `dropped`: drop them too, which DROP DATABASE requires. Returns their names.
    """
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
