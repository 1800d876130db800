"""The rows that a restore of single tables replaced: kept in tables beside, labelled by a comment, until discarded."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from psycopg import sql

from blocks.postgres.server import Connection, Postgres, execute
from runbook.kinds import probe
from runbook.wait import until
from tasks.postgres.content.pinned_session import pinned
from tasks.postgres.restore.staged_copy import name_beside
from tasks.postgres.tables.find import Table

STAMP = re.compile(r"_old_(\d{8}_\d{6})$")


@dataclass(frozen=True)
class Kept:
    """A table that holds old rows."""

    name: str
    rows: int


@dataclass(frozen=True)
class SupersededTable:
    """Old rows of `table` (quoted, as `name`), replaced at `since` by `backup`; `stamp` is the same for all tables that
    were replaced `together` (as they were called; nothing where an older version of this project labelled them)."""

    oid: int
    schema: str
    relation: str
    name: str
    table: str
    since: str
    backup: str
    stamp: str
    together: tuple[str, ...]
    bytes: int


def kept_name(relation: str, oid: int, stamp: str) -> str:
    """Within 63 bytes; where a name must be cut, the OID keeps two alike apart."""
    plain = f"{relation}__old_{stamp}"
    return plain if len(plain.encode()) <= 63 else name_beside(relation, f"__{oid}_old_{stamp}")


@probe
def free_stamp(postgres: Postgres) -> str:
    """The time, as it will stand in the names of the tables that keep the old rows; not used before."""

    def free() -> str:
        stamp = f"{datetime.now(UTC):%Y%m%d_%H%M%S}"
        with postgres.connect(postgres.database) as connection:
            used = execute(connection, "SELECT 1 FROM pg_class WHERE right(relname, 20) = %s LIMIT 1", f"_old_{stamp}")
        return "" if used else stamp

    return until(free, what="a free name for the old rows", seconds=5)


def keep_rows(
    connection: Connection, table: Table, stamp: str, by: str, together: Sequence[str], *, published: bool
) -> Kept:
    """Copy a live table's rows, within the transaction that replaces them. Nobody but the table's owner may read them.

    Where a publication takes in every new table its subscribers would have to have it: a table that is made unlogged
    and logged afterwards is not sent.
    """
    relation = kept_name(table.relation, table.oid, stamp)
    name = sql.Identifier(table.schema, relation)
    columns = sql.SQL(", ").join(sql.Identifier(column.name) for column in table.columns)
    create = sql.SQL("CREATE {} {} AS SELECT {} FROM {}").format(
        sql.SQL("UNLOGGED TABLE" if published else "TABLE"), name, columns, table.rows_of
    )
    rows = connection.execute(create).rowcount
    if published:
        connection.execute(sql.SQL("ALTER TABLE {} SET LOGGED").format(name))
    owner = execute(connection, _OWNER, table.oid)[0][0]
    connection.execute(sql.SQL("ALTER TABLE {} OWNER TO {}").format(name, sql.Identifier(str(owner))))
    for (grantee,) in execute(connection, _GRANTEES, table.schema, relation):
        role = sql.Identifier(str(grantee)) if grantee else sql.SQL("PUBLIC")
        connection.execute(sql.SQL("REVOKE ALL ON TABLE {} FROM {}").format(name, role))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    told = {"superseded": now, "by": by, "table": table.name, "set": stamp, "tables": list(together)}
    label = json.dumps(told, ensure_ascii=False)
    connection.execute(sql.SQL("COMMENT ON TABLE {} IS {}").format(name, label))
    return Kept(name.as_string(connection), rows)


_OWNER = "SELECT pg_get_userbyid(relowner) FROM pg_class WHERE oid = %s"
# Default privileges of whoever creates a table may let others read it.
_GRANTEES = """
SELECT DISTINCT r.rolname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace, aclexplode(c.relacl) a
LEFT JOIN pg_roles r ON r.oid = a.grantee
WHERE n.nspname = %s AND c.relname = %s AND a.grantee <> c.relowner
"""


@probe
def find_superseded_tables(postgres: Postgres) -> tuple[SupersededTable, ...]:
    """The tables that keep what restores of single tables replaced, newest first. What has no label is nobody's."""
    with pinned(postgres, postgres.database) as connection:
        rows = execute(connection, _KEPT)
    found = [
        SupersededTable(int(oid), schema, relation, name, *told, int(size))
        for oid, schema, relation, name, size, label in rows
        if (told := _told(label)) and STAMP.search(relation)
    ]
    return tuple(sorted(found, key=lambda table: (table.stamp, table.name), reverse=True))


_KEPT = """
SELECT c.oid::bigint, n.nspname, c.relname, format('%I.%I', n.nspname, c.relname), pg_total_relation_size(c.oid),
       obj_description(c.oid, 'pg_class')
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'r' AND c.relname ~ '_old_[0-9]{8}_[0-9]{6}$' AND obj_description(c.oid, 'pg_class') IS NOT NULL
"""


def _told(label: str) -> tuple[str, str, str, str, tuple[str, ...]] | None:
    try:
        told = json.loads(label)
        together = tuple(str(name) for name in told.get("tables", ()))
        return str(told["table"]), str(told["superseded"]), str(told["by"]), str(told["set"]), together
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
