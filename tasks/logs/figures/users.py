"""The application's users, as its audit log (§6.4) has them: who did something, when first and last, from how many
addresses. Whoever never came is not in it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

from blocks.places import Logs
from runbook.kinds import probe
from tasks.logs.figures.logins import COLUMNS, FIELDS
from tasks.logs.reading.conditions import Conditions
from tasks.logs.reading.files import find_logs
from tasks.logs.reading.source import count_undated, reading


@dataclass(frozen=True)
class UserDays:
    """One user: the number of events and failures, and the most frequent action."""

    who: str
    events: int
    failed: int
    addresses: int
    first: datetime
    last: datetime
    actions: str


@dataclass(frozen=True)
class Users:
    """`bad`: lines that are not JSON; `unreadable`: files that could not be read; `undated`: lines without a time."""

    users: tuple[UserDays, ...]
    bad: int
    unreadable: tuple[str, ...]
    undated: int = 0


@probe
def read_users(logs: Logs, zone: ZoneInfo, since: datetime) -> Users:
    """Users in the audit log since then, also in rotated files, the latest first.

    Raises:
        OpsError: there is no such log, or it cannot be read.
    """
    wanted = Conditions(FIELDS).within(since, None)
    columns = {**COLUMNS, "action": "coalesce(action, '')"}
    with reading(find_logs(Path(logs.need("audit"))), zone, since=since, fields=FIELDS, names=logs.fields) as source:
        bad = source.pick_each(picked=wanted.choice(columns), undated=wanted.undated())
        rows = source.rows(
            "SELECT who, count(*), count(*) FILTER (NOT coalesce(success, false)), count(DISTINCT address), "
            "arg_min(here, time), arg_max(here, time), string_agg(DISTINCT action, ', ' ORDER BY action) "
            "FROM picked WHERE who <> '' GROUP BY who ORDER BY max(time) DESC, who"
        )
        return Users(tuple(UserDays(*row) for row in rows), bad, tuple(source.unreadable), count_undated(source))
