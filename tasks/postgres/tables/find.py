"""Find tables by the names that an operator enters, and sum their rows.

A partitioned table counts as one table, with all its partitions.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from psycopg import sql

from blocks.postgres.server import Connection, Postgres, execute
from runbook.errors import OpsError
from runbook.kinds import probe
from tasks.postgres.content.pinned_session import pinned
from tasks.postgres.content.rowhash import row_hash
from tasks.postgres.content.sums import TableSum
from tasks.wal.reading.transactions import Pair

NO_TABLE = {
    "v": "a view: restore its tables instead",
    "m": "a materialised view: restore its tables, then REFRESH MATERIALIZED VIEW",
    "f": "a foreign table: its rows are on another server",
    "S": "a sequence: set it with setval; a restored table's sequences are advanced with it",
}


@dataclass(frozen=True)
class FoundColumn:
    """A column. `generated`: its expression, empty for an ordinary column; `is_text`: printed without an output
    function."""

    name: str
    type: str
    generated: str
    is_text: bool


@dataclass(frozen=True)
class FoundTable:
    """A table, or a partitioned one with all its leaves. `name`: quoted as PostgreSQL prints it.

    `leaves`: the names under which a manifest can count each leaf's rows, its own and its ancestors'.
    `uncompared`: generated columns whose values a person accepted as computed anew.
    """

    oid: int
    schema: str
    relation: str
    name: str
    partitioned: bool
    columns: tuple[FoundColumn, ...]
    leaves: tuple[tuple[str, ...], ...]
    bytes: int
    uncompared: frozenset[str] = frozenset()

    @property
    def rows_of(self) -> sql.Composed:
        """The FROM clause: all rows of partitions, none of inheritance children."""
        only = sql.SQL("" if self.partitioned else "ONLY ")
        return only + sql.Identifier(self.schema, self.relation)

    @property
    def written(self) -> sql.Composed:
        """The columns to write; PostgreSQL computes the others."""
        return sql.SQL(", ").join(sql.Identifier(column.name) for column in self.columns if not column.generated)


@dataclass(frozen=True)
class Known:
    """A relation. `bare`, `name`: quoted, without and with the schema. `root`: the partitioned parent."""

    oid: int
    schema: str
    relation: str
    bare: str
    name: str
    kind: str
    root: str

    def is_called(self, typed: str) -> bool:
        """Whether this is its name with the schema, quoted or not."""
        return typed in (self.name, f"{self.schema}.{self.relation}")

    def is_called_bare(self, typed: str) -> bool:
        """Whether this is its name without the schema."""
        return typed in (self.relation, self.bare)


def known_in(connection: Connection, typed: Sequence[str] | None = None) -> list[Known]:
    """Every table, view and sequence outside the system's schemas. `typed`: only those that an operator may mean by
    one of these names."""
    rows = execute(connection, _KNOWN, None if typed is None else [name.strip() for name in typed])
    return [Known(int(row[0]), *(str(part) for part in row[1:])) for row in rows]


def find_named(connection: Connection, typed: Sequence[str]) -> list[Known]:
    """The tables that an operator named, each once. All tables are read only to propose another name.

    Raises:
        OpsError: see `resolve`.
    """
    try:
        return resolve(typed, known_in(connection, typed))
    except OpsError:
        return resolve(typed, known_in(connection))


_KNOWN = """
SELECT c.oid::bigint, n.nspname, c.relname, quote_ident(c.relname), format('%%I.%%I', n.nspname, c.relname),
       c.relkind::text, CASE WHEN c.relispartition THEN pg_partition_root(c.oid)::regclass::text ELSE '' END
FROM (SELECT %s::text[] AS names) named, pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S') AND c.relpersistence <> 't'
  AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
  AND (names IS NULL OR ARRAY[c.relname::text, quote_ident(c.relname), n.nspname || '.' || c.relname,
                              format('%%I.%%I', n.nspname, c.relname)] && names)
ORDER BY 5
"""


def resolve(typed: Sequence[str], known: Sequence[Known]) -> list[Known]:
    """The tables that an operator named, each once.

    Raises:
        OpsError: there is no such table, it is in several schemas, or it has no own rows.
    """
    chosen = {table.oid: table for table in (_one(text.strip(), known) for text in typed)}
    if not chosen:
        raise OpsError("no table was named", "name the tables to restore, as schema.table")
    return list(chosen.values())


def _one(typed: str, known: Sequence[Known]) -> Known:
    found = [table for table in known if table.is_called(typed)] or [
        table for table in known if table.is_called_bare(typed)
    ]
    if not found:
        names = {form: table.name for table in known for form in (table.name, table.relation) if table.kind in "rp"}
        near = dict.fromkeys(names[form] for form in difflib.get_close_matches(typed, names, 5, 0.5))
        hint = f"did you mean {', '.join(near)}?" if near else "see the tables in the report of backup-database"
        raise OpsError(f"there is no table “{typed[:80]}” in the backup", hint)
    if len(found) > 1:
        names_found = ", ".join(table.name for table in found)
        raise OpsError(f"table {typed} is in several schemas: {names_found}", "enter it with its schema")
    (table,) = found
    if table.kind in NO_TABLE:
        raise OpsError(f"{table.name} is {NO_TABLE[table.kind]}", "name tables only")
    if table.root:
        hint = f"name {table.root}: its partitions are restored together"
        raise OpsError(f"{table.name} is a partition of {table.root}", hint)
    return table


def table_of(connection: Connection, known: Known) -> FoundTable:
    """A known table with its columns and leaves, read in a session with an empty search path."""
    columns = [FoundColumn(str(a), str(b), str(c), bool(d)) for a, b, c, d in execute(connection, _COLUMNS, known.oid)]
    if not any(not column.generated for column in columns):
        raise OpsError(f"{known.name} has no columns to restore", "leave it out")
    leaves = tuple(tuple(map(str, row[0])) for row in execute(connection, _LEAVES, known.oid))
    size = int(execute(connection, _BYTES, known.oid)[0][0])
    return FoundTable(
        known.oid, known.schema, known.relation, known.name, known.kind == "p", tuple(columns), leaves, size
    )


_COLUMNS = """
SELECT a.attname, format_type(a.atttypid, a.atttypmod),
       CASE WHEN a.attgenerated <> '' THEN pg_get_expr(d.adbin, d.adrelid) ELSE '' END,
       a.atttypid IN ('text'::regtype, 'varchar'::regtype)
FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attname COLLATE "C"
"""
# A table without partitions is its own leaf; rows of foreign leaves are not counted.
_LEAVES = """
SELECT ARRAY(SELECT format('%%I.%%I', n.nspname, c.relname)
             FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
             WHERE c.oid = t.leaf OR c.oid IN (SELECT a.relid FROM pg_partition_ancestors(t.leaf) a))
FROM (SELECT relid::oid AS leaf FROM pg_partition_tree(%s::oid::regclass) WHERE isleaf) t
     JOIN pg_class own ON own.oid = t.leaf AND own.relkind IN ('r', 'f')
"""
_BYTES = """
SELECT coalesce((SELECT sum(pg_total_relation_size(relid)) FROM pg_partition_tree(o.oid)), 0)
       + CASE WHEN EXISTS (SELECT FROM pg_partition_tree(o.oid)) THEN 0 ELSE pg_total_relation_size(o.oid) END
FROM (SELECT %s::oid::regclass AS oid) o
"""


def expected_of(table: FoundTable, sums: Mapping[str, TableSum]) -> TableSum:
    """The manifest's sum of a table, over its leaves.

    Raises:
        OpsError: the rows of a leaf, or of the table, are not in the backup.
    """
    found: dict[str, TableSum] = {}
    for names in table.leaves if table.partitioned else ((table.name,),):
        counted = [name for name in names if name in sums]
        if not counted:
            raise OpsError(f"the rows of {' / '.join(names)} are not in this backup", "choose a backup that has them")
        found[counted[0]] = sums[counted[0]]
    return TableSum(
        rows=sum(one.rows for one in found.values()),
        hash=str(sum(int(one.hash) for one in found.values())),
        bytes=sum(one.bytes for one in found.values()),
    )


def sum_of(connection: Connection, table: FoundTable) -> TableSum:
    """The number of rows and their hash, in a session with pinned settings."""
    compared = (column for column in table.columns if column.name not in table.uncompared)
    columns = [(column.name, "text" if column.is_text else None) for column in compared]
    query = sql.SQL("SELECT count(*), coalesce(sum({}::numeric), 0) FROM {}").format(row_hash(columns), table.rows_of)
    rows, total = execute(connection, query)[0]
    return TableSum(rows=int(rows), hash=str(int(total)))


@probe
def read_sums(postgres: Postgres, database: str, tables: Sequence[FoundTable]) -> tuple[TableSum, ...]:
    """The number of rows and the hash of each table."""
    with pinned(postgres, database) as connection:
        return tuple(sum_of(connection, table) for table in tables)


def files_of(postgres: Postgres, tables: Sequence[FoundTable]) -> frozenset[Pair]:
    """The files in which the rows of tables are: (OID of the database, filenode)."""
    oids = [table.oid for table in tables]
    with postgres.connect(postgres.database) as connection:
        rows = execute(connection, _FILES, oids, oids)
    return frozenset((int(database), int(file)) for database, file in rows)


_FILES = """
SELECT (SELECT oid::bigint FROM pg_database WHERE datname = current_database()), pg_relation_filenode(t.oid)::bigint
FROM (SELECT oid FROM unnest(%s::oid[]) oid
      UNION SELECT p.relid FROM unnest(%s::oid[]) root, pg_partition_tree(root::regclass) p) t
WHERE pg_relation_filenode(t.oid) IS NOT NULL
"""
