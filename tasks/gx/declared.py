"""Tables as the database declares them, with counts and extremes of their rows: the basis of suggested expectations.

https://www.postgresql.org/docs/current/catalogs.html
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from psycopg import Error, errors, sql

from blocks.postgres.server import Connection, Postgres, execute, first_line
from runbook.errors import OpsError

SCAN_BYTES = 256_000_000
"""A table up to this size is read once; of a larger one only indexes and statistics are used."""
SCAN_SECONDS = 60
MOST_VALUES = 10
Kind = Literal["number", "time", "text", "other"]


@dataclass(frozen=True)
class DeclaredColumn:
    """A column. `indexed`: it is the first of a B-tree index, so its extremes are cheap."""

    name: str
    kind: Kind
    whole: bool
    required: bool
    indexed: bool


@dataclass(frozen=True)
class Reference:
    """A foreign key: its columns, the referenced columns, and the operators that compare them."""

    columns: tuple[str, ...]
    schema: str
    table: str
    referenced: tuple[str, ...]
    operators: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class DeclaredBounds:
    """Minimum and maximum of a number; `open_` ones are exclusive. None: no limit."""

    least: float | None = None
    most: float | None = None
    open_least: bool = False
    open_most: bool = False


@dataclass(frozen=True)
class Times:
    """Of a column with times: a year before the first, whether any is in the future, a year after the last, and the age
    of the last in seconds."""

    least: str
    future: bool
    most: str
    age_seconds: float


@dataclass
class DeclaredTable:
    """A table. `rows` is counted if `read`, otherwise estimated."""

    schema: str
    name: str
    bytes: int
    columns: tuple[DeclaredColumn, ...]
    keys: tuple[tuple[str, ...], ...]
    references: tuple[Reference, ...]
    checked: dict[str, DeclaredBounds] = field(default_factory=dict)
    values: dict[str, tuple[str, ...]] = field(default_factory=dict)
    rows: int = 0
    read: bool = False
    numbers: dict[str, DeclaredBounds] = field(default_factory=dict)
    times: dict[str, Times] = field(default_factory=dict)

    def identifies(self, column: str) -> bool:
        """Whether a column is an identifier without a useful range: part of a key or a reference, or named like one."""
        linked = {name for key in (*self.keys, *(one.columns for one in self.references)) for name in key}
        return column in linked or column.lower() == "id" or column.lower().endswith("_id")


def read_tables(postgres: Postgres, database: str, scan_bytes: int = SCAN_BYTES) -> list[DeclaredTable]:
    """Every table outside the system's schemas by name, a partitioned one as one table.

    Raises:
        Unreachable: the server does not answer.
        OpsError: a table cannot be read: it was dropped meanwhile, or is damaged.
    """
    with postgres.connect(database) as connection:
        try:
            execute(connection, "SET default_transaction_read_only = on")
            execute(connection, "SET TimeZone = 'UTC'")
            execute(connection, "SELECT set_config('statement_timeout', %s, false)", f"{SCAN_SECONDS}s")
            tables = [_table(connection, *row) for row in execute(connection, _TABLES)]
            for table in tables:
                _measure(connection, table, scan_bytes)
        except Error as error:
            raise OpsError(f"a table cannot be read: {first_line(error)}", "run this again") from None
    return tables


def read_declared(connection: Connection, schema: str, name: str) -> DeclaredTable | None:
    """What a table declares, without its rows; None for an inheritance parent, whose rows are other tables' too."""
    for row in execute(connection, _ONE, schema, name):
        return None if row[-1] else _table(connection, *row)
    return None


def _table(connection: Connection, oid: int, schema: str, name: str, size: int, has_heirs: bool) -> DeclaredTable:
    """Read a table's declarations. Keys of an inheritance parent do not apply to its children's rows."""
    columns = tuple(DeclaredColumn(*row) for row in execute(connection, _COLUMNS, oid))
    keys = tuple(tuple(row[0]) for row in execute(connection, _KEYS, oid))
    references = tuple(
        Reference(tuple(own), where, to, tuple(there), tuple((one[0], one[1]) for one in operators))
        for own, where, to, there, operators in execute(connection, _REFERENCES, oid)
    )
    found = DeclaredTable(schema, name, int(size), columns, () if has_heirs else keys, () if has_heirs else references)
    for column, expression in execute(connection, _CHECKS, oid):
        if bounds := bounds_in(expression):
            found.checked[column] = bounds
        elif values := values_in(expression):
            found.values[column] = values
    return found


def bounds_in(expression: str) -> DeclaredBounds | None:
    """The limits of a simple CHECK on one column: `((score >= 0) AND (score <= 100))`."""
    limits: dict[str, Any] = {}
    for part in expression.split(" AND "):
        match = _COMPARISON.fullmatch(part)
        if not match:
            return None
        side = "least" if match[1][0] == ">" else "most"
        limits[side] = float(match[2])
        limits[f"open_{side}"] = len(match[1]) == 1
    return DeclaredBounds(**limits)


def values_in(expression: str) -> tuple[str, ...]:
    """The texts that a CHECK on one column allows: `(role = ANY (ARRAY['user'::text, 'system'::text]))`."""
    match = _LIST.fullmatch(expression)
    return tuple(one.replace("''", "'") for one in re.findall(r"'((?:[^']|'')*)'::", match[1])) if match else ()


def _measure(connection: Connection, table: DeclaredTable, scan_bytes: int) -> None:
    """Count and extremes: by one scan of a small table, otherwise by its indexes and the planner's estimate."""
    columns = [one for one in table.columns if one.kind == "time" or not table.identifies(one.name)]
    if table.bytes <= scan_bytes:
        try:
            table.rows = _read(connection, table, columns, count=True)
            table.read = True
            _read_values(connection, table, columns)
            return
        except errors.QueryCanceled:  # slower than expected
            table.read = False
    plan = execute(connection, sql.SQL("EXPLAIN (FORMAT json) SELECT FROM {}").format(_name(table)))[0][0]
    table.rows = int(plan[0]["Plan"]["Plan Rows"])
    for column in (one for one in columns if one.indexed and one.kind in ("number", "time")):
        try:
            _read(connection, table, [column], count=False)
        except errors.QueryCanceled:
            continue


def _read(connection: Connection, table: DeclaredTable, columns: Sequence[DeclaredColumn], *, count: bool) -> int:
    wanted = [one for one in columns if one.kind in ("number", "time")]
    outputs = [sql.SQL("count(*)" if count else "0")] + [_extremes(one) for one in wanted]
    query = sql.SQL("SELECT {} FROM {}").format(sql.SQL(", ").join(outputs), _name(table))
    rows, *found = execute(connection, query)[0]
    for column, seen in zip(wanted, _groups(found, wanted), strict=True):
        if column.kind == "number" and None not in seen:
            table.numbers[column.name] = DeclaredBounds(float(seen[0]), float(seen[1]))
        elif column.kind == "time" and None not in seen:
            table.times[column.name] = Times(str(seen[0]), bool(seen[1]), str(seen[2]), float(seen[3]))
    return int(rows)


def _groups(found: Sequence[Any], wanted: Sequence[DeclaredColumn]) -> Iterator[Sequence[Any]]:
    begin = 0
    for column in wanted:
        end = begin + (2 if column.kind == "number" else 4)
        yield found[begin:end]
        begin = end


def _extremes(column: DeclaredColumn) -> sql.Composed:
    """The output columns; NULL for NaN, infinities and empty tables, for which nothing is suggested."""
    name = sql.Identifier(column.name)
    if column.kind == "number":
        finite = "CASE WHEN {}::float8 NOT IN ('NaN', 'Infinity', '-Infinity') THEN {}::float8 END"
        text = f"{finite.replace('{}::float8', 'min({})::float8')}, {finite.replace('{}::float8', 'max({})::float8')}"
        return sql.SQL(text).format(name, name, name, name)
    text = (
        "(CASE WHEN isfinite(min({0})) THEN min({0})::timestamptz - interval '1 year' END)::text,"
        " max({0}) > now() + interval '1 day',"
        " (CASE WHEN isfinite(max({0})) THEN max({0})::timestamptz + interval '1 year' END)::text,"
        " extract(epoch FROM CASE WHEN isfinite(max({0})) THEN now() - max({0})::timestamptz END)"
    )
    return sql.SQL(text).format(name)


def _read_values(connection: Connection, table: DeclaredTable, columns: Sequence[DeclaredColumn]) -> None:
    """The texts of a column with few distinct values, each used at least twenty times on average."""
    for column in columns:
        if column.kind != "text" or column.name in table.values:
            continue
        query = sql.SQL("SELECT DISTINCT {0}::text FROM {1} WHERE {0} IS NOT NULL LIMIT {2}").format(
            sql.Identifier(column.name), _name(table), MOST_VALUES + 1
        )
        values = sorted(str(row[0]) for row in execute(connection, query))
        few = 2 <= len(values) <= MOST_VALUES and table.rows >= 20 * len(values)
        if few and all(0 < len(value) <= 40 for value in values):
            table.values[column.name] = tuple(values)


def _name(table: DeclaredTable) -> sql.Identifier:
    return sql.Identifier(table.schema, table.name)


_NUMBER = r"'?(-?\d+(?:\.\d+)?)'?"
# Of the column's casts only those that change no value: (price)::integer >= 0 is true of -0.4 as well.
_OPERAND = r'\(*(?:\w+|"(?:[^"]|"")+")\)?(?:::(?:text|character\svarying|numeric))?\)?'
_COMPARISON = re.compile(rf"{_OPERAND} (>=|<=|>|<) \(*{_NUMBER}\)*(?:::[\w ]+)?(?:\(\d+(?:,\d+)?\))?\)*")
_LIST = re.compile(rf"{_OPERAND} = ANY \(+ARRAY\[(.*)\]\)*(?:::[\w ]+(?:\[\])?)?\)*")

_FOUND = """
SELECT c.oid, n.nspname, c.relname, CASE WHEN c.relkind = 'r' THEN pg_relation_size(c.oid) ELSE
    (SELECT coalesce(sum(pg_relation_size(relid)), 0) FROM pg_partition_tree(c.oid)) END,
  c.relkind = 'r' AND EXISTS (SELECT FROM pg_inherits h WHERE h.inhparent = c.oid)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"""
_ONE = _FOUND + "\nWHERE n.nspname = %s AND c.relname = %s AND c.relkind IN ('r', 'p')"
_PEOPLES_OWN = """
WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.relpersistence <> 't'
  AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' AND c.relname !~ '__old_[0-9]{8}_[0-9]{6}'
  AND NOT EXISTS (
    SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')
ORDER BY 2, 3
"""
_TABLES = _FOUND + _PEOPLES_OWN

_COLUMNS = """
SELECT a.attname, CASE WHEN b.typname IN ('int2', 'int4', 'int8', 'numeric', 'float4', 'float8') THEN 'number'
    WHEN b.typname IN ('date', 'timestamp', 'timestamptz') THEN 'time' WHEN b.typcategory = 'S' THEN 'text'
    ELSE 'other' END,
  b.typname IN ('int2', 'int4', 'int8'), a.attnotnull AND NOT EXISTS (  -- from 18 on one may be NOT VALID
    SELECT FROM pg_constraint c
    WHERE c.conrelid = a.attrelid AND c.contype = 'n' AND c.conkey[1] = a.attnum AND NOT c.convalidated),
  EXISTS (SELECT FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid JOIN pg_am m ON m.oid = x.relam
    WHERE i.indrelid = a.attrelid AND i.indisvalid AND i.indpred IS NULL AND m.amname = 'btree'
      AND i.indkey[0] = a.attnum)
FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
JOIN pg_type b ON b.oid = CASE WHEN t.typtype = 'd' THEN t.typbasetype ELSE t.oid END
WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
"""

_KEYS = """
SELECT ARRAY(SELECT a.attname::text FROM unnest(i.indkey[0:i.indnkeyatts - 1]) WITH ORDINALITY k(attnum, n)
  JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum ORDER BY k.n)
FROM pg_index i WHERE i.indrelid = %s AND i.indisunique AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL
ORDER BY NOT i.indisprimary, i.indexrelid::regclass::text
"""

_REFERENCES = """
SELECT ARRAY(SELECT a.attname::text FROM unnest(c.conkey) WITH ORDINALITY k(attnum, n)
    JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = k.attnum ORDER BY k.n),
  n.nspname, t.relname,
  ARRAY(SELECT a.attname::text FROM unnest(c.confkey) WITH ORDINALITY k(attnum, n)
    JOIN pg_attribute a ON a.attrelid = c.confrelid AND a.attnum = k.attnum ORDER BY k.n),
  ARRAY(SELECT ARRAY[s.nspname::text, o.oprname::text] FROM unnest(c.conpfeqop) WITH ORDINALITY k(op, n)
    JOIN pg_operator o ON o.oid = k.op JOIN pg_namespace s ON s.oid = o.oprnamespace ORDER BY k.n)
FROM pg_constraint c JOIN pg_class t ON t.oid = c.confrelid JOIN pg_namespace n ON n.oid = t.relnamespace
WHERE c.conrelid = %s AND c.contype = 'f' AND c.convalidated ORDER BY c.conname
"""

_CHECKS = """
SELECT a.attname, pg_get_expr(c.conbin, c.conrelid) FROM pg_constraint c
JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = c.conkey[1]
WHERE c.conrelid = %s AND c.contype = 'c' AND c.convalidated AND cardinality(c.conkey) = 1 ORDER BY c.conname
"""
