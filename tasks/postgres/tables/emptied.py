"""Tables that a backup has rows of, and that are empty or missing now."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from psycopg import sql

from blocks.postgres.server import Postgres, execute
from runbook.kinds import probe
from tasks.postgres.content.content import revision
from tasks.postgres.content.pinned_session import pinned
from tasks.wal.reading.transactions import Pair


@dataclass(frozen=True)
class EmptiedTables:
    """`empty`: the OID and the file of each table without rows; `missing`: the names of those that do not exist;
    `revision`: of the schema; `missing_unfilled`: those without rows in the backup that do not exist."""

    empty: dict[str, tuple[Pair, Pair]]
    missing: tuple[str, ...]
    revision: str = ""
    missing_unfilled: tuple[str, ...] = ()

    def lacks(self, names: Collection[str]) -> bool:
        """Whether one of these is empty or missing."""
        return any(name in self.empty or name in self.missing for name in names)

    @property
    def text(self) -> str:
        """`empty: public.users; missing: public.orders`."""
        parts = (("empty", sorted(self.empty)), ("missing", self.missing))
        return "; ".join(f"{word}: {', '.join(names)}" for word, names in parts if names) or "none"


@probe
def find_emptied_tables(postgres: Postgres, database: str, rows: Mapping[str, int]) -> EmptiedTables:
    """Those tables that are empty or missing. `rows`: how many the backup has of each (quoted, with its schema); one
    without rows is not emptied. No table is read beyond its first row.

    Raises:
        OpsError: there is no such database.
        Unreachable: the server does not answer.
    """
    empty, missing = dict[str, tuple[Pair, Pair]](), list[str]()
    filled = [name for name, count in rows.items() if count]
    with pinned(postgres, database) as connection:
        for name in sorted(rows):
            found = execute(connection, _TABLE, name)
            if not found:
                missing.append(name)
                continue
            if name not in filled:
                continue
            of, oid, file, schema, table, unlogged = found[0]
            query = sql.SQL("SELECT EXISTS (SELECT FROM {})").format(sql.Identifier(str(schema), str(table)))
            # A crash or a physical recovery empties unlogged tables.
            if not unlogged and not execute(connection, query)[0][0]:
                empty[name] = ((int(of), int(oid)), (int(of), int(file or 0)))
        unfilled = tuple(name for name in missing if name not in filled)
        return EmptiedTables(empty, tuple(name for name in missing if name in filled), revision(connection), unfilled)


_TABLE = """
SELECT d.oid::bigint, c.oid::bigint, pg_relation_filenode(c.oid)::bigint, n.nspname, c.relname, c.relpersistence = 'u'
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_database d ON d.datname = current_database()
WHERE c.oid = to_regclass(%s) AND c.relkind IN ('r', 'p')
"""
