"""Requests of the application's log: its access lines (logger, method, path, status, duration_ms, user_id).

Paths that differ in ids only are one path. What took how long is by percentiles, exactly, of all lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime

from blocks.places import Logs
from tasks.logs.figures.refusals import STATUS
from tasks.logs.reading.conditions import Conditions
from tasks.logs.reading.source import LogSource, utc

MOST = 200
_ID = "/(?:[0-9]+|[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12})(/|$)"


def _without_ids(expression: str) -> str:
    """Replaces ids twice: two adjacent ids share the slash between them."""
    for _ in range(2):
        expression = f"regexp_replace({expression}, '{_ID}', '/{{id}}\\1', 'g')"
    return expression


COLUMNS = {
    "time": "time",
    "here": "here",
    "method": "coalesce(json_extract_string(line, '$.method'), '?')",
    "path": _without_ids("split_part(coalesce(json_extract_string(line, '$.path'), '?'), '?', 1)"),
    "status": STATUS,
    "ms": "try_cast(json_extract_string(line, '$.duration_ms') AS DOUBLE)",
    "who": "coalesce(user_id, '')",
}
_COUNTED = "time >= $since AND status IS NOT NULL AND ms IS NOT NULL"


def wanted_requests(logs: Logs, since: datetime, until: datetime) -> Conditions:
    """Access lines of a span of time."""
    wanted = Conditions().within(since, until)
    if logs.access_logger:
        wanted.equals("logger", [logs.access_logger])
    else:
        wanted.holds(f"{STATUS} IS NOT NULL AND {COLUMNS['ms']} IS NOT NULL")
    return wanted


@dataclass(frozen=True)
class RequestUse:
    """Some requests: their number, durations in milliseconds, errors (5xx) and refusals (4xx)."""

    count: int
    p50: float
    p95: float
    p99: float
    longest: float
    total_seconds: float
    errors: int
    refused: int

    @property
    def error_ratio(self) -> float:
        """The share of 5xx answers; 4xx answers are no errors of the server."""
        return self.errors / self.count if self.count else 0.0


_USE = """count(*), quantile_cont(ms, 0.5), quantile_cont(ms, 0.95), quantile_cont(ms, 0.99), max(ms), sum(ms) / 1000,
          count(*) FILTER (status >= 500), count(*) FILTER (status BETWEEN 400 AND 499)"""


def read_use(source: LogSource, since: datetime, until: datetime) -> RequestUse | None:
    """All requests of a span; None: there was none."""
    query = f"SELECT {_USE} FROM requests WHERE {_COUNTED} AND time < $until"  # noqa: S608 - this module's own names
    row = source.rows(query, {"since": utc(since), "until": utc(until)})[0]
    return RequestUse(*row) if row[0] else None


def count_unusable(source: LogSource) -> int:
    """Access lines without a status or a duration, which are not counted."""
    return int(source.rows("SELECT count(*) FROM requests WHERE status IS NULL OR ms IS NULL")[0][0])


def by_path(source: LogSource, since: datetime) -> list[tuple[str, RequestUse]]:
    """`GET /items/{id}` → its requests, ordered by total time."""
    rows = source.rows(
        f"SELECT method || ' ' || path, {_USE} FROM requests WHERE {_COUNTED} "  # noqa: S608
        "GROUP BY 1 ORDER BY sum(ms) DESC, 1 LIMIT $most",
        {"since": utc(since), "most": MOST},
    )
    return [(name, RequestUse(*numbers)) for name, *numbers in rows]


def by_day(source: LogSource, since: datetime) -> list[tuple[date, RequestUse]]:
    """Requests by day of the operators' zone, the earliest first."""
    rows = source.rows(
        f"SELECT CAST(here AS DATE), {_USE} FROM requests WHERE {_COUNTED} GROUP BY 1 ORDER BY 1",  # noqa: S608
        {"since": utc(since)},
    )
    return [(day, RequestUse(*numbers)) for day, *numbers in rows]


def by_status(source: LogSource, since: datetime) -> list[tuple[int, int, str]]:
    """Status → number, and the path with most of them."""
    rows = source.rows(
        "SELECT status, sum(n), arg_max(name, n) FROM (SELECT status, method || ' ' || path AS name, count(*) AS n "
        "FROM requests WHERE status IS NOT NULL AND time >= $since GROUP BY ALL) GROUP BY status ORDER BY status",
        {"since": utc(since)},
    )
    return [(int(status), int(count), name) for status, count, name in rows]


@dataclass(frozen=True)
class UserRequests:
    """Requests of one user; "" are all requests without a log-in."""

    who: str
    count: int
    errors: int
    refused: int
    days: int


def by_user(source: LogSource, since: datetime, most: int = 20) -> list[UserRequests]:
    """Users by their number of requests."""
    rows = source.rows(
        "SELECT who, count(*), count(*) FILTER (status >= 500), count(*) FILTER (status BETWEEN 400 AND 499), "
        "count(DISTINCT CAST(here AS DATE)) FROM requests WHERE time >= $since GROUP BY who ORDER BY 2 DESC, 1 "
        "LIMIT $most",
        {"since": utc(since), "most": most},
    )
    return [UserRequests(*row) for row in rows]


@dataclass(frozen=True)
class Unusual:
    """An unusual day of a user, and why. `usual`: requests of a usual day."""

    day: date
    who: str
    count: int
    usual: float
    why: str


# A day is unusual with so many times the median of the user's earlier days (five at least); for a new user, compared
# with nearly all days of all users. Fewer requests are harmless.
TIMES, LEAST_DAYS, LEAST_REQUESTS, NEARLY_ALL = 5.0, 5, 200, 0.95
# So many refusals (4xx) a day, and most of the user's requests: perhaps an attack.
LEAST_REFUSED, REFUSED_SHARE = 50, 0.5


def unusual_use(source: LogSource, since: datetime) -> list[Unusual]:
    """Days of users with far more requests than usual, or with mostly refusals; the newest first."""
    rows = source.rows(
        """
        WITH days AS (
            SELECT who, CAST(here AS DATE) AS day, count(*) AS n,
                   count(*) FILTER (status BETWEEN 400 AND 499) AS refused
            FROM requests WHERE time IS NOT NULL GROUP BY ALL),
        histories AS (
            SELECT *, median(n) OVER before AS own, count(*) OVER before >= $days AS known FROM days
            WINDOW before AS (PARTITION BY who ORDER BY day ROWS BETWEEN 28 PRECEDING AND 1 PRECEDING)),
        judged AS (
            SELECT *, CASE WHEN known THEN own ELSE (SELECT quantile_cont(n, $nearly) FROM days) END AS usual
            FROM histories)
        SELECT day, who, n, usual, refused, n >= $least AND n > $times * usual AS much, known FROM judged
        WHERE day >= CAST($since AS DATE) AND who <> ''
              AND (n >= $least AND n > $times * usual OR refused >= $refused AND refused > $share * n)
        ORDER BY day DESC, n DESC LIMIT $most
        """,
        {
            "since": since.astimezone(source.zone).replace(tzinfo=None),
            "times": TIMES,
            "days": LEAST_DAYS,
            "least": LEAST_REQUESTS,
            "refused": LEAST_REFUSED,
            "share": REFUSED_SHARE,
            "nearly": NEARLY_ALL,
            "most": MOST,
        },
    )
    return [
        Unusual(day, who, n, float(usual), _why(much, known, refused, n))
        for day, who, n, usual, refused, much, known in rows
    ]


def _why(much: bool, known: bool, refused: int, count: int) -> str:
    if much:
        return "far more than on the days before" if known else "far more than others, and hardly known"
    return f"{refused:,} of {count:,} were refused"
