"""Rows that violate a foreign key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from psycopg import sql

from blocks.postgres.server import Connection, execute
from tasks.postgres.tables.ties import TiedForeignKey

MOST_EXAMPLES = 3


@dataclass(frozen=True)
class Dangling:
    """The rows that violate a foreign key, with the values of some of them."""

    key: TiedForeignKey
    rows: int
    examples: tuple[str, ...]


def find_dangling(connection: Connection, keys: Sequence[TiedForeignKey]) -> list[Dangling]:
    """Check each foreign key as its trigger would check each row."""
    found = []
    for key in keys:
        rows, examples = execute(connection, _dangling(key))[0]
        if rows:
            found.append(Dangling(key, int(rows), tuple(str(example) for example in examples)))
    return found


def _dangling(key: TiedForeignKey) -> sql.Composed:
    child = [sql.SQL("c.{}").format(sql.Identifier(column[0])) for column in key.columns]
    all_there = sql.SQL(" AND ").join(sql.SQL("{} IS NOT NULL").format(column) for column in child)
    some_there = sql.SQL(" OR ").join(sql.SQL("{} IS NOT NULL").format(column) for column in child)
    half = sql.SQL("OR (({}) AND NOT ({}))").format(some_there, all_there) if key.full else sql.SQL("")
    return _DANGLING.format(
        shown=sql.SQL("concat_ws(', ', {})").format(sql.SQL(", ").join(child)),
        child=_rows_of(key.child),
        there=all_there,
        parent=_rows_of(key.parent),
        equal=sql.SQL(" AND ").join(_equal(column) for column in key.columns),
        half=half,
        most=MOST_EXAMPLES,
    )


_DANGLING = sql.SQL("""
WITH dangling AS MATERIALIZED (
    SELECT {shown} AS shown FROM {child} c
    WHERE ({there} AND NOT EXISTS (SELECT FROM {parent} p WHERE {equal})) {half})
SELECT (SELECT count(*) FROM dangling), ARRAY(SELECT DISTINCT shown FROM dangling ORDER BY 1 LIMIT {most})
""")


def _rows_of(end: tuple[str, str, bool]) -> sql.Composed:
    schema, relation, partitioned = end
    return sql.SQL("" if partitioned else "ONLY ") + sql.Identifier(schema, relation)


def _equal(column: tuple[str, str, str, str, str, str]) -> sql.Composed:
    child, parent, schema, operator, collation_schema, collation = column
    collate = sql.SQL(" COLLATE {}").format(sql.Identifier(collation_schema, collation)) if collation else sql.SQL("")
    return sql.SQL("p.{} OPERATOR({}.{}) c.{}{}").format(
        sql.Identifier(parent), sql.Identifier(schema), sql.SQL(operator), sql.Identifier(child), collate
    )
