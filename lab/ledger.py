"""What a writing client was told, on disk before a write is sent; and which of it a database has lost.

A write whose answer never came is counted apart: nobody knows whether it was stored.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Literal

import psycopg

Kind = Literal["session", "message"]
Outcome = Literal["acknowledged", "refused", "indeterminate"]


@dataclass(frozen=True)
class Attempt:
    """One write: `id` is in the row's own text, `key` is the row's id as the application answered it.

    refused: surely not stored. indeterminate: sent, and nobody knows.
    """

    id: str
    kind: Kind
    sent: datetime
    outcome: Outcome = "indeterminate"
    answered: datetime | None = None
    key: str = ""


class Ledger:
    """A file of JSON lines: the intent of every write, on disk before it is sent, and what was answered."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def intend(self, kind: Kind) -> str:
        """Note that a write is about to be sent; returns its unique id."""
        attempt = uuid.uuid4().hex
        self._append({"event": "intent", "id": attempt, "kind": kind})
        os.fsync(self._open().fileno())
        return attempt

    def answer(self, attempt: str, outcome: Outcome, *, key: str = "", why: str = "") -> None:
        """Note what became of it."""
        self._append({"event": "answer", "id": attempt, "outcome": outcome, "key": key, "why": why})

    def close(self) -> None:
        """Everything is on disk."""
        if self._file:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def attempts(self) -> list[Attempt]:
        """Every write in the order of sending. A last line that is torn (the client was killed) tells nothing."""
        found: dict[str, Attempt] = {}
        lines = self.path.read_text(encoding="utf-8").split("\n")[:-1] if self.path.exists() else []
        for line in lines:
            entry = json.loads(line)
            name, at = str(entry["id"]), datetime.fromisoformat(entry["time"])
            if entry["event"] == "intent":
                found[name] = Attempt(name, entry["kind"], at)
            else:
                found[name] = replace(found[name], outcome=entry["outcome"], answered=at, key=entry["key"])
        return list(found.values())

    def acknowledged(self, *, before: datetime | None = None, after: datetime | None = None) -> list[Attempt]:
        """The writes that were acknowledged, before or after a moment."""
        return [
            attempt
            for attempt in self.attempts()
            if attempt.outcome == "acknowledged"
            and attempt.answered
            and (before is None or attempt.answered < before)
            and (after is None or attempt.answered > after)
        ]

    def _append(self, entry: dict[str, str]) -> None:
        file = self._open()
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        file.write(json.dumps({**entry, "time": now}, ensure_ascii=False) + "\n")
        file.flush()

    def _open(self) -> IO[str]:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
        return self._file


@dataclass(frozen=True)
class Lost:
    """What a database holds of a ledger. `stored` are indeterminate writes that turn out to be there."""

    acknowledged: int
    lost: tuple[Attempt, ...]
    indeterminate: int
    stored: int

    @property
    def sentence(self) -> str:
        """For people."""
        text = f"{len(self.lost)} of {self.acknowledged} acknowledged writes are not in the database"
        if not self.indeterminate:
            return text
        return f"{text}; {self.indeterminate} more were never answered, {self.stored} of them are there"


def lost(ledger: Ledger, dsn: str) -> Lost:
    """Look for every write of a ledger in a database.

    By its own text, not by its id alone: a restored sequence gives ids out again.

    Raises:
        psycopg.Error: the database cannot be asked.
    """
    attempts = ledger.attempts()
    acknowledged = [attempt for attempt in attempts if attempt.outcome == "acknowledged"]
    unknown = [attempt for attempt in attempts if attempt.outcome == "indeterminate"]
    with psycopg.connect(dsn) as connection:
        there = _stored(connection, acknowledged)
        # No key to look them up by: one pass over each table.
        found = _by_text(connection, unknown)
    gone = tuple(attempt for attempt in acknowledged if attempt.id not in there)
    return Lost(len(acknowledged), gone, len(unknown), len(found))


def _stored(connection: psycopg.Connection, attempts: Sequence[Attempt]) -> set[str]:
    sessions = {a.key: a.id for a in attempts if a.kind == "session"}
    messages = {a.key: a.id for a in attempts if a.kind == "message"}
    found = connection.execute(
        "SELECT id::text, position FROM public.interview_sessions WHERE id = ANY(%s::uuid[])", [list(sessions)]
    ).fetchall()
    there = {sessions[key] for key, text in found if sessions[key] in text}
    found = connection.execute(
        "SELECT id::text, content FROM public.interview_messages WHERE id = ANY(%s::bigint[])", [list(messages)]
    ).fetchall()
    return there | {messages[key] for key, text in found if messages[key] in text}


def _by_text(connection: psycopg.Connection, attempts: Sequence[Attempt]) -> set[str]:
    if not attempts:
        return set()
    texts = {text_of(attempt.id): attempt.id for attempt in attempts}
    found = connection.execute(
        "SELECT position FROM public.interview_sessions WHERE position = ANY(%(texts)s) "
        "UNION ALL SELECT content FROM public.interview_messages WHERE content = ANY(%(texts)s)",
        {"texts": list(texts)},
    ).fetchall()
    return {texts[row[0]] for row in found}


def text_of(attempt: str) -> str:
    """What a write stores, recognisable for people and programs."""
    return f"書き込み検証 {attempt}"
