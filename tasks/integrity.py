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
import shutil
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from blocks.postgres import Connection, Postgres, execute
from runbook.errors import OpsError
from runbook.kinds import probe

SUITES = Path(__file__).parent.parent / "deployments" / "expectations"
SCHEMA = "public"
THREADS = 2
# Nothing is looked up by the search path (a stranger's operator would be), and nothing can be written.
SESSION = "-c search_path=pg_catalog -c default_transaction_read_only=on"
_once = threading.Lock()


class Checked(NamedTuple):
    """One expectation: of which table, what, whether it holds, and what was seen where it does not."""

    table: str
    expectation: str
    ok: bool
    observed: str


@dataclass(frozen=True)
class Expectations:
    """All expectations of a run. `docs` is the first page of Data Docs, None where there is none."""

    rows: tuple[Checked, ...]
    docs: Path | None

    @property
    def ok(self) -> bool:
        """Whether every expectation holds."""
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """What does not hold, as sentences."""
        return tuple(f"{row.table}: {row.expectation}: {row.observed}" for row in self.rows if not row.ok)


def preload() -> None:
    """Begin to import Great Expectations (5–10 s when cold) beside other work; `run_expectations` waits for it."""
    with _once:
        if _import.ident is None:
            _import.start()


def _import_quietly() -> None:
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    name = "great_expectations"
    logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=name)
    importlib.import_module(name)
    for other in list(logging.root.manager.loggerDict):  # several of its modules set a level of their own
        if other.startswith(name):
            logging.getLogger(other).setLevel(logging.ERROR)


_import = threading.Thread(target=_import_quietly, name="import-great-expectations", daemon=True)


@probe
def run_expectations(postgres: Postgres, database: str, directory: Path, suites: Path = SUITES) -> Expectations:
    """Validate every suite against a database and keep Data Docs in `directory` (under `reports/evidence/<run>/`).

    A table or a column that is not there at this revision is a row that does not hold, not an error. Rows themselves
    are never kept: the evidence has counts and keys only.

    Raises:
        Unreachable: the server does not answer.
        OpsError: a suite is not one.
    """
    preload()
    wanted = read_suites(suites)
    with postgres.connect(database) as connection:
        columns = _columns(connection)
    rows = [Checked(table, "the table exists", False, "it does not, at this revision") for table in wanted
            if table not in columns]  # fmt: skip
    present = {table: suite for table, suite in wanted.items() if table in columns}
    runnable = {}
    for table, suite in present.items():
        missing = [item for item in suite if item["kwargs"].get("column", "") not in (*columns[table], "")]
        rows += [Checked(table, _name(item), False, "there is no such column at this revision") for item in missing]
        runnable[table] = [item for item in suite if item not in missing]
    _import.join()
    with _context(postgres) as (context, passfile):
        definitions = [_definition(context, passfile, postgres, database, *item) for item in runnable.items()]
        with ThreadPoolExecutor(max_workers=THREADS) as pool:
            for found in pool.map(_validate, definitions):
                rows += found
        docs = _docs(context, directory)
    (directory / "expectations.json").write_text(
        json.dumps([row._asdict() for row in rows], ensure_ascii=False, indent=1), encoding="utf-8"
    )
    return Expectations(tuple(rows), docs)


def read_suites(directory: Path) -> dict[str, list[dict[str, Any]]]:
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


@contextmanager
def _context(postgres: Postgres) -> Iterator[tuple[Any, Path]]:
    """An ephemeral context, and a private file with the password: what is in the URL would reach Data Docs."""
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    password = postgres.admin_password.get_secret_value().replace("\\", r"\\").replace(":", r"\:")
    with tempfile.TemporaryDirectory(prefix="ops-gx-") as private:
        passfile = Path(private) / "pgpass"
        passfile.touch(mode=0o600)
        passfile.write_text(f"*:*:*:*:{password}\n", encoding="utf-8")
        context = gx.get_context(mode="ephemeral")
        context.variables.progress_bars = ProgressBarsConfig(globally=False)
        for name, site in dict(context.variables.data_docs_sites).items():  # a temporary one that nobody removes
            shutil.rmtree(site["store_backend"]["base_directory"], ignore_errors=True)
            context.delete_data_docs_site(name)
        yield context, passfile


def _definition(
    context: Any, passfile: Path, postgres: Postgres, database: str, table: str, suite: Sequence[Mapping[str, Any]]
) -> Any:
    """What to validate in one table. Each has a source of its own: an engine knows one active batch only."""
    import great_expectations as gx
    from great_expectations.expectations.expectation_configuration import ExpectationConfiguration

    login, name = quote(postgres.admin_user, safe=""), quote(database, safe="")
    source = context.data_sources.add_postgres(
        table,
        connection_string=f"postgresql+psycopg://{login}@{postgres.host}:{postgres.port}/{name}",
        kwargs={"connect_args": {"passfile": str(passfile), "options": SESSION, "application_name": "interview-ops"}},
        create_temp_table=False,
    )
    asset = source.add_table_asset(name=table, table_name=table, schema_name=SCHEMA)
    configurations = [
        ExpectationConfiguration(type=item["type"], kwargs=item["kwargs"], description=item.get("description"))
        for item in suite
    ]
    definition = gx.ValidationDefinition(
        name=table,
        data=asset.add_batch_definition_whole_table(table),
        suite=context.suites.add(gx.ExpectationSuite(name=table, expectations=configurations)),
    )
    return context.validation_definitions.add(definition)


def _validate(definition: Any) -> list[Checked]:
    """One table's suite. Booleans first: what was unexpected costs further scans, so only failures are looked into."""
    try:
        result = definition.run(result_format="BOOLEAN_ONLY")
        if not result.success:
            result = definition.run(result_format="BASIC")
    finally:
        source = definition.asset.datasource
        for engine in (source.get_execution_engine().engine, source.get_engine()):
            engine.dispose()
    return [
        Checked(definition.name, _name(one.expectation_config.to_json_dict()), bool(one.success), _observed(one))
        for one in result.results
    ]


def _name(expectation: Mapping[str, Any]) -> str:
    """What an operator reads: the description, or the type in words with its column."""
    if description := expectation.get("description"):
        return str(description)
    words = str(expectation["type"]).removeprefix("expect_").replace("_", " ")
    kwargs = {key: value for key, value in expectation["kwargs"].items() if key not in ("column", "batch_id")}
    column = expectation["kwargs"].get("column", "")
    shown = ", ".join(f"{key.removesuffix('_value')} {value}" for key, value in kwargs.items())
    return " ".join(part for part in (column, words.removeprefix("column "), f"({shown})" if shown else "") if part)


def _observed(result: Any) -> str:
    if result.success:
        return "as expected"
    problem = _exception(result.exception_info)
    if problem:
        return f"could not be judged: {problem}"
    seen = result.result
    if "unexpected_count" in seen:
        some = ", ".join(map(str, seen.get("partial_unexpected_list", [])[:3]))
        return f"{seen['unexpected_count']} of {seen['element_count']} rows" + (f": {some}" if some != "" else "")
    rows = "rows" if result.expectation_config.type != "unexpected_rows_expectation" else "rows break it"
    return f"{seen.get('observed_value')} {rows}"


def _exception(info: Mapping[str, Any]) -> str:
    """The first message in GX's two shapes of exception_info."""
    for one in (info, *(value for value in info.values() if isinstance(value, Mapping))):
        if one.get("raised_exception"):
            return str(one.get("exception_message")).split("\n")[0][:200]
    return ""


def _docs(context: Any, directory: Path) -> Path | None:
    """Data Docs as static pages in `directory`, without the fonts and pictures that would make up most of them."""
    directory.mkdir(parents=True, exist_ok=True)
    backend = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(directory.absolute())}
    site = {"class_name": "SiteBuilder", "store_backend": backend,
            "site_index_builder": {"class_name": "DefaultSiteIndexBuilder", "show_cta_footer": False}}  # fmt: skip
    context.add_data_docs_site("evidence", site)
    context.build_data_docs(site_names=["evidence"])
    for heavy in ("fonts", "images"):
        shutil.rmtree(directory / "static" / heavy, ignore_errors=True)
    index = directory / "index.html"
    return index if index.exists() else None
