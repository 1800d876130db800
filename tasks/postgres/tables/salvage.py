"""Differences between two databases as SQL and CSV for review, and the SQL applied.

The SQL has one statement a line. An INSERT skips a key that exists by then; an UPDATE skips a row that was written
since the comparison (`xmin`).
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from psycopg import sql

from blocks.postgres.server import Connection, Postgres, execute
from runbook.errors import VerificationFailed
from runbook.failpoint import failpoint
from runbook.guard.permit import Act
from runbook.kinds import action
from runbook.masking import masked_statement
from runbook.units import size
from tasks.postgres.content.keyed import FETCH, Difference, Key, Keyed, Row, differences, whole_rows
from tasks.postgres.tables.checks import advance, require_deferrable, require_references, require_unchanged
from tasks.postgres.tables.dangling import find_dangling
from tasks.postgres.tables.find import FoundTable
from tasks.postgres.tables.session import writing
from tasks.postgres.tables.ties import Ties
from tasks.stores.directory import told

SQL = "salvage.sql"
Differing = Literal["unchanged", "overwrite"]
"""Which rows that differ become UPDATEs: those that were not written in the live database since, or all."""
_HEAD = """-- {title}
-- After a review psql can run it too, as a superuser. Triggers and foreign keys do not act: salvage-writes checks the
-- foreign keys before it commits, and advances sequences; psql does neither.
BEGIN;
SET LOCAL session_replication_role = replica;
SET LOCAL search_path = '';
SET LOCAL DateStyle = 'ISO, MDY';
SET LOCAL IntervalStyle = 'postgres';
SET LOCAL TimeZone = 'UTC';
SET LOCAL lc_monetary = 'C';
SET LOCAL standard_conforming_strings = on;
"""


@dataclass
class CountedRows:
    """One table's rows: only in the source, only in the live database, differing; `conflicts` of the differing were
    written in the live database since."""

    table: str
    missing: int = 0
    live_only: int = 0
    differing: int = 0
    conflicts: int = 0
    inserts: int = 0
    updates: int = 0


class SalvageWriter:
    """The files of one comparison, readable by this user only."""

    def __init__(self, directory: Path, title: str) -> None:
        self.directory = directory
        with told(directory):
            directory.mkdir(mode=0o700, parents=True)
        self.sql = _open(directory / SQL)
        self.sql.write(_HEAD.format(title=title))

    def close(self) -> str:
        """Write the end of the SQL; returns its SHA-256."""
        self.sql.write("COMMIT;\n")
        self.sql.flush()
        os.fsync(self.sql.fileno())
        self.sql.close()
        return digest_of(self.directory / SQL)

    def compare(
        self, source: Connection, live: Connection, keyed: Keyed, since: str, differing: Differing
    ) -> CountedRows:
        """Compare one table and write the differences."""
        counted = CountedRows(keyed.live.name)
        number, safe = len(list(self.directory.iterdir())), re.sub(r"[^\w.-]", "_", keyed.live.name)[:80]
        path = self.directory / f"{number:03d}-{safe}.csv"
        with _open(path) as file:
            table = csv.writer(file)
            table.writerow(["table", "what", "applied", *keyed.written])
            for batch in _batches(differences(source, live, keyed, since)):
                wanted = [one.key for one in batch if one.what != "live only"]
                theirs = [one.key for one in batch if one.what != "source only"]
                ours = whole_rows(source, keyed.source, keyed, wanted)
                rows = whole_rows(live, keyed.live, keyed, theirs)
                for one in batch:
                    statement = self._statement(live, keyed, one, ours, rows, differing)
                    _count(counted, one, statement)
                    self.sql.write(statement)
                    for where, found in (("source", ours.get(one.key)), ("live", rows.get(one.key))):
                        if found:
                            what = f"{one.what} ({where})" if one.what == "differs" else one.what
                            table.writerow([keyed.live.name, what, "yes" if statement else "no", *found])
        return counted

    def _statement(
        self,
        live: Connection,
        keyed: Keyed,
        one: Difference,
        ours: dict[Key, Row],
        theirs: dict[Key, Row],
        differing: Differing,
    ) -> str:
        if one.what == "source only" and (row := ours.get(one.key)):
            return insert(live, keyed, row)
        if one.what == "differs" and (differing == "overwrite" or not one.later):
            return update(live, keyed, one, ours[one.key], theirs[one.key])
        return ""


def _open(path: Path) -> IO[str]:
    with told(path):
        return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8", newline="")


def _batches(found: Iterator[Difference]) -> Iterator[list[Difference]]:
    batch = list[Difference]()
    for one in found:
        batch.append(one)
        if len(batch) == FETCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _count(counted: CountedRows, one: Difference, statement: str) -> None:
    counted.missing += one.what == "source only"
    counted.live_only += one.what == "live only"
    counted.differing += one.what == "differs"
    counted.conflicts += one.what == "differs" and one.later
    counted.inserts += statement.startswith("INSERT")
    counted.updates += statement.startswith("UPDATE")


def insert(connection: Connection, keyed: Keyed, row: Row) -> str:
    """INSERT a row, unless its key exists by then."""
    statement = sql.SQL("INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE VALUES ({}) ON CONFLICT ({}) DO NOTHING;").format(
        _name(keyed),
        sql.SQL(", ").join(map(sql.Identifier, keyed.written)),
        sql.SQL(", ").join(literal(connection, value) for value in row),
        sql.SQL(", ").join(map(sql.Identifier, keyed.key)),
    )
    return statement.as_string(connection) + "\n"


def update(connection: Connection, keyed: Keyed, one: Difference, ours: Row, theirs: Row) -> str:
    """UPDATE the columns that differ, unless the live row was written since the comparison."""
    changed = [(name, new) for name, new, old in zip(keyed.written, ours, theirs, strict=True) if new != old]
    if not changed:  # generated columns follow the others
        return ""
    statement = sql.SQL("UPDATE {} SET {} WHERE {} AND xmin = {};").format(
        sql.SQL("" if keyed.live.partitioned else "ONLY ") + _name(keyed),
        sql.SQL(", ").join(_equal(connection, name, value) for name, value in changed),
        sql.SQL(" AND ").join(_equal(connection, *part) for part in zip(keyed.key, one.key, strict=True)),
        literal(connection, one.version),
    )
    return statement.as_string(connection) + "\n"


def _name(keyed: Keyed) -> sql.Identifier:
    return sql.Identifier(keyed.live.schema, keyed.live.relation)


def _equal(connection: Connection, name: str, value: str | None) -> sql.Composed:
    return sql.SQL("{} = {}").format(sql.Identifier(name), literal(connection, value))


def literal(connection: Connection, value: str | None) -> sql.SQL:
    """An untyped literal on one line."""
    text = sql.Literal(value).as_string(connection).strip()
    if "\n" in text or "\r" in text:
        body = text.removeprefix("E")
        body = body if text.startswith("E") else body.replace("\\", "\\\\")
        text = "E" + body.replace("\n", "\\n").replace("\r", "\\r")
    return sql.SQL(text)


def digest_of(path: Path) -> str:
    """The SHA-256 of a file."""
    with told(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def statements_in(path: Path, digest: str) -> Iterator[str]:
    """The statements of a reviewed file.

    Raises:
        VerificationFailed: the file was changed since.
    """
    if digest_of(path) != digest:
        raise VerificationFailed(
            f"{path} was changed since it was written ({size(path.stat().st_size)})",
            "run it again with reviewed left empty: it compares again",
        )
    with path.open(encoding="utf-8", newline="\n") as file:
        yield from (line for line in file if line.startswith(("INSERT INTO ", "UPDATE ")))


@dataclass
class Ran:
    """Rows inserted and updated, and statements without an effect: the live row was written since the comparison, or
    the statement was applied before. `example` is one of those, its texts masked."""

    inserted: int = 0
    updated: int = 0
    skipped: int = 0
    example: str = ""


def run(connection: Connection, statements: Iterator[str]) -> Ran:
    """Run them in the open transaction."""
    ran = Ran()
    for statement in statements:
        rows = connection.execute(statement.encode()).rowcount
        ran.inserted += rows * statement.startswith("INSERT")
        ran.updated += rows * statement.startswith("UPDATE")
        ran.skipped += not rows
        ran.example = ran.example or (masked_statement(statement) if not rows else "")
    return ran


SALVAGE = "write salvaged rows into"
LOCK_SECONDS = 20


@dataclass(frozen=True)
class Applied:
    """Rows written, and sequences advanced."""

    ran: Ran
    sequences: tuple[str, ...]


@action(of=lambda tables: [Act(SALVAGE, table.name) for table in tables])
def apply_salvage(
    postgres: Postgres, directory: Path, digest: str, tables: Sequence[FoundTable], ties: Ties
) -> Applied:
    """Run the statements of a reviewed file in one transaction.

    Raises:
        VerificationFailed: the file or a table changed since the review, or a row references a missing row.
        OpsError: a lock was not available, or the live database refuses a row. Nothing was changed.
    """
    with writing(postgres, "") as connection, connection.transaction():
        _lock(connection, tables)
        require_unchanged(connection, tables, ties)
        ran = run(connection, statements_in(directory / SQL, digest))
        failpoint("salvage: written")
        require_references(tuple(find_dangling(connection, ties.keys)))
        require_deferrable(connection, tables)
        advanced = tuple(name for one in ties.sequences if (name := advance(connection, one)))
        failpoint("salvage: before commit")
    failpoint("salvage: after commit")
    return Applied(ran, advanced)


def _lock(connection: Connection, tables: Sequence[FoundTable]) -> None:
    """Writers wait, and the checks of foreign keys too: a session that deletes a referenced row must see the rows that
    are written here. In one order, so that two runs cannot deadlock."""
    execute(connection, "SELECT set_config('lock_timeout', %s, true)", f"{LOCK_SECONDS}s")
    for table in sorted(tables, key=lambda table: table.oid):
        name = sql.Identifier(table.schema, table.relation)
        connection.execute(sql.SQL("LOCK TABLE {} IN EXCLUSIVE MODE").format(name))
