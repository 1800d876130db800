"""Kinds of errors: messages that differ only in numbers, ids and quoted texts are one kind."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from tasks.logs.reading.source import LogSource, utc

MOST_KINDS = 1000
_REPLACED = (
    (r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}", "<uuid>"),
    (r"https?://[^\s\"'']+", "<url>"),
    (r"\"[^\"]*\"|''[^'']*''", "<text>"),
    (r"\b(?:0x[0-9a-fA-F]+|[0-9a-fA-F]*[0-9][0-9a-fA-F]{7,}[0-9a-fA-F]*)\b", "<hex>"),
    (r"[0-9]+(?:[.,:][0-9]+)*", "<n>"),
)


def template(expression: str) -> str:
    """SQL for the kind of a message: its first line without numbers, ids and quoted texts."""
    found = f"left(split_part({expression}, chr(10), 1), 2000)"
    for pattern, name in _REPLACED:
        found = f"regexp_replace({found}, '{pattern}', '{name}', 'g')"
    return found


COLUMNS = {
    "time": "time",
    "here": "here",
    "level": "upper(trim(level))",
    "module": "coalesce(module, logger, '')",
    "kind": template("coalesce(message, '')"),
    "message": "left(message, 1000)",
}


@dataclass(frozen=True)
class Kind:
    """One kind of error in a span of time; `before`: its number in the span before, of the same length."""

    level: str
    text: str
    count: int
    before: int
    modules: str
    first: datetime
    last: datetime
    example: str


def kinds(source: LogSource, since: datetime) -> list[Kind]:
    """What was picked with COLUMNS, the most frequent first: later than `since`, and how many before it; `first` and
    `last` in the operators' zone."""
    rows = source.rows(
        """
        SELECT level, kind, count(*) FILTER (time >= $since), count(*) FILTER (time < $since),
               string_agg(DISTINCT module, ', ' ORDER BY module) FILTER (time >= $since),
               arg_min(here, time) FILTER (time >= $since), arg_max(here, time) FILTER (time >= $since),
               arg_max(message, time)
        FROM picked GROUP BY level, kind HAVING count(*) FILTER (time >= $since) > 0
        ORDER BY 3 DESC, kind LIMIT $most
        """,
        {"since": utc(since), "most": MOST_KINDS},
    )
    return [Kind(*row) for row in rows]
