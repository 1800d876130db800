"""Whether data makes sense: Great Expectations suites, one JSON file per table, over whole tables.

A restore that equals its backup says nothing about whether the backup made sense. These expectations do: they are what
phase 3 of a drill runs (§8.4, データ整合性確認). They only read, in read-only sessions, and leave no session behind:
one would block the swap's rename.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from blocks.postgres import Connection, Postgres, execute
from runbook.kinds import probe
from tasks.gx import process
from tasks.gx.suites import SUITES, Suite, name_of, read_suites

SCHEMA = "public"


class Checked(NamedTuple):
    """One expectation: of which table, what, whether it holds, and what was seen where it does not."""

    table: str
    expectation: str
    ok: bool
    observed: str


@dataclass(frozen=True)
class Expectations:
    """All expectations of a run. `missing` are tables and columns that this revision does not have: data that is still
    to be migrated lacks them rightly. `docs` is the first page of Data Docs, None where there is none."""

    rows: tuple[Checked, ...]
    missing: tuple[str, ...]
    docs: Path | None

    @property
    def ok(self) -> bool:
        """Whether every expectation holds."""
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """What does not hold, as sentences; what is missing too."""
        return tuple(_sentence(row) for row in self.rows if not row.ok)

    @property
    def broken(self) -> tuple[str, ...]:
        """What does not hold, but for what is missing."""
        return tuple(sentence for sentence in self.failed if sentence not in self.missing)


@probe
def run_expectations(postgres: Postgres, database: str, directory: Path, suites: Path = SUITES) -> Expectations:
    """Validate every suite against a database and keep Data Docs in `directory` (under `reports/evidence/<run>/`).

    A table or a column that is not there at this revision is a row that does not hold, not an error. Of the data only
    counts are kept, and a few unexpected values of the column in question.

    Raises:
        Unreachable: the server does not answer.
        OpsError: a suite is not one, or the expectations could not be judged at all (which is never a pass).
    """
    wanted = read_suites(suites)
    with postgres.connect(database) as connection:
        runnable, rows = _judgeable(wanted, _columns(connection))
    missing = tuple(_sentence(row) for row in rows)
    evidence = _new_directory(directory)
    answer = process.ask(_request(postgres, database, runnable, evidence))
    docs = Path(answer["docs"]) if answer["docs"] else None
    rows += [Checked(*row) for row in answer["rows"]]
    text = json.dumps([row._asdict() for row in rows], ensure_ascii=False, indent=1)
    (evidence / "expectations.json").write_text(text, encoding="utf-8")
    return Expectations(tuple(rows), missing, docs)


def _request(postgres: Postgres, database: str, suites: Mapping[str, Suite], evidence: Path) -> dict[str, Any]:
    return {
        "host": postgres.host,
        "port": postgres.port,
        "user": postgres.admin_user,
        "password": postgres.admin_password.get_secret_value(),
        "database": database,
        "schema": SCHEMA,
        "suites": suites,
        "evidence": str(evidence),
    }


def _judgeable(
    wanted: Mapping[str, Suite], columns: Mapping[str, Sequence[str]]
) -> tuple[dict[str, Suite], list[Checked]]:
    """The expectations of what is there, and a row for each of what is not."""
    runnable, rows = {}, []
    for table, suite in wanted.items():
        if table not in columns:
            rows.append(Checked(table, "the table exists", False, "it does not, at this revision"))
            continue
        here = {*columns[table], ""}
        runnable[table] = [item for item in suite if item["kwargs"].get("column", "") in here]
        absent = [item for item in suite if item not in runnable[table]]
        rows += [Checked(table, name_of(item), False, "there is no such column at this revision") for item in absent]
    return runnable, rows


def _new_directory(parent: Path) -> Path:
    """`expectations-1`, `expectations-2` …: a run may ask more than once."""
    parent.mkdir(parents=True, exist_ok=True)
    directory = parent / f"expectations-{len(list(parent.glob('expectations-*'))) + 1}"
    directory.mkdir()
    return directory


def _sentence(row: Checked) -> str:
    return f"{row.table}: {row.expectation}: {row.observed}"


def _columns(connection: Connection) -> Mapping[str, Sequence[str]]:
    """The application's tables (partitioned ones too) and their columns; other schemas are strangers' business."""
    rows = execute(
        connection,
        "SELECT c.relname, array_agg(a.attname::text) FROM pg_catalog.pg_class c"
        " JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped"
        " WHERE c.relnamespace = pg_catalog.to_regnamespace(%s) AND c.relkind IN ('r', 'p') GROUP BY c.relname",
        SCHEMA,
    )
    return {str(table): columns for table, columns in rows}
