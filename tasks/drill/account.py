"""What a database has of a ledger: writes that are lost, that came through unanswered, or that nobody expected.

Looked up by their own text, not by their id alone: a restored sequence gives ids out again.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import psycopg

from tasks.drill.ledger import Attempt, Ledger, text_of

TABLE = "interview_ops_drill"
Connection = psycopg.Connection[tuple[object, ...]]


@dataclass(frozen=True)
class Account:
    """`lost` were acknowledged and are not there. `recovered` of the `indeterminate` are; of the others nobody knows
    (`unknown`). `unexpected` are rows that should not be there: refused, stored twice, of nobody."""

    attempted: int
    acknowledged: int
    refused: int
    lost: tuple[Attempt, ...]
    indeterminate: int
    recovered: int
    unexpected: tuple[str, ...] = ()

    @property
    def unknown(self) -> int:
        """Indeterminate, and not to be seen: never stored, overwritten since, or lost."""
        return self.indeterminate - self.recovered

    @property
    def sentence(self) -> str:
        """For people."""
        text = f"{len(self.lost)} of {self.acknowledged} acknowledged writes are not in the database"
        if self.indeterminate:
            text += f"; {self.indeterminate} more were never answered, {self.recovered} of them are there"
        return f"{text}; {len(self.unexpected)} rows are unexpected" if self.unexpected else text

    def lost_until(self, moment: datetime) -> list[Attempt]:
        """Those lost that were acknowledged by then."""
        return [attempt for attempt in self.lost if attempt.answered and attempt.answered <= moment]


def account_of(ledger: Ledger, dsn: str) -> Account:
    """Look for every write of a ledger in a database.

    Raises:
        psycopg.Error: the database cannot be asked.
    """
    with psycopg.connect(dsn) as connection:
        return account_in(ledger, connection)


def account_in(ledger: Ledger, connection: Connection) -> Account:
    """The same, in a connection to the application's database."""
    attempts = ledger.attempts()
    direct = [attempt for attempt in attempts if attempt.kind in ("put", "delete")]
    through = [attempt for attempt in attempts if attempt.kind in ("session", "message")]
    lost, recovered, unexpected = _versions(connection, direct)
    acknowledged = [attempt for attempt in through if attempt.outcome == "acknowledged"]
    there = _stored(connection, acknowledged)
    found = _by_text(connection, [one for one in through if one.outcome != "acknowledged"])
    refused = {attempt.id for attempt in through if attempt.outcome == "refused"}
    unexpected += [f"{name}: refused, and stored" for name in refused & found]
    unexpected += _strangers(connection, ledger.prefix, {attempt.id for attempt in through})
    outcomes = Counter(attempt.outcome for attempt in attempts)
    return Account(
        len(attempts),
        outcomes["acknowledged"],
        outcomes["refused"],
        tuple([attempt for attempt in acknowledged if attempt.id not in there] + lost),
        outcomes["indeterminate"],
        len(found - refused) + recovered,
        tuple(unexpected),
    )


def _stored(connection: Connection, attempts: Sequence[Attempt]) -> set[str]:
    sessions = {a.key: a.id for a in attempts if a.kind == "session"}
    messages = {a.key: a.id for a in attempts if a.kind == "message"}
    found = connection.execute(
        "SELECT id::text, position FROM public.interview_sessions WHERE id = ANY(%s::uuid[])", [list(sessions)]
    ).fetchall()
    there = {sessions[str(key)] for key, text in found if sessions[str(key)] in str(text)}
    found = connection.execute(
        "SELECT id::text, content FROM public.interview_messages WHERE id = ANY(%s::bigint[])", [list(messages)]
    ).fetchall()
    return there | {messages[str(key)] for key, text in found if messages[str(key)] in str(text)}


def _by_text(connection: Connection, attempts: Sequence[Attempt]) -> set[str]:
    """No key to look them up by: one pass over each table."""
    if not attempts:
        return set()
    texts = {text_of(attempt.id): attempt.id for attempt in attempts}
    found = connection.execute(
        "SELECT position FROM public.interview_sessions WHERE position = ANY(%(texts)s) "
        "UNION ALL SELECT content FROM public.interview_messages WHERE content = ANY(%(texts)s)",
        {"texts": list(texts)},
    ).fetchall()
    return {texts[str(row[0])] for row in found}


def _strangers(connection: Connection, prefix: str, known: set[str]) -> list[str]:
    """Rows with this ledger's prefix that it does not know, or that are there twice."""
    if not prefix:
        return []
    rows = connection.execute(
        "SELECT position FROM public.interview_sessions WHERE starts_with(position, %(text)s) "
        "UNION ALL SELECT content FROM public.interview_messages WHERE starts_with(content, %(text)s)",
        {"text": text_of(prefix)},
    ).fetchall()
    seen = Counter(str(text).removeprefix(text_of("")) for (text,) in rows)
    return [f"{name}: {'stored twice' if name in known else 'of nobody'}" for name, count in seen.items()
            if name not in known or count > 1]  # fmt: skip


def _versions(connection: Connection, attempts: Sequence[Attempt]) -> tuple[list[Attempt], int, list[str]]:
    """Direct writes, key by key: what is lost, how many unanswered ones are there, what is unexpected."""
    rows = dict[str, tuple[int, str]]()
    if attempts and connection.execute("SELECT to_regclass('public.interview_ops_drill')").fetchone() != (None,):
        cursor = connection.execute("SELECT key, version, attempt FROM public.interview_ops_drill")
        rows = {str(key): (int(str(version)), str(name)) for key, version, name in cursor}
    by_key = defaultdict[str, list[Attempt]](list)
    for attempt in attempts:
        by_key[attempt.key].append(attempt)
    lost, recovered, unexpected = list[Attempt](), 0, list[str]()
    for key, done in by_key.items():
        index, problem = _reached(done, rows.get(key))
        if problem:
            unexpected.append(f"{key}: {problem}")
        lost += [attempt for attempt in done[index + 1 :] if attempt.outcome == "acknowledged"]
        recovered += index >= 0 and done[index].outcome == "indeterminate"
    return lost, recovered, unexpected


def _reached(done: Sequence[Attempt], row: tuple[int, str] | None) -> tuple[int, str]:
    """How far a key's history is in the row that was found: the index of the attempt that it shows, -1 for none."""
    if row is None:
        gone = (index for index, one in enumerate(done) if one.kind == "delete" and one.outcome != "refused")
        return max(gone, default=-1), ""
    version, name = row
    for index, one in enumerate(done):
        if one.id == name and one.version == version:
            return index, "refused, and stored" if one.outcome == "refused" else ""
    return -1, f"version {version} of nobody"
