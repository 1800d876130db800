"""Suites of expectations that a database's own schema and rows suggest, for people to review."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from psycopg import sql

from runbook.files import durable
from tasks.gx.declared import DeclaredBounds, DeclaredColumn, DeclaredTable, Reference
from tasks.gx.suites import ROWS, TAKEN, Suite, name_for

FRESH_DAYS = 7
"""A table written to within this time is expected to have recent rows in every backup."""
BATCH = "SELECT 1 FROM {batch}"
SUGGESTED = ".suggested"
"""Suffix of a suggestion for a file that somebody has already reviewed."""


def suggest(table: DeclaredTable) -> Suite:
    """Expectations for a table. All of them hold now, unless the table changed since it was read."""
    suite = list(_counted(table))
    suite += [unique_rule(key) for key in table.keys]
    suite += [_one("expect_column_values_to_not_be_null", column=one.name) for one in table.columns if one.required]
    suite += [reference_rule(one) for one in table.references]
    suite += [
        _one("expect_column_values_to_be_in_set", column=name, value_set=list(values))
        for name, values in table.values.items()
    ]
    suite += [one for column in table.columns if (one := _range(table, column))]
    return suite + list(_times(table))


def left_out(table: DeclaredTable) -> tuple[str, ...]:
    """Columns whose range or values were too expensive to read."""
    if table.read:
        return ()
    known = {*table.numbers, *table.times, *table.checked, *table.values}
    return tuple(
        one.name
        for one in table.columns
        if one.kind != "other" and one.name not in known and (one.kind == "time" or not table.identifies(one.name))
    )


def write(directory: Path, table: DeclaredTable, suite: Suite) -> str:
    """Write a suite for review; returns what was done. An existing file is kept; the suggestion is put next to it."""
    path = directory / f"{name_for(table.schema, table.name)}.json"
    if "/" in path.name or "\0" in path.name or not suite:
        return f"{path.name}: not a valid file name" if suite else f"{table.schema}.{table.name}: nothing to suggest"
    text = text_of(suite)
    if not path.exists():
        durable.write(path, text)
        return f"{path}: {len(suite)} expectations, review them"
    existing = path.read_text(encoding="utf-8")
    if existing == text:
        return f"{path}: as suggested"
    suggested = path.with_name(path.name + SUGGESTED)
    durable.write(suggested, text)
    changes = [line for line in difflib.ndiff(existing.splitlines(), text.splitlines()) if line[0] in "+-"]
    return f"{path}: unchanged; {len(changes)} lines differ in {suggested.name}"


def text_of(suite: Suite) -> str:
    """A suite as JSON, one expectation a line."""
    return "[\n " + ",\n ".join(json.dumps(one, ensure_ascii=False) for one in suite) + "\n]\n"


def _one(kind: str, **kwargs: Any) -> dict[str, Any]:
    return {"type": kind, "kwargs": kwargs}


def _rows(description: str, query: str) -> dict[str, Any]:
    return {"type": ROWS, "description": description, "kwargs": {"unexpected_rows_query": query}}


def _quoted(*names: str) -> str:
    """Quoted names, escaped for str.format (braces) and for SQLAlchemy (`:name`)."""
    text = sql.Identifier(*names).as_string().replace("{", "{{").replace("}", "}}")
    return re.sub(r"(?<![:\w\\]):(?=\w)", r"\\:", text)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _counted(table: DeclaredTable) -> Iterable[dict[str, Any]]:
    """At least half of today's rows."""
    if table.rows:
        yield _one("expect_table_row_count_to_be_between", min_value=max(1, table.rows // 2))


def unique_rule(key: tuple[str, ...]) -> dict[str, Any]:
    """No two rows have the same key. GX's own uses a window over all rows, which takes several times as long."""
    names = [_quoted(name) for name in key]
    if len(key) == 1:
        query = f"{BATCH} HAVING count({names[0]}) <> count(DISTINCT {names[0]})"
    else:
        there = " AND ".join(f"{name} IS NOT NULL" for name in names)
        query = f"{BATCH} WHERE {there} GROUP BY {_listed(names)} HAVING count(*) > 1"
    return _rows(f"no two rows have the same {_listed(key)}", query)


def reference_rule(one: Reference) -> dict[str, Any]:
    """A foreign key, compared by its own operators: the session has no search path."""
    names = [_quoted(name) for name in one.columns]
    there = " AND ".join(f"{name} IS NOT NULL" for name in names)
    own = [f"ops_parent_{number}" for number in range(len(names))]
    chosen = _listed(f"{_quoted(name)} AS {alias}" for name, alias in zip(one.referenced, own, strict=True))
    equal = " AND ".join(
        f"{alias} {operator if schema == 'pg_catalog' else f'OPERATOR({_quoted(schema)}.{operator})'} {name}"
        for alias, (schema, operator), name in zip(own, one.operators, names, strict=True)
    )
    parents = sql.SQL("SELECT FROM (SELECT {} FROM {}) AS ops_parents WHERE {}").format(
        sql.SQL(chosen), sql.SQL(_quoted(one.schema, one.table)), sql.SQL(equal)
    )
    return _rows(
        f"every {_listed(one.columns)} is in {one.schema}.{one.table}",
        f"{BATCH} WHERE {there} AND NOT EXISTS ({parents.as_string()})",
    )


def _range(table: DeclaredTable, column: DeclaredColumn) -> dict[str, Any] | None:
    """The limits of a CHECK; without one, the current extreme plus a margin of the same size."""
    if column.kind != "number" or table.identifies(column.name):
        return None
    declared, seen = table.checked.get(column.name, DeclaredBounds()), table.numbers.get(column.name)
    least, most = declared.least, declared.most
    if seen and seen.least is not None and seen.most is not None:
        margin = max(seen.most - seen.least, abs(seen.most), abs(seen.least), 1.0)
        least = least if least is not None else 0.0 if seen.least >= 0 else seen.least - margin
        most = most if most is not None else seen.most + margin
    wanted = {
        "min_value": _number(least, column),
        "max_value": _number(most, column),
        "strict_min": declared.open_least or None,
        "strict_max": declared.open_most or None,
    }
    given = {key: value for key, value in wanted.items() if value is not None}
    return _one("expect_column_values_to_be_between", column=column.name, **given) if given else None


def _number(value: float | None, column: DeclaredColumn) -> float | int | None:
    return int(value) if value is not None and (column.whole or value.is_integer()) else value


def _times(table: DeclaredTable) -> Iterable[dict[str, Any]]:
    """Times from a year before the first to now (or a year after the last); the newest row is recent."""
    if not table.times:
        return
    limits = []
    for name, seen in table.times.items():
        most = f"timestamptz '{seen.most}'" if seen.future else "now() + interval '3 days'"
        limits += [f"{_quoted(name)} < timestamptz '{seen.least}'", f"{_quoted(name)} > {most}"]
    yield _rows(f"times are plausible: {_listed(table.times)}", f"{BATCH} WHERE {' OR '.join(limits)}")
    name, seen = min(table.times.items(), key=lambda item: abs(item[1].age_seconds))
    if not seen.future and seen.age_seconds <= FRESH_DAYS * 86400:
        newest = f"max({_quoted(name)})"
        query = f"{BATCH} HAVING {newest} < {TAKEN} - interval '{FRESH_DAYS} days'"
        yield _rows(f"the newest {name} is at most {FRESH_DAYS} days older than the data", query)
