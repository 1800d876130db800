"""Checksum failures and collation versions.

Reads only. https://www.postgresql.org/docs/current/checksums.html, …/collation.html#COLLATION-MANAGING
"""

from __future__ import annotations

from dataclasses import dataclass

from blocks.postgres.server import Postgres, execute
from runbook.kinds import probe


@dataclass(frozen=True)
class ChecksumFailures:
    """Failed checksums of one database since its statistics were reset (empty name: the shared catalogs)."""

    database: str
    count: int
    last: str


@dataclass(frozen=True)
class Checksums:
    """Whether pages have checksums, the settings that hide damage, and the failures."""

    on: bool
    hiding: tuple[str, ...]
    failures: tuple[ChecksumFailures, ...]


@dataclass(frozen=True)
class Collation:
    """A collation whose recorded version differs from its provider's: the sort order may have changed."""

    name: str
    recorded: str
    actual: str
    indexes: tuple[str, ...]


@dataclass(frozen=True)
class Collations:
    """Counts: `compared` have a recorded and a provider's version, `unversioned` have neither (C). `unrecorded`: only
    the provider has one, so the version at the index builds is unknown."""

    compared: int
    unversioned: int
    unrecorded: tuple[str, ...]
    changed: tuple[Collation, ...]


@probe
def read_checksums(postgres: Postgres) -> Checksums:
    """The checksums of the whole server.

    Raises:
        Unreachable: it is down.
    """
    with postgres.connect() as connection:
        on = execute(connection, "SELECT current_setting('data_checksums') = 'on'")[0][0]
        hiding = execute(connection, _HIDING)
        failures = execute(connection, _FAILURES)
    return Checksums(
        bool(on),
        tuple(str(row[0]) for row in hiding),
        tuple(ChecksumFailures(str(row[0]), int(row[1]), str(row[2] or "")[:19]) for row in failures),
    )


# With these, queries read a zeroed page, or one with a wrong checksum, as if it were intact.
_HIDING = """
SELECT name FROM pg_settings WHERE name IN ('zero_damaged_pages', 'ignore_checksum_failure') AND setting = 'on'
"""
_FAILURES = """
SELECT coalesce(datname, ''), checksum_failures, checksum_last_failure
FROM pg_stat_database WHERE checksum_failures > 0 ORDER BY 1
"""


@probe
def read_collations(postgres: Postgres, database: str) -> Collations:
    """The recorded versions of the database and its collations, and the provider's current ones.

    Raises:
        Unreachable: it is down.
        OpsError: there is no such database.
    """
    with postgres.connect(database) as connection:
        rows = execute(connection, _COLLATIONS)
        changed = [row for row in rows if row[1] is not None and row[1] != row[2]]
        return Collations(
            sum(row[1] is not None and row[2] is not None for row in rows),
            sum(row[1] is None and row[2] is None for row in rows),
            tuple(str(row[0]) for row in rows if row[1] is None and row[2] is not None),
            tuple(
                Collation(
                    str(row[0]),
                    str(row[1]),
                    str(row[2] or "none"),
                    tuple(str(index[0]) for index in execute(connection, _INDEXES, row[3])),
                )
                for row in changed
            ),
        )


# 100 is the database's own collation (DEFAULT_COLLATION_OID). The others only if a column uses them or a user created
# them: initdb imports hundreds of unused ones.
_COLLATIONS = """
SELECT 'database ' || datname, datcollversion, pg_database_collation_actual_version(oid), 100::oid
FROM pg_database WHERE datname = current_database()
UNION ALL
SELECT format('collation %I.%I', n.nspname, c.collname), c.collversion, pg_collation_actual_version(c.oid), c.oid
FROM pg_collation c JOIN pg_namespace n ON n.oid = c.collnamespace
WHERE c.collprovider <> 'd' AND (n.nspname <> 'pg_catalog' OR EXISTS (
    SELECT FROM pg_attribute a WHERE a.attcollation = c.oid AND a.attrelid >= 16384))
"""
_INDEXES = """
SELECT i.indexrelid::regclass::text FROM pg_index i
WHERE i.indexrelid >= 16384 AND %s::oid = ANY (i.indcollation::oid[]) ORDER BY 1
"""
