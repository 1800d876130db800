"""Whether data makes sense: Great Expectations suites, one JSON file per table, over whole tables.

A restore that equals its backup says nothing about whether the backup made sense. These expectations do: they are what
phase 3 of a drill runs (§8.4, データ整合性確認). They only read, in read-only sessions, and leave no session behind:
one would block the swap's rename.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from blocks.postgres.server import Connection, Postgres, execute
from runbook.kinds import probe
from tasks.gx import constraints, process
from tasks.gx.suites import ROWS, TAKEN, Suite, name_of, read_suites, table_of
from tasks.postgres.content.changes import TableStates, changed, read_states
from tasks.postgres.content.quiet import copy_options

Table = tuple[str, str]
"""Schema and name."""


class CheckedFiles(NamedTuple):
    """One expectation: of which table, what, whether it holds, and what was seen where it does not."""

    table: str
    expectation: str
    ok: bool
    observed: str


@dataclass(frozen=True)
class Expectations:
    """All expectations of a run. `not_applicable` says which were not judged: their table or column is not in this
    database. `docs` is the first page of Data Docs, None where there is none.
    `unchanged`: the suites that were not judged again, because nothing that they read has changed."""

    rows: tuple[CheckedFiles, ...]
    not_applicable: tuple[str, ...]
    docs: Path | None
    unchanged: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every expectation holds that applies."""
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """Expectations that do not hold, as sentences."""
        return tuple(sentence(row) for row in self.rows if not row.ok)


@probe
def run_expectations(
    postgres: Postgres,
    database: str,
    directory: Path,
    suites: Path,
    *,
    contained: Collection[Table] = (),
    taken: datetime | None = None,
    since: TableStates | None = None,
    built: bool = False,
    render: bool = True,
) -> Expectations:
    """Validate every suite in `suites` against a database; keep Data Docs in `directory` (`reports/evidence/<run>/`),
    unless `render` leaves them to `render_docs`. A broken rule's are rendered at once.

    A suite whose table is missing is not applicable, unless the table is one of `contained`, which the database must
    have. `taken` is the moment that the data is of (None: now). Of the data only counts are kept, and a few unexpected
    values of the column in question. `since`: the states of the tables when all suites were judged last; a suite is not
    judged again if nothing that it reads has changed. `built`: this run had the server fill the database, so what its
    constraints say is not counted again.

    Raises:
        Unreachable: the server does not answer.
        OpsError: a suite is not one, or the expectations could not be judged at all (which is never a pass).
    """
    wanted = _dated(read_suites(suites), taken or datetime.now(UTC))
    with postgres.connect(database) as connection:
        runnable, rows, absent = judgeable(wanted, read_columns(connection), contained)
        runnable, proven = constraints.split(connection, runnable) if built else (runnable, {})
        texts = _enums_as_text(connection, runnable)
    rows += [CheckedFiles(name, name_of(one), True, constraints.HOLDS) for name in proven for one in proven[name]]
    unchanged = _unchanged(runnable, since, read_states.work(postgres, database)) if since else ()
    runnable = {name: suite for name, suite in runnable.items() if name not in unchanged}
    if since and not runnable:
        return Expectations(tuple(rows), tuple(absent), None, unchanged=unchanged)
    evidence = _new_directory(directory)
    request = {**_request(postgres, database, runnable, evidence), "texts": texts, "later": not render}
    answer = process.ask(request) if runnable else {"docs": None, "rows": []}
    docs = Path(answer["docs"]) if answer["docs"] else None
    rows += [CheckedFiles(*row) for row in answer["rows"]]
    text = json.dumps([row._asdict() for row in rows], ensure_ascii=False, indent=1)
    (evidence / "expectations.json").write_text(text, encoding="utf-8")
    return Expectations(tuple(rows), tuple(absent), docs, unchanged)


def _unchanged(suites: Mapping[str, Suite], before: TableStates, now: TableStates) -> tuple[str, ...]:
    """The suites whose table has not changed and whose queries read no other table, if any has changed."""
    differing = changed(before, now)
    return tuple(
        name
        for name, suite in suites.items()
        if not differing or (table_of(name) in before and table_of(name) not in differing and not _reads_others(suite))
    )


def _reads_others(suite: Suite) -> bool:
    """Whether a query of the suite may read another table."""
    queries = [str(value) for item in suite if item["type"] == ROWS for value in item["kwargs"].values()]
    return any(len(_SOURCES.findall(query)) > query.count("{batch}") for query in queries)


_SOURCES = re.compile(r"\b(?:from|join)\b", re.IGNORECASE)  # of EXTRACT too: then a suite more is judged


@probe
def render_docs(evidence: Path) -> Path | None:
    """Render the Data Docs of a validation that left them out; None where its process has ended."""
    docs = process.ask({"render": str(evidence)})["docs"]
    return Path(docs) if docs else None


def sentence(row: CheckedFiles) -> str:
    """For people."""
    return f"{row.table}: {row.expectation}: {row.observed}"


def tables_in(names: Iterable[str]) -> set[Table]:
    """Schema and name of the tables of a manifest, which are quoted as PostgreSQL's `format('%I.%I')` does it."""
    found = set()
    for name in names:
        if match := re.fullmatch(r'("(?:[^"]|"")*"|[^".]+)\.("(?:[^"]|"")*"|[^".]+)', name):
            schema, table = (part[1:-1].replace('""', '"') if part[0] == '"' else part for part in match.groups())
            found.add((schema, table))
    return found


def _dated(wanted: Mapping[str, Suite], taken: datetime) -> dict[str, Suite]:
    """With the moment that the data is of in the queries that ask for it."""
    moment = f"timestamptz '{taken.isoformat()}'"

    def dated(item: dict[str, Any]) -> dict[str, Any]:
        kwargs = {
            key: value.replace(TAKEN, moment) if isinstance(value, str) else value
            for key, value in item["kwargs"].items()
        }
        return {**item, "kwargs": kwargs}

    return {name: [dated(item) for item in suite] for name, suite in wanted.items()}


def _request(postgres: Postgres, database: str, suites: Mapping[str, Suite], evidence: Path) -> dict[str, Any]:
    return {
        "host": postgres.host,
        "port": postgres.port,
        "user": postgres.admin_user,
        "password": postgres.admin_password.get_secret_value(),
        "transport": postgres.transport(),
        "database": database,
        "options": f"{copy_options(postgres)} {postgres.without_timeouts}",
        "suites": suites,
        "evidence": str(evidence),
    }


def _enums_as_text(connection: Connection, suites: Mapping[str, Suite]) -> dict[str, list[tuple[str, bool]]]:
    """Of each suite that compares an enum with values: its table's columns, and which of them are read as text."""
    found = dict[str, list[tuple[str, bool]]]()
    for name, suite in suites.items():
        columns = [(str(column), bool(enum)) for column, enum in execute(connection, _ENUMS, *table_of(name))]
        enums = {column for column, enum in columns if enum}
        if any(item["kwargs"].get("column") in enums and item["type"] not in _ANY_TYPE for item in suite):
            found[name] = columns
    return found


_ANY_TYPE = (
    "expect_column_values_to_not_be_null",
    "expect_column_values_to_be_null",
    "expect_column_values_to_be_unique",
)
_ENUMS = """
SELECT a.attname, coalesce(b.typtype, t.typtype) = 'e' FROM pg_catalog.pg_attribute a
JOIN pg_catalog.pg_class c ON c.oid = a.attrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
JOIN pg_catalog.pg_type t ON t.oid = a.atttypid LEFT JOIN pg_catalog.pg_type b ON b.oid = t.typbasetype
WHERE n.nspname = %s AND c.relname = %s AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
"""


def judgeable(
    wanted: Mapping[str, Suite], columns: Mapping[Table, Sequence[str]], contained: Collection[Table] = ()
) -> tuple[dict[str, Suite], list[CheckedFiles], list[str]]:
    """The expectations of what is there, a row for each table that must be there and is missing, and a sentence for
    each thing that does not apply."""
    runnable, rows, absent = dict[str, Suite](), list[CheckedFiles](), list[str]()
    for name, suite in wanted.items():
        table = table_of(name)
        if table not in columns and table in contained:
            rows.append(CheckedFiles(name, "the table exists", False, "it is missing, and the backup contains it"))
        elif table not in columns:
            absent.append(f"{name}: there is no table {'.'.join(table)}")
        else:
            here = {*columns[table], ""}
            runnable[name] = [item for item in suite if item["kwargs"].get("column", "") in here]
            absent += [
                f"{name}: {name_of(item)}: there is no such column" for item in suite if item not in runnable[name]
            ]
    return runnable, rows, absent


def _new_directory(parent: Path) -> Path:
    """`expectations-1`, `expectations-2` …: a run may ask more than once."""
    parent.mkdir(parents=True, exist_ok=True)
    directory = parent / f"expectations-{len(list(parent.glob('expectations-*'))) + 1}"
    directory.mkdir()
    return directory


def read_columns(connection: Connection) -> dict[Table, Sequence[str]]:
    """Every table of people's own schemas (partitioned ones too) and its columns."""
    rows = execute(
        connection,
        "SELECT n.nspname, c.relname, array_agg(a.attname::text) FROM pg_catalog.pg_class c"
        " JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
        " LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped"
        " WHERE n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' AND c.relkind IN ('r', 'p')"
        " GROUP BY n.nspname, c.relname",
    )
    return {(str(schema), str(table)): columns for schema, table, columns in rows}
