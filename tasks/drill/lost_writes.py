"""A ledger compared with a database: writes that are lost, that were stored without an answer, or that are unexpected.

Rows are looked up by their text, not by their id: a restored sequence issues ids again.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import psycopg
from psycopg import sql

from blocks.places import Application
from tasks.drill.ledger import DIRECT, WriteAttempt, WriteLedger, text_of

TABLE = "interview_ops_drill"
Connection = psycopg.Connection[tuple[object, ...]]


@dataclass(frozen=True)
class LedgerResult:
    """`lost`: acknowledged writes that are missing. `recovered` of the `indeterminate` writes are stored; the others
    are `unknown`. `unexpected`: rows of refused writes, duplicates, rows that no client wrote."""

    attempted: int
    acknowledged: int
    refused: int
    lost: tuple[WriteAttempt, ...]
    indeterminate: int
    recovered: int
    unexpected: tuple[str, ...] = ()

    @property
    def unknown(self) -> int:
        """Indeterminate writes without a row: never stored, overwritten since, or lost."""
        return self.indeterminate - self.recovered

    @property
    def sentence(self) -> str:
        """`3 of 120 acknowledged writes are not in the database`."""
        text = f"{len(self.lost)} of {self.acknowledged} acknowledged writes are not in the database"
        if self.indeterminate:
            text += f"; {self.indeterminate} more were never answered, {self.recovered} of them are stored"
        return f"{text}; {len(self.unexpected)} rows are unexpected" if self.unexpected else text


def find_lost_writes(ledger: WriteLedger, dsn: str, application: Application) -> LedgerResult:
    """Look up every write of a ledger in a database.

    Raises:
        psycopg.Error: the database cannot be queried.
    """
    with psycopg.connect(dsn) as connection:
        return find_lost_in(ledger, connection, application)


def find_lost_in(ledger: WriteLedger, connection: Connection, application: Application) -> LedgerResult:
    """The same, with a connection to the application's database."""
    attempts = ledger.attempts()
    direct = [attempt for attempt in attempts if attempt.kind in DIRECT]
    through = [attempt for attempt in attempts if attempt.kind not in DIRECT]
    lost, recovered, unexpected = _versions(connection, direct)
    stored = _stored(connection, ledger.prefix, through, application)
    acknowledged = [attempt for attempt in through if attempt.outcome == "acknowledged"]
    refused = {attempt.id for attempt in through if attempt.outcome == "refused"}
    unexpected += [f"{name}: refused, but stored" for name in refused & stored.keys()]
    unexpected += _unexpected_rows(stored, {attempt.id for attempt in through}) if ledger.prefix else []
    outcomes = Counter(attempt.outcome for attempt in attempts)
    return LedgerResult(
        len(attempts),
        outcomes["acknowledged"],
        outcomes["refused"],
        tuple([attempt for attempt in acknowledged if attempt.id not in stored] + lost),
        outcomes["indeterminate"],
        sum(attempt.id in stored for attempt in through if attempt.outcome == "indeterminate") + recovered,
        tuple(unexpected),
    )


def _stored(
    connection: Connection, prefix: str, attempts: Sequence[WriteAttempt], application: Application
) -> Counter[str]:
    """Attempt → the number of rows with its text, in one pass over each table of the writes. With a prefix also rows
    that have the ledger's prefix and are not in it."""
    found = Counter[str]()
    for schema, table, column in dict.fromkeys(step.column for step in application.writes.steps):
        query = sql.SQL("SELECT {column} FROM {table} WHERE starts_with({column}, {begin})").format(
            column=sql.Identifier(column), table=sql.Identifier(schema, table), begin=sql.Literal(text_of(prefix))
        )
        if not prefix:
            texts = [text_of(attempt.id) for attempt in attempts]
            query = sql.SQL("SELECT {column} FROM {table} WHERE {column} = ANY({texts})").format(
                column=sql.Identifier(column), table=sql.Identifier(schema, table), texts=sql.Literal(texts)
            )
        if prefix or attempts:
            found.update(str(text).removeprefix(text_of("")) for (text,) in connection.execute(query))
    return found


def _unexpected_rows(stored: Counter[str], known: set[str]) -> list[str]:
    """Rows with the ledger's prefix that it does not contain, or that are stored twice."""
    return [
        f"{name}: {'stored twice' if name in known else 'no client wrote it'}"
        for name, count in stored.items()
        if name not in known or count > 1
    ]


def _versions(connection: Connection, attempts: Sequence[WriteAttempt]) -> tuple[list[WriteAttempt], int, list[str]]:
    """Direct writes, key by key: the lost ones, the number of unanswered ones that are stored, unexpected rows."""
    rows = dict[str, tuple[int, str]]()
    if attempts and connection.execute("SELECT to_regclass('public.interview_ops_drill')").fetchone() != (None,):
        cursor = connection.execute("SELECT key, version, attempt FROM public.interview_ops_drill")
        rows = {str(key): (int(str(version)), str(name)) for key, version, name in cursor}
    by_key = defaultdict[str, list[WriteAttempt]](list)
    for attempt in attempts:
        by_key[attempt.key].append(attempt)
    lost, recovered, unexpected = list[WriteAttempt](), 0, list[str]()
    for key, done in by_key.items():
        index, problem = _reached(done, rows.get(key))
        if problem:
            unexpected.append(f"{key}: {problem}")
        lost += [attempt for attempt in done[index + 1 :] if attempt.outcome == "acknowledged"]
        recovered += index >= 0 and done[index].outcome == "indeterminate"
    return lost, recovered, unexpected


def _reached(done: Sequence[WriteAttempt], row: tuple[int, str] | None) -> tuple[int, str]:
    """The index of the attempt that a key's row contains, -1 for none; and what is unexpected about the row."""
    if row is None:
        deletes = (index for index, one in enumerate(done) if one.kind == "delete" and one.outcome != "refused")
        return max(deletes, default=-1), ""
    version, name = row
    for index, one in enumerate(done):
        if one.id == name and one.version == version:
            return index, "refused, but stored" if one.outcome == "refused" else ""
    return -1, f"no client wrote version {version}"
