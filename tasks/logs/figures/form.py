"""The form of log lines (§6.1, §6.4): fields, zones, clock, and leaked secrets."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from runbook.masking import kinds_in, masked
from tasks.logs.figures.tokens import COLUMNS, call
from tasks.logs.reading.files import LogFile
from tasks.logs.reading.source import LogSource

APP = ("timestamp", "level", "logger", "message", "module", "function", "line")
AUDIT = ("timestamp", "user_id", "action", "resource", "result", "ip_address", "user_agent")
TOKENS = COLUMNS["total"]
SAMPLE_BYTES = 4_000_000
LONGEST = 20_000


@dataclass(frozen=True)
class Form:
    """Lines of one log. `missing`: by field, how many lines lack it; `tokenless`: AI calls without tokens."""

    lines: int
    bad: int
    undated: int
    naive: int
    missing: dict[str, int]
    tokenless: int
    newest: datetime | None

    @property
    def valid_ratio(self) -> float:
        """The share of lines that are JSON objects; 1 without lines."""
        return self.lines / (self.lines + self.bad) if self.lines + self.bad else 1.0


def read_form(source: LogSource, required: Sequence[str], ai_message: str) -> Form:
    """One pass over the lines; `ai_message` as in [logs]."""
    columns = {
        "time": "time",
        "naive": "time IS NOT NULL AND NOT regexp_matches(timestamp, '(?:[Zz]|[+-][0-9]{2}:?(?:[0-9]{2})?)$')",
        "tokenless": f"{call(ai_message)} AND {TOKENS} IS NULL",
        **{f"lacks_{name}": f"NOT json_exists(line, '$.{name}')" for name in required},
    }
    bad = source.pick(columns, "true", {})
    counts = ", ".join(f"count(*) FILTER (lacks_{name})" for name in required)
    row = source.rows(
        "SELECT count(*), count(*) - count(time), count(*) FILTER (naive), count(*) FILTER (tokenless), max(time), "  # noqa: S608
        f"{counts} FROM picked"
    )[0]
    missing = {name: int(count) for name, count in zip(required, row[5:], strict=True) if count}
    return Form(int(row[0]), bad, int(row[1]), int(row[2]), missing, int(row[3]), row[4])


@dataclass(frozen=True)
class Leak:
    """A kind of secret or personal data in a log: its number of lines, and a masked example."""

    kind: str
    lines: int
    example: str


def find_leaks(file: LogFile) -> tuple[list[Leak], int]:
    """Leaks in the newest lines of an uncompressed file, and the number of lines checked.

    Raises:
        OSError: it cannot be read.
    """
    counts, examples = Counter[str](), dict[str, str]()
    with file.path.open("rb") as content:
        content.seek(max(0, file.bytes - SAMPLE_BYTES))
        lines = content.read(SAMPLE_BYTES).splitlines()[1 if file.bytes > SAMPLE_BYTES else 0 :]
    for line in lines:
        text = line[:LONGEST].decode(errors="replace")
        for kind in kinds_in(_unescaped(text)):
            counts[kind] += 1
            examples.setdefault(kind, masked(_unescaped(text))[:200])
    return [Leak(kind, count, examples[kind]) for kind, count in counts.most_common()], len(lines)


def _unescaped(text: str) -> str:
    """The text with JSON's backslash-u escapes decoded."""
    if "\\u" not in text:
        return text
    try:
        return json.dumps(json.loads(text), ensure_ascii=False)
    except ValueError:
        return text
