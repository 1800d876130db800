"""Validation by Great Expectations: context, sources, definitions, Data Docs."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

import great_expectations as gx
from great_expectations.data_context.types.base import ProgressBarsConfig
from great_expectations.expectations.core.unexpected_rows_expectation import UnexpectedRowsExpectation
from great_expectations.expectations.expectation_configuration import ExpectationConfiguration
from psycopg import sql
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.types import NullType

from tasks.gx.suites import name_of, table_of

THREADS = 2
_PLAIN = re.compile(r"[a-z_][a-z0-9_]*")
# An empty search path uses no foreign operators, nothing can be written, and the server prints type names as SQLAlchemy
# expects them (with quote_all_identifiers it prints "text" with quotes).
SESSION = "-c search_path=pg_catalog -c default_transaction_read_only=on -c quote_all_identifiers=off"

for _name in list(logging.root.manager.loggerDict):  # several of its modules set their own level
    if _name.startswith("great_expectations"):
        logging.getLogger(_name).setLevel(logging.ERROR)


@compiles(NullType)
@compiles(NullType, "postgresql")
def _unknown_type(_type: NullType, _compiler: object, **_: object) -> str:
    """A name for types that SQLAlchemy does not know (point, extensions' types): GX prints every column's type."""
    return "UNKNOWN"


class ExpectQueryToReturnNoRows(UnexpectedRowsExpectation):  # type: ignore[misc]
    """GX's own expectation runs its query twice, for the rows and for their count; this one only counts."""

    metric_dependencies: ClassVar[tuple[str, ...]] = ("unexpected_rows_query.row_count",)

    def _validate(
        self, metrics: dict[str, Any], runtime_configuration: Any = None, execution_engine: Any = None
    ) -> dict[str, Any]:
        rows = metrics["unexpected_rows_query.row_count"]
        return {"success": rows == 0, "result": {"observed_value": rows}}


@contextmanager
def context_for(password: str) -> Iterator[tuple[Any, Path]]:
    """An ephemeral context, and a private file with the password: Data Docs would show a password in the URL."""
    password = password.replace("\\", r"\\").replace(":", r"\:")
    with tempfile.TemporaryDirectory(prefix="ops-gx-") as private:
        passfile = Path(private) / "pgpass"
        passfile.touch(mode=0o600)
        passfile.write_text(f"*:*:*:*:{password}\n", encoding="utf-8")
        context = gx.get_context(mode="ephemeral")
        context.variables.progress_bars = ProgressBarsConfig(globally=False)
        for name, site in dict(context.variables.data_docs_sites).items():  # temporary, never removed by GX
            shutil.rmtree(site["store_backend"]["base_directory"], ignore_errors=True)
            context.delete_data_docs_site(name)
        try:
            yield context, passfile
        finally:
            for source in context.data_sources.all().values():
                for engine in (source.get_execution_engine().engine, source.get_engine()):
                    engine.dispose()


def configure(suite: Sequence[Mapping[str, Any]]) -> tuple[list[ExpectationConfiguration], list[tuple[str, bool, str]]]:
    """The expectations that GX accepts, and a failed row for each other: one must not hide the rest."""
    taken, rows = [], []
    for item in suite:
        one = ExpectationConfiguration(type=item["type"], kwargs=item["kwargs"], description=item.get("description"))
        try:
            one.to_domain_obj()
        except Exception as error:
            why = " ".join(str(error).split())[:200] or type(error).__name__
            rows.append((name_of(item), False, f"could not be judged: {why}"))
        else:
            taken.append(one)
    return taken, rows


def define(
    context: Any, passfile: Path, request: Mapping[str, Any], name: str, suite: Sequence[ExpectationConfiguration]
) -> Any:
    """The validation of one table. Each has its own source: an engine has only one active batch."""
    schema, table = table_of(name)
    host, port = request["host"], request["port"]
    login, database = quote(request["user"], safe=""), quote(request["database"], safe="")
    shown_host = host if re.fullmatch(r"[\w.-]+", host) else "localhost"  # GX accepts nothing else in a URL
    connection = {
        **request.get("transport", {}),
        "host": host,
        "passfile": str(passfile),
        "connect_timeout": 10,
        "options": f"{SESSION} {request.get('options', '')}",
    }
    source = context.data_sources.add_postgres(
        name,
        connection_string=f"postgresql+psycopg://{login}@{shown_host}:{port}/{database}",
        kwargs={"connect_args": {**connection, "application_name": "interview-ops"}},
        create_temp_table=False,
    )
    texts = request.get("texts", {}).get(name)
    if texts is None and _PLAIN.fullmatch(schema) and _PLAIN.fullmatch(table):
        asset = source.add_table_asset(name=name, table_name=table, schema_name=schema)
        batch = asset.add_batch_definition_whole_table(name)
    else:  # GX does not quote such names, and compares enums with VARCHAR, which has no operator
        columns = [
            sql.SQL("{0}::text AS {0}" if text else "{0}").format(sql.Identifier(one)) for one, text in texts or ()
        ]
        listed = sql.SQL(", ").join(columns) if columns else sql.SQL("*")
        rows = sql.SQL("SELECT {} FROM {}").format(listed, sql.Identifier(schema, table)).as_string()
        batch = source.add_query_asset(name=name, query=rows).add_batch_definition_whole_table(name)
    definition = gx.ValidationDefinition(
        name=name, data=batch, suite=context.suites.add(gx.ExpectationSuite(name=name, expectations=list(suite)))
    )
    return context.validation_definitions.add(definition)


_unrendered: dict[str, Any] = {}
"""Contexts with results whose Data Docs are rendered later, by the directory of the evidence."""


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Validate every suite of a request, and build Data Docs of the results, now or on a later request."""
    if evidence := request.get("render"):
        waiting = _unrendered.pop(evidence, None)
        docs = build_docs(waiting, Path(evidence)) if waiting else None
        return {"docs": str(docs) if docs else None}
    rows = []
    with context_for(request["password"]) as (context, passfile):
        configured = {name: configure(suite) for name, suite in request["suites"].items()}
        definitions = [define(context, passfile, request, name, taken) for name, (taken, _) in configured.items()]
        with ThreadPoolExecutor(max_workers=THREADS) as pool:
            for (name, (_, refused)), found in zip(configured.items(), pool.map(validate, definitions), strict=True):
                rows += [(name, *one) for one in (*found, *refused)]
    _unrendered[request["evidence"]] = context
    waits = request.get("later") and all(row[2] for row in rows)  # a broken rule may end the run
    rendered = {} if waits else answer({"render": request["evidence"]})
    return {"rows": rows, "docs": None, **rendered}


def validate(definition: Any) -> list[tuple[str, bool, str]]:
    """One table's suite: name, whether it holds, observed value.

    Booleans first: unexpected values need further scans, so they are read only for failures.
    """
    result = definition.run(result_format="BOOLEAN_ONLY")
    if not result.success:
        result = definition.run(result_format="BASIC")
    return [
        (name_of(one.expectation_config.to_json_dict()), bool(one.success), _observed(one)) for one in result.results
    ]


def _observed(result: Any) -> str:
    if result.success:
        return "as expected"
    problem = _exception(result.exception_info)
    if problem:
        return f"could not be judged: {problem}"
    seen = result.result
    if "unexpected_count" in seen:
        some = ", ".join(str(value)[:40] for value in seen.get("partial_unexpected_list", [])[:3])
        return f"{seen['unexpected_count']} of {seen['element_count']} rows" + (f": {some}" if some != "" else "")
    rows = "rows" if result.expectation_config.type != "expect_query_to_return_no_rows" else "rows break it"
    return f"{seen.get('observed_value')} {rows}"


def _exception(info: Mapping[str, Any]) -> str:
    """The first message in either form of GX's exception_info."""
    for one in (info, *(value for value in info.values() if isinstance(value, Mapping))):
        if one.get("raised_exception"):
            return str(one.get("exception_message")).split("\n")[0][:200]
    return ""


def build_docs(context: Any, directory: Path) -> Path | None:
    """Data Docs as static pages in `directory`, without fonts and pictures, which are most of their size."""
    backend = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(directory.absolute())}
    site = {
        "class_name": "SiteBuilder",
        "store_backend": backend,
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder", "show_cta_footer": False},
    }
    context.add_data_docs_site("evidence", site)
    context.build_data_docs(site_names=["evidence"])
    for heavy in ("fonts", "images"):
        shutil.rmtree(directory / "static" / heavy, ignore_errors=True)
    index = directory / "index.html"
    return index if index.exists() else None
