"""Whether data makes sense: Great Expectations suites, one JSON file per table, over whole tables.

A restore that equals its backup says nothing about whether the backup made sense. These expectations do: they are what
phase 3 of a drill runs (§8.4, データ整合性確認). They only read, in read-only sessions, and leave no session behind:
one would block the swap's rename.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from blocks.postgres import Connection, Postgres, execute
from runbook.errors import OpsError
from runbook.kinds import probe

SUITES = Path(__file__).parent.parent / "deployments" / "expectations"
Suite = list[dict[str, Any]]
SCHEMA = "public"
THREADS = 2
_once = threading.Lock()


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


def preload() -> None:
    """Begin to import Great Expectations (5–10 s when cold) beside other work; `run_expectations` waits for it."""
    with _once:
        if _import.ident is None:
            _import.start()


def _import_quietly() -> None:
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    logging.getLogger("great_expectations").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="great_expectations")
    importlib.import_module("tasks.expectations")


_import = threading.Thread(target=_import_quietly, name="import-great-expectations", daemon=True)


@probe
def run_expectations(postgres: Postgres, database: str, directory: Path, suites: Path = SUITES) -> Expectations:
    """Validate every suite against a database and keep Data Docs in `directory` (under `reports/evidence/<run>/`).

    A table or a column that is not there at this revision is a row that does not hold, not an error. Of the data only
    counts are kept, and a few unexpected values of the column in question.

    Raises:
        Unreachable: the server does not answer.
        OpsError: a suite is not one, or the expectations could not be judged at all (which is never a pass).
    """
    preload()
    wanted = read_suites(suites)
    with postgres.connect(database) as connection:
        runnable, rows = _judgeable(wanted, _columns(connection))
    missing = tuple(_sentence(row) for row in rows)
    evidence = _new_directory(directory)
    try:
        found, docs = _validate(postgres, database, runnable, evidence)
    except Exception as error:
        what = str(error).strip().split("\n")[0][:200]
        raise OpsError(f"the expectations could not be judged: {type(error).__name__}: {what}", "try again") from None
    rows += found
    text = json.dumps([row._asdict() for row in rows], ensure_ascii=False, indent=1)
    (evidence / "expectations.json").write_text(text, encoding="utf-8")
    return Expectations(tuple(rows), missing, docs)


def _validate(
    postgres: Postgres, database: str, suites: Mapping[str, Suite], evidence: Path
) -> tuple[list[Checked], Path | None]:
    _import.join()
    from tasks import expectations  # it costs seconds, so nothing but this imports it

    rows = []
    with expectations.context_for(postgres) as (context, passfile):
        definitions = [
            expectations.define(context, passfile, postgres, database, SCHEMA, table, suite)
            for table, suite in suites.items()
        ]
        with ThreadPoolExecutor(max_workers=THREADS) as pool:
            for table, found in zip(suites, pool.map(expectations.validate, definitions), strict=True):
                rows += [Checked(table, *one) for one in found]
        docs = expectations.build_docs(context, evidence)
    return rows, docs


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


def read_suites(directory: Path) -> dict[str, Suite]:
    """Table to its expectations.

    Raises:
        OpsError: a file is not a list of `{"type": …, "kwargs": {…}}`, or there is no file at all.
    """
    suites = {}
    for path in sorted(directory.glob("*.json")):
        try:
            suite = json.loads(path.read_text(encoding="utf-8"))
            if not all(isinstance(item["type"], str) and isinstance(item["kwargs"], dict) for item in suite):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            raise OpsError(f"{path.name} is not a suite of expectations", "correct it, as its neighbours are") from None
        suites[path.stem] = suite
    if not suites:
        raise OpsError(f"there is no suite of expectations in {directory}", "correct the directory")
    return suites


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


def name_of(expectation: Mapping[str, Any]) -> str:
    """What an operator reads: the description, or the type in words with its column."""
    if description := expectation.get("description"):
        return str(description)
    words = str(expectation["type"]).removeprefix("expect_").replace("_", " ")
    kwargs = {key: value for key, value in expectation["kwargs"].items() if key not in ("column", "batch_id")}
    column = expectation["kwargs"].get("column", "")
    shown = ", ".join(f"{key.removesuffix('_value')} {value}" for key, value in kwargs.items())
    return " ".join(part for part in (column, words.removeprefix("column "), f"({shown})" if shown else "") if part)
