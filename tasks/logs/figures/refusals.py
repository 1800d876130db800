"""Refused requests (429) in the application's log: of users, and by AI providers (§5.3)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from tasks.logs.figures.tokens import call
from tasks.logs.reading.conditions import LEVELS
from tasks.logs.reading.source import LogSource

STATUS = "try_cast(json_extract_string(line, '$.status') AS INTEGER)"
SAID = "concat_ws(' ', message, json_extract_string(line, '$.error'), json_extract_string(line, '$.exception'))"
_WORDS = r"\b429\b|rate.?limit|too many requests|throttl|RESOURCE_EXHAUSTED|quota"
_LEVELS = ", ".join(f"'{word}'" for name in ("WARNING", "ERROR", "CRITICAL") for word in LEVELS[name])
REFUSED = "kind <> 'call'"
COUNTS = "count(*) FILTER (kind = 'user'), count(*) FILTER (kind = 'provider')"
"""Of what was picked with `columns`: refusals, those of users and those by providers."""
USER = f"({STATUS} = 429)"
PROVIDER = f"({STATUS} IS NULL AND upper(trim(level)) IN ({_LEVELS}) AND regexp_matches({SAID}, '(?i){_WORDS}'))"


def refused(ai_message: str) -> str:
    """Lines of refusals, and of AI calls."""
    return f"({USER} OR {PROVIDER} OR {call(ai_message)})"


def columns(ai_message: str) -> dict[str, str]:
    """What is kept of them."""
    return {
        "time": "time",
        "here": "here",
        "kind": f"CASE WHEN {call(ai_message)} THEN 'call' WHEN {USER} THEN 'user' ELSE 'provider' END",
        "who": f"""CASE WHEN {USER} THEN coalesce(user_id, '?')
            ELSE coalesce(json_extract_string(line, '$.provider'),
                          nullif(regexp_extract(message, '(?i)provider (\\w+)', 1), ''), '?') END""",
    }


@dataclass(frozen=True)
class Refusals:
    """Of one user or provider; `most` is the greatest number within a minute, which ended at `most_at`. Times: of the
    operators' zone."""

    kind: str
    who: str
    count: int
    first: datetime
    last: datetime
    most: int
    most_at: datetime
    ended: datetime
    """`last` in UTC, without its zone."""


def read_refusals(source: LogSource) -> tuple[list[Refusals], int]:
    """Of what was picked with `columns` where `refused`: the stormiest first; and how many AI calls succeeded."""
    rows = source.rows(
        """
        SELECT kind, who, count(*), arg_min(here, time), arg_max(here, time), max(n), arg_max(here, n), max(time) FROM (
            SELECT *, count(*) OVER (PARTITION BY kind, who ORDER BY time
                                     RANGE BETWEEN INTERVAL 1 MINUTE PRECEDING AND CURRENT ROW) AS n
            FROM picked WHERE kind <> 'call')
        GROUP BY kind, who ORDER BY max(n) DESC, count(*) DESC, kind, who
        """
    )
    calls = source.rows("SELECT count(*) FROM picked WHERE kind = 'call'")
    return [Refusals(*row) for row in rows], int(calls[0][0])
