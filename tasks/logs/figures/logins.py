"""Unusual log-ins in the audit log (§6.4): many failures, a new address, an hour of the night.

Only what a log itself can tell: it knows no geography, and an attacker who tries once an hour looks like anybody.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from zoneinfo import ZoneInfo

from tasks.logs.reading.source import LogSource, utc

# Fields of a line of the audit log (§6.4).
FIELDS = ("timestamp", "user_id", "action", "resource", "result", "ip_address")
LOGIN = "action = 'login'"
COLUMNS = {
    "time": "time",
    "here": "here",
    "who": "coalesce(nullif(user_id, ''), resource, '')",
    "address": "coalesce(ip_address, '')",
    "success": "result = 'success'",
}
MOST = 200
# Log-ins needed before an address or an hour can be unusual.
KNOWN_LOGINS, KNOWN_HOURS, NIGHT_ENDS = 3, 10, 6


@dataclass(frozen=True)
class Burst:
    """A burst of failures of one `who`, or from one address. `most`: within the window."""

    of: str
    name: str
    most: int
    first: datetime
    last: datetime
    others: int


@dataclass(frozen=True)
class LoggedLogin:
    """A successful log-in, and what is unusual about it."""

    at: datetime
    who: str
    address: str
    why: str


def find_bursts(source: LogSource, since: datetime, failures: int, minutes: int) -> list[Burst]:
    """Of the table `logins` (COLUMNS where LOGIN): failures that ended later than `since`, by address, and by user, the
    most first."""
    found = list[Burst]()
    for of, other in (("address", "who"), ("who", "address")):
        rows = source.rows(
            f"""
            SELECT {of}, max(n), arg_min(here, time), arg_max(here, time), count(DISTINCT {other}) FROM (
                SELECT *, count(*) OVER (PARTITION BY {of} ORDER BY time
                                         RANGE BETWEEN to_minutes($minutes) PRECEDING AND CURRENT ROW) AS n
                FROM logins WHERE NOT success AND time IS NOT NULL)
            GROUP BY {of} HAVING max(n) >= $failures AND max(time) >= $since ORDER BY 2 DESC LIMIT $most
            """,  # noqa: S608 - the two names above
            {"minutes": minutes, "failures": failures, "since": utc(since), "most": MOST},
        )
        found += [Burst(of, *row) for row in rows]
    return found


def find_broken_in(source: LogSource, since: datetime, failures: int, minutes: int) -> list[LoggedLogin]:
    """Log-ins right after so many failures of the same user."""
    rows = source.rows(
        """
        WITH tried AS (
            SELECT who FROM logins WHERE NOT success AND time IS NOT NULL GROUP BY who HAVING count(*) >= $failures)
        SELECT here, who, address, n FROM (
            SELECT *, count(*) FILTER (NOT success) OVER (PARTITION BY who ORDER BY time
                RANGE BETWEEN to_minutes($minutes) PRECEDING AND CURRENT ROW) AS n
            FROM logins WHERE time IS NOT NULL AND who IN (FROM tried))
        WHERE success AND n >= $failures AND time >= $since ORDER BY time LIMIT $most
        """,
        {"minutes": minutes, "failures": failures, "since": utc(since), "most": MOST},
    )
    return [LoggedLogin(at, who, address, f"after {n:,} failures within {minutes} min") for at, who, address, n in rows]


def find_unusual(source: LogSource, since: datetime, zone: ZoneInfo) -> list[LoggedLogin]:
    """Log-ins from an address that the user never came from, or at night (before 6, in the operators' zone) of one who
    never came at night."""
    rows = source.rows(
        """
        WITH known AS MATERIALIZED (
            SELECT here, who, address, time, extract(hour FROM here) < $ends AS night,
                   row_number() OVER (PARTITION BY who ORDER BY time) - 1 AS earlier
            FROM logins WHERE success AND time IS NOT NULL),
        odd AS (
            SELECT who, address, min(earlier) AS earlier, arg_min(here, earlier) AS here, min(time) AS time,
                   true AS elsewhere, false AS late
            FROM known GROUP BY who, address HAVING min(earlier) >= $logins
            UNION ALL
            SELECT who, arg_min(address, earlier), min(earlier), arg_min(here, earlier), min(time), false, true
            FROM known WHERE night GROUP BY who HAVING min(earlier) >= $hours)
        SELECT here, who, address, earlier, bool_or(elsewhere), bool_or(late), time
        FROM odd WHERE time >= $since GROUP BY ALL ORDER BY time LIMIT $most
        """,
        {"logins": KNOWN_LOGINS, "hours": KNOWN_HOURS, "ends": NIGHT_ENDS, "since": utc(since), "most": MOST},
    )
    return [
        LoggedLogin(at, who, address, _why(elsewhere, late, earlier, zone))
        for at, who, address, earlier, elsewhere, late, _ in rows
    ]


def _why(elsewhere: bool, late: bool, earlier: int, zone: ZoneInfo) -> str:
    reasons = ["from a new address"] if elsewhere else []
    reasons += [f"at night ({zone.key})"] if late else []
    return f"{' and '.join(reasons)}, for the first time in {earlier + 1:,} log-ins"
