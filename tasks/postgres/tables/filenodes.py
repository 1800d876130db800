"""The current files of a table, by the system catalogs: WAL identifies tables only by their files."""

from __future__ import annotations

from dataclasses import dataclass

from blocks.postgres.server import Postgres, execute
from runbook.kinds import probe
from tasks.postgres.content.pinned_session import pinned
from tasks.postgres.tables.find import find_named


@dataclass(frozen=True)
class FiledRelation:
    """A table or partition in a database (OID): its OID, its file, its TOAST table's file (0: none), and `where` it was
    found."""

    database: int
    oid: int
    name: str
    file: int
    toast: int
    where: str

    @property
    def key(self) -> tuple[int, int]:
        """Its identity in WAL records of locks and drops."""
        return (self.database, self.oid)


@probe
def find_filed(postgres: Postgres, database: str, typed: str) -> tuple[FiledRelation, ...]:
    """The files of a table and its partitions in one database.

    Raises:
        OpsError: there is no such table (the hint names similar ones), or no such database.
        Unreachable: the server does not answer.
    """
    with pinned(postgres, database) as connection:
        (table,) = find_named(connection, [typed])
        rows = execute(connection, _FILED, table.oid, table.oid)
    return tuple(
        FiledRelation(int(of), int(oid), str(name), int(file), int(toast), database)
        for of, oid, name, file, toast in rows
    )


# pg_relation_filenode, not relfilenode: it covers mapped relations too. A partitioned table has no file.
_FILED = """
SELECT d.oid::bigint, c.oid::bigint, format('%%I.%%I', n.nspname, c.relname), pg_relation_filenode(c.oid)::bigint,
       coalesce(pg_relation_filenode(nullif(c.reltoastrelid, 0)), 0)::bigint
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_database d ON d.datname = current_database()
WHERE c.relkind = 'r' AND (c.oid = %s OR c.oid IN (SELECT relid FROM pg_partition_tree(%s::bigint::oid::regclass)))
ORDER BY 3
"""


@dataclass(frozen=True)
class FiledDatabase:
    """A database's OID, 0 if it does not exist, and the place of its row: the file of pg_database, the block, the
    number in it. `invalid`: a DROP DATABASE was interrupted, and nobody can connect to it."""

    oid: int
    file: int = 0
    block: int = 0
    off: int = 0
    invalid: bool = False


@probe
def find_filed_database(postgres: Postgres, database: str) -> FiledDatabase:
    """Find a database by its name."""
    with postgres.connect() as connection:
        rows = execute(connection, _DATABASE, database)
    if not rows:
        return FiledDatabase(0)
    oid, file, place, invalid = rows[0]
    block, _, off = str(place).strip("()").partition(",")
    return FiledDatabase(int(oid), int(file), int(block), int(off), bool(invalid))


# src/include/catalog/pg_database.h: DATCONNLIMIT_INVALID_DB
_DATABASE = """
SELECT oid::bigint, pg_relation_filenode('pg_database')::bigint, ctid::text, datconnlimit = -2
FROM pg_database WHERE datname = %s
"""


@probe
def read_database_oid(postgres: Postgres, database: str) -> int:
    """A database's OID; 0 if it does not exist."""
    return find_filed_database.work(postgres, database).oid


@probe
def read_database_names(postgres: Postgres) -> dict[int, str]:
    """The names of all databases by OID."""
    with postgres.connect() as connection:
        rows = execute(connection, "SELECT oid::bigint, datname FROM pg_database")
    return {int(oid): str(name) for oid, name in rows}
