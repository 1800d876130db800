"""One upgrade or downgrade on a scratch copy, its effect on schema and rows, and the differences of two states."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from blocks.places import Application
from blocks.postgres.server import Postgres, execute
from runbook.errors import OpsError, VerificationFailed
from runbook.failpoint import failpoint
from runbook.kinds import action, probe
from tasks.migrations import locks
from tasks.migrations.locks import Watched
from tasks.migrations.program import revision_of, run_alembic
from tasks.migrations.scripts import BASE
from tasks.postgres.content.content import read_counts
from tasks.postgres.content.definitions import first_difference, read_definitions
from tasks.postgres.content.equivalence import compare_definitions

Direction = Literal["up", "down"]
VERSION_TABLE = "alembic_version"
_COLUMNS = """
SELECT format('%I.%I', n.nspname, c.relname), array_agg(a.attname::text ORDER BY a.attnum),
       array_agg(c.oid || '.' || a.attnum ORDER BY a.attnum)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
WHERE c.relkind IN ('r', 'p') AND c.relpersistence <> 't' AND NOT c.relispartition
  AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' GROUP BY 1
"""
_TABLE = re.compile(r"(?P<head>CREATE [A-Z ]*TABLE [^\n]+ \(\n    )(?P<body>.*?)(?=\n\))", re.DOTALL)


@dataclass(frozen=True)
class RehearsedState:
    """A database's definitions, columns by table and rows by table, without Alembic's own table.

    `columns` maps a column's name to its identity, which a rename keeps and a new column of that name does not have.
    """

    definitions: Mapping[str, str]
    columns: Mapping[str, Mapping[str, str]]
    rows: Mapping[str, int]


@dataclass(frozen=True)
class Passed:
    """One upgrade or downgrade on the copy. `error`: it failed, and the copy may be at a revision in between."""

    direction: Direction
    target: str
    seconds: float
    watched: Watched
    error: str = ""


@dataclass(frozen=True)
class MigrationLoss:
    """The loss of one table: rows, or columns with their values (in at most `rows` rows)."""

    table: str
    rows: int
    columns: tuple[str, ...] = ()
    dropped: bool = False

    @property
    def what(self) -> str:
        """The loss as text."""
        if self.columns:
            return f"columns dropped with their values: {', '.join(self.columns)}"
        return "the table is dropped" if self.dropped else "rows are deleted"


@probe
def read_state(postgres: Postgres, database: str) -> RehearsedState:
    """The state of a database without other users.

    Raises:
        CommandFailed: pg_dump cannot read it.
    """
    definitions = read_schema.work(postgres, database)
    with postgres.connect(database) as connection:
        found = execute(connection, _COLUMNS)
        columns = {str(table): dict(zip(names, kept, strict=True)) for table, names, kept in found}
    rows = dict(read_counts.work(postgres, database).rows)
    return RehearsedState(
        definitions, columns, {table: count for table, count in rows.items() if VERSION_TABLE not in table}
    )


@probe
def read_schema(postgres: Postgres, database: str) -> dict[str, str]:
    """A database's definitions, without Alembic's own table: a downgrade to base keeps it."""
    found = read_definitions(postgres, database)
    return {key: text for key, text in found.items() if VERSION_TABLE not in key}


@probe
def read_live_schema(postgres: Postgres, database: str) -> dict[str, str]:
    """The definitions with invalid indexes, which pg_dump omits: a failed CREATE INDEX CONCURRENTLY leaves one."""
    found = read_schema.work(postgres, database)
    with postgres.connect(database) as connection:
        rows = execute(connection, "SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid ORDER BY 1")
    return {**found, **{f"INDEX {name} (invalid)": "" for (name,) in rows}}


@action
def migrate_rehearsal(
    postgres: Postgres,
    application: Application,
    scratch: str,
    direction: Direction,
    target: str,
    *,
    watch: bool = False,
) -> Passed:
    """One upgrade or downgrade on the copy, in one Alembic call, as it will run on the live database.

    A failed migration is a result, not an error. `watch`: record the locks.

    Raises:
        Unreachable: the server stopped answering, which proves nothing about the migrations.
        VerificationFailed: the live database's revision changed meanwhile.
    """
    live = locks.table_sizes(postgres) if watch else {}
    before = revision_of(postgres, postgres.database)
    seen = False
    if watch:
        with postgres.connect(scratch) as connection:
            seen = locks.install(connection, postgres.user)
    started, error = time.monotonic(), ""
    try:
        command = ("upgrade", target) if direction == "up" else ("downgrade", target or BASE)
        run_alembic(postgres, application, scratch, command)
        error = _missed(revision_of(postgres, scratch), direction, target)
    except OpsError as failed:
        error = failed.message
    seconds = time.monotonic() - started
    failpoint(f"rehearsal: went {direction}")
    watched = Watched(complete=not watch)
    with postgres.connect(scratch) as connection:  # raises if the server is down
        if seen:
            watched = locks.read(connection, direction, live)
            locks.remove(connection)
    if (now := revision_of(postgres, postgres.database)) != before:
        raise VerificationFailed(
            f"{postgres.database} is at {now or BASE} now and was at {before or BASE}: somebody migrated it during the "
            f"rehearsal, or Alembic changed both databases",
            "find the cause (alembic/env.py must use DATABASE_URL), then run this again",
        )
    return Passed(direction, target, seconds, watched, error)


def _missed(revision: str, direction: Direction, target: str) -> str:
    """The error of a copy at another revision than the target; after an upgrade other branches' heads are allowed."""
    reached = revision == target if direction == "down" else target in revision.split(",")
    where = f"the copy is at {revision or BASE} instead of {target or BASE}"
    return "" if reached else f"alembic reported no error, but {where}"


@probe
def compare_schemas(
    postgres: Postgres, scratch: str, expected: Mapping[str, str], found: Mapping[str, str]
) -> tuple[str, ...]:
    """The differences of a scratch database's schema from the expected one, as sentences; PostgreSQL compares texts."""
    ours, theirs = ({key: _in_order(text) for key, text in one.items()} for one in (expected, found))
    equal = compare_definitions.work(postgres, scratch, ours, theirs).equal
    return differences(expected, {key: expected[key] if key in equal else text for key, text in found.items()})


def differences(expected: Mapping[str, str], found: Mapping[str, str]) -> tuple[str, ...]:
    """The differences of two schemas' texts, as sentences.

    The order of a table's columns does not count: a dropped and re-added column is always last.
    """
    missing = [f"{key} is missing" for key in expected if key not in found]
    new = [f"{key} is new" for key in found if key not in expected]
    other = [
        f"{key} differs: {first_difference(text, found[key])}"
        for key, text in expected.items()
        if key in found and _in_order(text) != _in_order(found[key])
    ]
    return (*missing, *new, *other)


def _in_order(text: str) -> str:
    """A table's columns and constraints sorted by name."""
    table = _TABLE.match(text)
    if not table:
        return text
    return table["head"] + ",\n    ".join(sorted(re.split(r",\n    (?=\S)", table["body"]))) + text[table.end() :]


def losses(before: RehearsedState, after: RehearsedState) -> tuple[MigrationLoss, ...]:
    """The rows and columns of the first state that the second lacks.

    A column that is dropped and created again under its name is lost too: its values are only copied if the migration
    does it.
    """
    found = []
    for table, rows in before.rows.items():
        left = after.rows.get(table)
        if left is None or left < rows:
            found.append(MigrationLoss(table, rows - (left or 0), dropped=left is None))
    kept = {column for columns in after.columns.values() for column in columns.values()}
    for table, columns in before.columns.items():
        if table not in after.columns:
            continue  # dropped, with all its rows
        if lost := tuple(name for name, column in columns.items() if column not in kept):
            found.append(MigrationLoss(table, before.rows.get(table, 0), lost))
    return tuple(found)
