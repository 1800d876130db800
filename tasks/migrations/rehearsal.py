"""One way up or down on a scratch copy, what it does to schema and rows, and how two such states differ."""

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
class State:
    """What a database consists of: definitions, columns by table, rows by table. Alembic's own table is left out.

    A column's name leads to its identity: what it keeps when it is renamed, and one that takes its name has not.
    """

    definitions: Mapping[str, str]
    columns: Mapping[str, Mapping[str, str]]
    rows: Mapping[str, int]


@dataclass(frozen=True)
class Passed:
    """One way on the copy. `error` where it failed: the copy is where it was then, or somewhere on the way."""

    direction: Direction
    target: str
    seconds: float
    watched: Watched
    error: str = ""


@dataclass(frozen=True)
class Loss:
    """What a table loses: rows, or columns with what is in them (in `rows` rows at most)."""

    table: str
    rows: int
    columns: tuple[str, ...] = ()
    dropped: bool = False

    @property
    def what(self) -> str:
        """For people."""
        if self.columns:
            return f"columns dropped with what is in them: {', '.join(self.columns)}"
        return "the table is dropped" if self.dropped else "rows are deleted"


@probe
def read_state(postgres: Postgres, database: str) -> State:
    """The state of a database that nobody changes.

    Raises:
        CommandFailed: pg_dump cannot read it.
    """
    definitions = read_schema.work(postgres, database)
    with postgres.connect(database) as connection:
        found = execute(connection, _COLUMNS)
        columns = {str(table): dict(zip(names, kept, strict=True)) for table, names, kept in found}
    rows = dict(read_counts.work(postgres, database).rows)
    return State(definitions, columns, {table: count for table, count in rows.items() if VERSION_TABLE not in table})


@probe
def read_schema(postgres: Postgres, database: str) -> dict[str, str]:
    """A database's definitions, but for Alembic's own table: a downgrade to base leaves it."""
    found = read_definitions(postgres, database)
    return {key: text for key, text in found.items() if VERSION_TABLE not in key}


@probe
def read_live_schema(postgres: Postgres, database: str) -> dict[str, str]:
    """The same with indexes that are invalid, which pg_dump passes over: a cut CREATE INDEX CONCURRENTLY leaves one."""
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
    """Up or down on the copy with one call of Alembic's, as it will run on the live database. A failing migration is an
    answer, not an error. `watch`: write down the locks.

    Raises:
        Unreachable: the server went away, which says nothing about the migrations.
        VerificationFailed: the live database is at another revision than before.
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
        error = _where(revision_of(postgres, scratch), direction, target)
    except OpsError as failed:
        error = failed.message
    seconds = time.monotonic() - started
    failpoint(f"rehearsal: went {direction}")
    watched = Watched(complete=not watch)
    with postgres.connect(scratch) as connection:  # raises where the server is gone
        if seen:
            watched = locks.read(connection, direction, live)
            locks.remove(connection)
    if (now := revision_of(postgres, postgres.database)) != before:
        raise VerificationFailed(
            f"{postgres.database} is at {now or BASE} by now, and was at {before or BASE}: somebody migrated it while "
            f"{scratch} was, or Alembic came to both",
            "look who did (alembic/env.py must take its address from DATABASE_URL), then launch this again",
        )
    return Passed(direction, target, seconds, watched, error)


def _where(revision: str, direction: Direction, target: str) -> str:
    """Why the copy is not where it was to go; another branch's head may stand beside what an upgrade led to."""
    reached = revision == target if direction == "down" else target in revision.split(",")
    return "" if reached else f"alembic said nothing, yet the copy is at {revision or BASE} instead of {target or BASE}"


@probe
def compare_schemas(
    postgres: Postgres, scratch: str, expected: Mapping[str, str], found: Mapping[str, str]
) -> tuple[str, ...]:
    """How the schema of a scratch database differs from the expected one, as sentences. PostgreSQL judges the texts."""
    ours, theirs = ({key: _in_order(text) for key, text in one.items()} for one in (expected, found))
    equal = compare_definitions.work(postgres, scratch, ours, theirs).equal
    return differences(expected, {key: expected[key] if key in equal else text for key, text in found.items()})


def differences(expected: Mapping[str, str], found: Mapping[str, str]) -> tuple[str, ...]:
    """How two schemas' texts differ, as sentences. The order of a table's columns does not count: nothing brings a
    dropped column back to its place."""
    gone = [f"{key} is gone" for key in expected if key not in found]
    new = [f"{key} is new" for key in found if key not in expected]
    other = [
        f"{key} differs: {first_difference(text, found[key])}"
        for key, text in expected.items()
        if key in found and _in_order(text) != _in_order(found[key])
    ]
    return (*gone, *new, *other)


def _in_order(text: str) -> str:
    """A table's columns and constraints sorted by name."""
    table = _TABLE.match(text)
    if not table:
        return text
    return table["head"] + ",\n    ".join(sorted(re.split(r",\n    (?=\S)", table["body"]))) + text[table.end() :]


def losses(before: State, after: State) -> tuple[Loss, ...]:
    """What is in one state and no longer in the other: rows of tables that are gone or have fewer, and columns. One
    that is dropped and made anew under its name is lost too: only the migration could have copied what was in it."""
    found = []
    for table, rows in before.rows.items():
        left = after.rows.get(table)
        if left is None or left < rows:
            found.append(Loss(table, rows - (left or 0), dropped=left is None))
    kept = {column for columns in after.columns.values() for column in columns.values()}
    for table, columns in before.columns.items():
        if table not in after.columns:
            continue  # it is dropped, with all its rows
        if gone := tuple(name for name, column in columns.items() if column not in kept):
            found.append(Loss(table, before.rows.get(table, 0), gone))
    return tuple(found)
