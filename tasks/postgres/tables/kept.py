"""The rows that a restore of single tables replaced: kept in separate tables, labelled by a comment, until deleted."""

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
from tasks.postgres.tables.find import FoundTable

STAMP = re.compile(r"_old_(\d{8}_\d{6})$")


@dataclass(frozen=True)
class KeptRows:
    """A table with old rows."""

    name: str
    rows: int


@dataclass(frozen=True)
class SupersededTable:
    """Old rows of `table` (quoted, as `name`), replaced at `since` by `backup`.

    `stamp`: the same for all tables replaced `together`; that list is empty in labels of older versions. `lsn`: the
    position in WAL at that time (0: not known); `xid`: the transaction.
    """

    oid: int
    schema: str
    relation: str
    name: str
    table: str
    since: str
    backup: str
    stamp: str
    together: tuple[str, ...]
    lsn: int
    xid: int
    bytes: int


def kept_name(relation: str, oid: int, stamp: str) -> str:
    """The kept table's name within 63 bytes; the OID keeps shortened names distinct."""
    plain = f"{relation}__old_{stamp}"
    return plain if len(plain.encode()) <= 63 else name_beside(relation, f"__{oid}_old_{stamp}")


@probe
def free_stamp(postgres: Postgres) -> str:
    """The current time as an unused suffix for the names of kept tables."""

    def free() -> str:
        stamp = f"{datetime.now(UTC):%Y%m%d_%H%M%S}"
        with postgres.connect(postgres.database) as connection:
            used = execute(connection, "SELECT 1 FROM pg_class WHERE right(relname, 20) = %s LIMIT 1", f"_old_{stamp}")
        return "" if used else stamp

    return until(free, what="a free name for the old rows", seconds=5)


def keep_rows(
    connection: Connection, table: FoundTable, stamp: str, by: str, together: Sequence[str], *, published: bool
) -> KeptRows:
    """Copy a live table's rows in the transaction that replaces them. Only the table's owner can read the copy.

    A publication of all new tables would require it at the subscribers. A table created as unlogged and switched to
    logged is not sent.
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
    lsn, xid = map(int, execute(connection, _PLACE)[0])
    note: dict[str, object] = {"superseded": now, "by": by, "table": table.name, "set": stamp, "tables": list(together)}
    note |= {"lsn": lsn, "xid": xid}
    label = json.dumps(note, ensure_ascii=False)
    connection.execute(sql.SQL("COMMENT ON TABLE {} IS {}").format(name, label))
    return KeptRows(name.as_string(connection), rows)


_PLACE = "SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn, pg_current_xact_id()::xid::text"
_OWNER = "SELECT pg_get_userbyid(relowner) FROM pg_class WHERE oid = %s"
# Default privileges of the creating role can let others read the table.
_GRANTEES = """
SELECT DISTINCT r.rolname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace, aclexplode(c.relacl) a
LEFT JOIN pg_roles r ON r.oid = a.grantee
WHERE n.nspname = %s AND c.relname = %s AND a.grantee <> c.relowner
"""


@probe
def find_superseded_tables(postgres: Postgres) -> tuple[SupersededTable, ...]:
    """The tables with rows that restores of single tables replaced, newest first; only labelled ones."""
    with pinned(postgres, postgres.database) as connection:
        rows = execute(connection, _KEPT)
    found = [
        SupersededTable(int(oid), schema, relation, name, *parts, int(size))
        for oid, schema, relation, name, size, label in rows
        if (parts := _parsed(label)) and STAMP.search(relation)
    ]
    return tuple(sorted(found, key=lambda table: (table.stamp, table.name), reverse=True))


_KEPT = """
SELECT c.oid::bigint, n.nspname, c.relname, format('%I.%I', n.nspname, c.relname), pg_total_relation_size(c.oid),
       obj_description(c.oid, 'pg_class')
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'r' AND c.relname ~ '_old_[0-9]{8}_[0-9]{6}$' AND obj_description(c.oid, 'pg_class') IS NOT NULL
"""


def _parsed(label: str) -> tuple[str, str, str, str, tuple[str, ...], int, int] | None:
    try:
        note = json.loads(label)
        together = tuple(str(name) for name in note.get("tables", ()))
        place = int(note.get("lsn", 0)), int(note.get("xid", 0))
        return str(note["table"]), str(note["superseded"]), str(note["by"]), str(note["set"]), together, *place
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
