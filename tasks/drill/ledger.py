"""A client's ledger: each write is on disk before it is sent, then its answer.

A write without an answer is counted separately: it is unknown whether it was stored.
"""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Literal

DIRECT = ("put", "delete")
Outcome = Literal["acknowledged", "refused", "indeterminate"]


@dataclass(frozen=True)
class WriteAttempt:
    """One write. `id` is in the row's text. Through the application: `kind` is the step's title, `key` the answer's. A
    direct write (DIRECT): `key` and `version` of the row.

    refused: not stored. indeterminate: it is unknown whether it was stored.
    """

    id: str
    kind: str
    sent: datetime
    outcome: Outcome = "indeterminate"
    answered: datetime | None = None
    key: str = ""
    version: int = 0
    why: str = ""


class WriteLedger:
    """A file of JSON lines: the intent of every write, on disk before it is sent, and its answer.

    The ids begin with `prefix`, which marks the rows of this ledger.
    """

    def __init__(self, path: Path, prefix: str = "") -> None:
        self.path = path
        self.prefix = prefix
        self._file: IO[str] | None = None

    def intend(self, kind: str, *, key: str = "", version: int = 0) -> str:
        """Record a write before it is sent; returns its unique id."""
        attempt = self.prefix + uuid.uuid4().hex
        self._append({"event": "intent", "id": attempt, "kind": kind, "key": key, "version": version})
        os.fsync(self._open().fileno())
        return attempt

    def answer(self, attempt: str, outcome: Outcome, *, key: str = "", why: str = "") -> None:
        """Record the answer."""
        self._append({"event": "answer", "id": attempt, "outcome": outcome, "key": key, "why": why})

    def close(self) -> None:
        """Flush to disk."""
        if self._file:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def attempts(self) -> list[WriteAttempt]:
        """Every write in the order of sending. An incomplete last line (the client was killed) is ignored."""
        found: dict[str, WriteAttempt] = {}
        lines = self.path.read_text(encoding="utf-8").split("\n")[:-1] if self.path.exists() else []
        for line in lines:
            entry = json.loads(line)
            name, at = str(entry["id"]), datetime.fromisoformat(entry["time"])
            if entry["event"] == "intent":
                found[name] = WriteAttempt(name, entry["kind"], at, key=entry["key"], version=entry["version"])
            else:
                before = found[name]
                key = entry["key"] or before.key
                found[name] = replace(before, outcome=entry["outcome"], answered=at, key=key, why=entry["why"])
        return list(found.values())

    def acknowledged(self, *, before: datetime | None = None, after: datetime | None = None) -> list[WriteAttempt]:
        """Acknowledged writes, before or after a time."""
        return [
            attempt
            for attempt in self.attempts()
            if attempt.outcome == "acknowledged"
            and attempt.answered
            and (before is None or attempt.answered < before)
            and (after is None or attempt.answered > after)
        ]

    def _append(self, entry: dict[str, str | int]) -> None:
        file = self._open()
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        file.write(json.dumps({**entry, "time": now}, ensure_ascii=False) + "\n")
        file.flush()

    def _open(self) -> IO[str]:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
        return self._file


def text_of(attempt: str) -> str:
    """The text that a write stores."""
    return f"書き込み検証 {attempt}"
