"""The tables that an operator names for a backup, with their partitions and children."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blocks.postgres.server import Connection, Postgres, execute
from runbook.errors import OpsError
from runbook.kinds import probe
from tasks.postgres.content import queries


@dataclass(frozen=True)
class ChosenTables:
    """The tables' names as in a manifest, and (schema, name) of every table whose rows are left out."""

    names: tuple[str, ...]
    others: tuple[tuple[str, str], ...]


@probe
def choose_tables(postgres: Postgres, wanted: Sequence[str]) -> ChosenTables:
    """Find tables by name, with or without schema and quotes.

    Raises:
        OpsError: none is named, one does not exist or is in several schemas, or pg_dump omits rows of it.
    """
    if not wanted:
        raise OpsError("no table was named", "name the tables, for example orders")
    with postgres.connect(postgres.database) as connection:
        rows = execute(connection, queries.TABLES)
        tables = {(str(schema), str(table)): str(unit) for schema, table, _, _, unit, _ in rows}
        units = {unit for name in wanted for unit in _units(connection, name.strip(), tables)}
    return ChosenTables(tuple(sorted(units)), tuple(table for table, unit in tables.items() if unit not in units))


def _find(connection: Connection, name: str) -> int:
    rows = execute(connection, _NAMED, name, name, name, name)
    if len(rows) == 1:
        return int(rows[0][0])
    if rows:
        several = ", ".join(str(row[1]) for row in rows)
        raise OpsError(f"there are several tables “{name}”: {several}", "enter it with its schema")
    names = [str(row[0]) for row in execute(connection, _NAMES)]
    near = difflib.get_close_matches(name, names, 3)
    hint = f"did you mean {' or '.join(near)}?" if near else "check its spelling"
    raise OpsError(f"there is no table “{name[:80]}”", hint)


_NAMED = """
SELECT c.oid, format('%%I.%%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p') AND c.relpersistence <> 't' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
  AND (c.relname = %s OR n.nspname || '.' || c.relname = %s OR format('%%I.%%I', n.nspname, c.relname) = %s
       OR format('%%I', c.relname) = %s)
ORDER BY 2
"""
_NAMES = """
SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p') AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
"""


def _units(connection: Connection, name: str, tables: Mapping[tuple[str, str], str]) -> list[str]:
    """The names of a table, its partitions and children in a manifest."""
    found = execute(connection, _TREE, _find(connection, name))
    rows = [((str(schema), str(table)), str(what)) for schema, table, what in found]
    if left_out := [f"{'.'.join(table)} ({what})" for table, what in rows if table not in tables]:
        raise OpsError(
            f"a backup of {name} would lack the rows of {', '.join(left_out[:5])}",
            "leave the table out, or name its other partitions: back up rows of another server there",
        )
    if not rows:
        raise OpsError(f"{name} has no partitions, so it has no rows to back up", "leave it out")
    return [tables[table] for table, _ in rows]


_TREE = """
WITH RECURSIVE tree AS (
    SELECT %s::oid AS oid UNION SELECT i.inhrelid FROM pg_inherits i JOIN tree ON tree.oid = i.inhparent)
SELECT n.nspname, c.relname, CASE c.relkind WHEN 'f' THEN 'a foreign table' ELSE 'an extension''s' END
FROM tree JOIN pg_class c USING (oid) JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind <> 'p' ORDER BY 1, 2
"""
