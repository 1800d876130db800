"""Suites of expectations: one JSON file a table. `users.json` applies to the table `public.users`,
`billing.invoices.json` to the table `invoices` of the schema `billing`."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from runbook.errors import OpsError

SCHEMA = "public"
ROWS = "expect_query_to_return_no_rows"
"""Our own expectation (tasks.gx.validation): a query for the rows that break a rule."""
TAKEN = "{taken}"
"""In such a query: the time of the data (a backup's snapshot, or now) as a timestamptz."""
EXPECTED = 'a JSON list of {"type": "expect_…", "kwargs": {…}}, optionally with a "description"'
Suite = list[dict[str, Any]]


def read_suites(directory: Path) -> dict[str, Suite]:
    """Each suite's expectations by its file's name (`users`, `billing.invoices`).

    Raises:
        OpsError: a file is not a suite or has an unknown type, or there is no file.
    """
    suites = {}
    for path in sorted(directory.glob("*.json")):
        try:
            suite = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OpsError(f"{path} is not a suite of expectations: {error}", f"expected: {EXPECTED}") from None
        _check(path, suite)
        suites[path.stem] = suite
    if not suites:
        raise OpsError(
            f"there is no suite of expectations in {directory}",
            "correct [expectations] directory in the environment's TOML, or create suites by python -m "
            "deployments.suggest_expectations",
        )
    return suites


def _check(path: Path, suite: object) -> None:
    if not isinstance(suite, list):
        raise OpsError(f"{path} is not a suite of expectations", f"expected: {EXPECTED}")
    for number, item in enumerate(suite, 1):
        given = item if isinstance(item, dict) else {}
        if not isinstance(given.get("type"), str) or not isinstance(given.get("kwargs"), dict):
            raise OpsError(
                f"{path} is not a suite of expectations: its entry {number} has no type or no kwargs",
                f"expected: {EXPECTED}",
            )
        if given["type"] not in known_types():
            near = difflib.get_close_matches(given["type"], known_types(), 1)
            raise OpsError(
                f"{path}: entry {number} has the unknown type “{given['type'][:80]}”",
                f"expected: a type of great-expectations{f' (did you mean {near[0]}?)' if near else ''}, or {ROWS}",
            )


@cache
def known_types() -> frozenset[str]:
    """The known types of expectations, from the names of Great Expectations' modules: importing them takes seconds."""
    spec = find_spec("great_expectations")
    folders = (Path(where) / "expectations" / "core" for where in (spec and spec.submodule_search_locations) or ())
    found = {path.stem for folder in folders for path in folder.glob("*expect*.py")}
    return frozenset({*found, ROWS})


def table_of(name: str) -> tuple[str, str]:
    """The schema and table of a suite."""
    schema, dot, table = name.partition(".")
    return (schema, table) if dot else (SCHEMA, name)


def name_for(schema: str, table: str) -> str:
    """The name of a table's suite."""
    return table if schema == SCHEMA and "." not in table else f"{schema}.{table}"


def name_of(expectation: Mapping[str, Any]) -> str:
    """An expectation as text: its description, or its type in words with the column."""
    if description := expectation.get("description"):
        return str(description)
    words = str(expectation["type"]).removeprefix("expect_").replace("_", " ")
    kwargs = {key: value for key, value in expectation["kwargs"].items() if key not in ("column", "batch_id")}
    column = expectation["kwargs"].get("column", "")
    shown = ", ".join(f"{key.removesuffix('_value')} {_whole(value)}" for key, value in kwargs.items())
    return " ".join(part for part in (column, words.removeprefix("column "), f"({shown})" if shown else "") if part)


def _whole(value: object) -> object:
    """GX turns limits into floats: 100.0 is 100."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
