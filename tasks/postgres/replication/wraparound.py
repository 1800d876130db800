"""The distance of transaction ids to wraparound.

https://www.postgresql.org/docs/current/routine-vacuuming.html#VACUUM-FOR-WRAPAROUND
"""

from __future__ import annotations

from dataclasses import dataclass

from blocks.postgres.server import Postgres, execute
from runbook.kinds import probe

# The server refuses new transactions 3 million before 2^31 (xidStopLimit).
STOP_AGE = 2**31 - 3_000_000
MOST_TABLES = 20


@dataclass(frozen=True)
class DatabaseAge:
    """The age of the oldest row that is not frozen, in transaction ids and multixacts."""

    name: str
    xids: int
    multixacts: int
    bytes: int
    temporary: bool

    @property
    def oldest(self) -> int:
        """The higher of both."""
        return max(self.xids, self.multixacts)


@dataclass(frozen=True)
class Wraparound:
    """Ages, the oldest first; `tables`: of one database. The limits are the server's settings."""

    freeze_max_age: int
    multixact_freeze_max_age: int
    databases: tuple[DatabaseAge, ...]
    tables: tuple[DatabaseAge, ...]


@probe
def read_wraparound(postgres: Postgres, database: str) -> Wraparound:
    """Ages of all databases, and of the oldest tables (TOAST included) of one.

    Raises:
        Unreachable: it is down.
        OpsError: there is no such database.
    """
    with postgres.connect(database) as connection:
        limits = execute(connection, _LIMITS)[0]
        databases = tuple(
            DatabaseAge(str(r[0]), int(r[1]), int(r[2]), 0, False) for r in execute(connection, _DATABASES)
        )
        tables = tuple(
            DatabaseAge(str(r[0]), int(r[1]), int(r[2]), int(r[3]), bool(r[4]))
            for r in execute(connection, _TABLES, MOST_TABLES)
        )
    return Wraparound(int(limits[0]), int(limits[1]), databases, tables)


_LIMITS = """
SELECT current_setting('autovacuum_freeze_max_age'), current_setting('autovacuum_multixact_freeze_max_age')
"""
_DATABASES = """
SELECT datname, age(datfrozenxid), mxid_age(datminmxid) FROM pg_database
ORDER BY greatest(age(datfrozenxid), mxid_age(datminmxid)) DESC
"""
# relpages: a size function would wait for the lock of a table during its rewrite.
_TABLES = """
SELECT format('%%I.%%I', n.nspname, c.relname), greatest(age(c.relfrozenxid), age(t.relfrozenxid)) AS xids,
       greatest(mxid_age(c.relminmxid), mxid_age(t.relminmxid)) AS multixacts,
       (c.relpages + coalesce(t.relpages, 0)) * current_setting('block_size')::bigint, c.relpersistence = 't'
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_class t ON t.oid = c.reltoastrelid
WHERE c.relkind IN ('r', 'm') AND c.relfrozenxid <> '0'::xid
ORDER BY greatest(age(c.relfrozenxid), age(t.relfrozenxid), mxid_age(c.relminmxid), mxid_age(t.relminmxid)) DESC,
         c.relpages DESC
LIMIT %s
"""
