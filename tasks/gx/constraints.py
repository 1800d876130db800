"""Expectations that the database's own constraints prove, where the server built it row by row.

pg_restore lets the server check every row against `NOT NULL` and `CHECK`, and every table against its keys. What a
validated constraint says need not be counted again: it would take a scan, and a sort for a key. That is true only of a
database that pg_restore filled in the same run and that was not changed since: an index of older files may be damaged
and hide a duplicate, and a migration, or a stranger's SQL file, may switch a foreign key's triggers off.

https://www.postgresql.org/docs/current/ddl-constraints.html
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blocks.postgres.server import Connection
from tasks.gx.declared import DeclaredBounds, DeclaredTable, read_declared
from tasks.gx.suggestion import reference_rule, unique_rule
from tasks.gx.suites import Suite, table_of

HOLDS = "as expected: its constraint was checked when the rows were restored"


def split(connection: Connection, suites: Mapping[str, Suite]) -> tuple[dict[str, Suite], dict[str, Suite]]:
    """The expectations that must be judged, and those that a constraint proves, by suite; a suite without any is left
    out."""
    judged, proven = dict[str, Suite](), dict[str, Suite]()
    for name, suite in suites.items():
        table = read_declared(connection, *table_of(name))
        for one in suite:
            (proven if table and proves(table, one) else judged).setdefault(name, []).append(one)
    return judged, proven


def proves(table: DeclaredTable, expectation: Mapping[str, Any]) -> bool:
    """Whether a validated constraint of the table says the same as the expectation, or more.

    >>> table = DeclaredTable("public", "users", 0, (), (("id",),), ())
    >>> proves(table, {"type": "expect_column_values_to_be_unique", "kwargs": {"column": "id"}})
    True
    >>> proves(table, {"type": "expect_column_values_to_be_unique", "kwargs": {"column": "name"}})
    False
    """
    kwargs = dict(expectation["kwargs"])
    column = kwargs.pop("column", None)
    match expectation["type"], kwargs:
        case "expect_column_values_to_not_be_null", {**rest} if not rest:
            return any(one.name == column and one.required for one in table.columns)
        case "expect_column_values_to_be_unique", {**rest} if not rest:
            return (column,) in table.keys
        case "expect_column_values_to_be_in_set", {"value_set": [*values], **rest} if not rest:
            return column in table.values and all(value in values for value in table.values[column])
        case "expect_column_values_to_be_between", _:
            return column in table.checked and _within(table.checked[column], kwargs)
    rules = [*map(unique_rule, table.keys), *map(reference_rule, table.references)]
    return any(expectation["type"] == one["type"] and kwargs == one["kwargs"] for one in rules)


def _within(declared: DeclaredBounds, wanted: dict[str, Any]) -> bool:
    """Whether the declared bounds are at least as narrow. Exclusive ones are compared with inclusive ones only."""
    least, most = wanted.pop("min_value", None), wanted.pop("max_value", None)
    return (
        not wanted
        and all(limit is None or isinstance(limit, (int, float)) for limit in (least, most))
        and (least is None or (declared.least is not None and declared.least >= least))
        and (most is None or (declared.most is not None and declared.most <= most))
    )
