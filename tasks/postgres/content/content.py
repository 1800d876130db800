"""The content manifest of a database, read in one snapshot: a restored copy must equal it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, LiteralString

from psycopg import sql
from pydantic import BaseModel, ConfigDict

from blocks.postgres.server import Connection, Postgres, execute
from runbook.kinds import probe
from tasks.postgres.content import queries
from tasks.postgres.content.definitions import read_definitions
from tasks.postgres.content.pinned_session import in_batches, pinned
from tasks.postgres.content.quiet import copy_options
from tasks.postgres.content.rowhash import FORM
from tasks.postgres.content.sums import TableSum, TableSums
from tasks.postgres.dump.generated import Uncomputable
from tasks.postgres.server.properties import Properties, read_properties

LARGE_OBJECTS = "large objects"
Beside = Callable[[TableSums], AbstractContextManager[None]]
Part = Literal["full", "schema", "tables"]


class SequenceValue(BaseModel):
    """A sequence's `last_value` and `is_called`."""

    model_config = ConfigDict(frozen=True)
    last: int
    called: bool


class DatabaseContent(BaseModel):
    """The content that a restore is compared with.

    `form`: the kind of row hash. `part`: all of the database, its definitions, or definitions with the rows of chosen
    tables. None for parts that an older manifest lacks: tablespaces and access methods other than the defaults, and
    owners, privileges and comments of large objects. `text_bytes`: the size of the dump's rows before compression; 0:
    unknown. `snapshot`, `system`, `timeline`: the snapshot (pg_current_snapshot), the cluster's system identifier and
    the timeline of `lsn`; "" and 0 in older manifests.
    """

    model_config = ConfigDict(frozen=True)
    database: str
    server_version: int
    properties: Properties
    tablespaces: dict[str, str] | None = None
    access_methods: dict[str, str] | None = None
    large_object_rights: TableSum | None = None
    roles: tuple[str, ...]
    extensions: dict[str, str]
    revision: str
    bytes: int
    lsn: str
    snapshot: str = ""
    system: int = 0
    timeline: int = 0
    tables: dict[str, TableSum]
    sequences: dict[str, SequenceValue]
    populated: dict[str, bool]
    remote_views: tuple[tuple[str, str], ...] = ()
    volatile_checks: tuple[tuple[str, str, str], ...] = ()
    uncomputable: tuple[Uncomputable, ...] = ()
    definitions: dict[str, str]
    not_compared: tuple[str, ...]
    form: str = ""
    part: Part = "full"
    text_bytes: int = 0

    @property
    def rows(self) -> int:
        """Rows in all tables."""
        return sum(table.rows for table in self.tables.values())


@probe
def read_content(postgres: Postgres, database: str) -> DatabaseContent:
    """The content of a database without other users (a copy), with its sequences."""
    return content_of(postgres, database)


def content_of(postgres: Postgres, database: str) -> DatabaseContent:
    """The content of a database; definitions and rows are read in parallel.

    No event trigger fires: a login trigger that writes would change the content.
    """
    with ThreadPoolExecutor(1) as pool:
        definitions = pool.submit(read_definitions, postgres, database)
        with pinned(postgres, database, copy_options(postgres)) as connection:
            found = content_in_session(connection, database)
        return found.model_copy(update={"definitions": definitions.result()})


def content_in_session(
    connection: Connection,
    database: str,
    part: Part = "full",
    chosen: Collection[str] = (),
    beside: Beside | None = None,
) -> DatabaseContent:
    """The content in a pinned session's snapshot, without definitions; only rows of the given part. `beside`: another
    session in the same snapshot, which reads some of the rows."""
    snapshot, system, timeline = execute(connection, queries.ORIGIN)[0]
    properties = read_properties(connection, database)
    return DatabaseContent(
        database=database,
        server_version=connection.info.server_version,
        properties=properties,
        tablespaces=_named(connection, queries.TABLESPACES),
        access_methods=_named(connection, queries.ACCESS_METHODS),
        large_object_rights=_rights(connection) if part == "full" else None,
        roles=_roles(connection, properties),
        extensions={str(a): str(b) for a, b in execute(connection, queries.EXTENSIONS)},
        revision=revision(connection),
        bytes=int(execute(connection, "SELECT pg_database_size(current_database())")[0][0]),
        lsn=str(execute(connection, queries.LSN)[0][0]),
        snapshot=str(snapshot),
        system=int(system),
        timeline=int(timeline),
        tables={} if part == "schema" else _tables(connection, None if part == "full" else chosen, beside),
        sequences={} if part == "schema" else sequence_values(connection),
        populated={str(a): bool(b) for a, b in execute(connection, queries.POPULATED)},
        remote_views=tuple((str(a), str(b)) for a, b in execute(connection, queries.REMOTE_VIEWS)),
        volatile_checks=tuple((str(a), str(b), str(c)) for a, b, c in execute(connection, queries.VOLATILE_CHECKS)),
        definitions={},
        not_compared=tuple(_not_compared(str(a), str(b)) for a, b in execute(connection, queries.NOT_COMPARED)),
        form=FORM,
        part=part,
    )


def _not_compared(kind: str, name: str) -> str:
    """An object that a manifest does not describe, for people."""
    return {
        "foreign table": f"rows of foreign table {name}",
        "materialised view": f"rows of materialised view {name} (the restore refreshes it)",
        "extension's table": f"rows of table {name} (belongs to an extension)",
        "user mapping": f"user mapping on server {name}",
        "security label": f"security label of the database (for {name})",
        "collations": "collation versions (a restore sorts and builds indexes with the installed ones)",
        "subscription": f"subscription {name} (a copy has it disabled and without a slot)",
    }[kind]


def _named(connection: Connection, query: LiteralString) -> dict[str, str]:
    return {str(name): str(value) for name, value in execute(connection, query)}


def _rights(connection: Connection) -> TableSum:
    rows, total = rights(connection)
    return TableSum(rows=rows, hash=str(total))


def _roles(connection: Connection, properties: Properties) -> tuple[str, ...]:
    found = {str(row[0]) for row in execute(connection, queries.ROLES)}
    found |= {properties.owner, *(role for role, _, _ in properties.settings if role)}
    return tuple(sorted(role for role in found if not role.startswith("pg_")))


def revision(connection: Connection) -> str:
    """Alembic's revision (several heads joined by a comma), empty if the database has none."""
    if not execute(connection, "SELECT to_regclass('public.alembic_version')")[0][0]:
        return ""
    rows = execute(connection, "SELECT version_num FROM public.alembic_version ORDER BY 1")
    return ",".join(str(row[0]) for row in rows)


def _tables(connection: Connection, chosen: Collection[str] | None, beside: Beside | None) -> dict[str, TableSum]:
    """Sums of tables, without inheritance children, which are counted separately. None: all, and large objects."""
    sums = TableSums.of(connection, chosen, in_parts=beside is not None)
    with beside(sums) if beside else nullcontext():
        sums.read(connection)
    sums.read(connection)  # what the session beside this one could not read
    if chosen is None:
        rows, total = content(connection)
        if rows:
            return {**sums.found, LARGE_OBJECTS: TableSum(rows=rows, hash=str(total))}
    return sums.found


def sequence_values(connection: Connection) -> dict[str, SequenceValue]:
    """Every sequence's current value, by its quoted name."""
    found = {}
    for schema, name, quoted in in_batches(connection, execute(connection, queries.SEQUENCES)):
        query = sql.SQL("SELECT last_value, is_called FROM {}").format(sql.Identifier(schema, name))
        last, called = execute(connection, query)[0]
        found[str(quoted)] = SequenceValue(last=int(last), called=bool(called))
    return found


@dataclass(frozen=True)
class RowCounts:
    """Rows per table (or per unit of hash partitions, as in the manifest)."""

    rows: tuple[tuple[str, int], ...]


@probe
def read_counts(postgres: Postgres, database: str) -> RowCounts:
    """Count every table, without reading its content."""
    counts: dict[str, int] = {}
    with pinned(postgres, database) as connection:
        for schema, table, _, _, unit, _ in in_batches(connection, execute(connection, queries.TABLES)):
            query = sql.SQL("SELECT count(*) FROM ONLY {}").format(sql.Identifier(schema, table))
            counts[unit] = counts.get(unit, 0) + int(execute(connection, query)[0][0])
        lobs = int(execute(connection, "SELECT count(*) FROM pg_largeobject_metadata")[0][0])
    return RowCounts(tuple({**counts, **({LARGE_OBJECTS: lobs} if lobs else {})}.items()))


# The largest value in bytes (src/include/utils/memutils.h, MaxAllocSize, without its header). A larger object is read
# in parts.
PART_BYTES = (1 << 30) - 5


def content(connection: Connection) -> tuple[int, int]:
    """The number of large objects, and the sum of the hashes of their parts."""
    count, total, longer = execute(connection, _FIRST, PART_BYTES, PART_BYTES)[0]
    offset = PART_BYTES
    while longer:
        beyond = offset + PART_BYTES
        part, longer = execute(connection, _NEXT, offset, offset, PART_BYTES, beyond, longer)[0]
        total, offset = total + part, beyond
    return int(count), int(total)


def rights(connection: Connection) -> tuple[int, int]:
    """The number of large objects, and the sum of the hashes of their owners, privileges, comments and labels."""
    count, total = execute(connection, _RIGHTS)[0]
    return int(count), int(total)


_FIRST = """
SELECT count(*), coalesce(sum(hashtextextended(oid::text || ':' || md5(lo_get(oid, 0, %s)), 0)::numeric), 0),
       array_agg(oid) FILTER (WHERE length(lo_get(oid, %s, 1)) > 0)
FROM pg_largeobject_metadata
"""
_NEXT = """
SELECT sum(hashtextextended(oid::text || ':' || %s::bigint || ':' || md5(lo_get(oid, %s, %s)), 0)::numeric),
       array_agg(oid) FILTER (WHERE length(lo_get(oid, %s, 1)) > 0)
FROM unnest(%s::oid[]) AS oid
"""
_RIGHTS = """
SELECT count(*), coalesce(sum(hashtextextended(concat_ws(chr(10), oid, pg_get_userbyid(lomowner),
    (SELECT string_agg(format('%s %s %s', coalesce(r.rolname, 'PUBLIC'), a.privilege_type, a.is_grantable), ','
                       ORDER BY r.rolname COLLATE "C", a.privilege_type, a.is_grantable)
     FROM aclexplode(coalesce(lomacl, acldefault('L', lomowner))) a LEFT JOIN pg_roles r ON r.oid = a.grantee),
    coalesce(obj_description(oid, 'pg_largeobject'), ''),
    (SELECT string_agg(format('%s: %s', provider, label), ',' ORDER BY provider COLLATE "C") FROM pg_seclabel
     WHERE objoid = o.oid AND classoid = 'pg_largeobject'::regclass)), 0)::numeric), 0)
FROM pg_largeobject_metadata o
"""
