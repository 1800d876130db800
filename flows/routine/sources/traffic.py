"""Requests of the last days, read once from the application's log, for those who judge them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from flows.logs.findings import tell_read, tell_undated
from flows.routine.page import Page
from tasks.logs.figures import requests
from tasks.logs.figures.requests import Unusual, Use, User
from tasks.logs.reading.files import find_logs
from tasks.logs.reading.samples import begins_at
from tasks.logs.reading.source import reading


@dataclass(frozen=True)
class Traffic:
    """Of a span, and of one as long before it (None: nothing is known of it). `reaches`: the log begins before that
    span; `unusable`: access lines that tell no status or no time."""

    since: datetime
    until: datetime
    use: Use
    before: Use | None
    reaches: bool
    unusable: int
    paths: Sequence[tuple[str, Use]]
    days: Sequence[tuple[date, Use]]
    statuses: Sequence[tuple[int, int, str]]
    users: Sequence[User]
    unusual: Sequence[Unusual]

    @property
    def told(self) -> str:
        """For people."""
        return f"{self.use.count:,} requests since {self.since:%Y-%m-%d}"


def read_traffic(page: Page, days: int) -> Traffic | None:
    """Of the last days; None where there is no request that could be counted, which is told."""
    if not page.names("logs"):
        return None
    return page.part("requests", lambda: _read(page, days), hint=page.launch("check-logging"))


def _read(page: Page, days: int) -> Traffic | None:
    env, until = page.env, datetime.now(UTC)
    since, before = until - timedelta(days=days), until - timedelta(days=2 * days)
    stamp = env.logs.field("timestamp")
    files = find_logs(Path(env.logs.need("app")))
    with reading(files, env.zone, since=before, names=env.logs.fields) as source:
        wanted = requests.wanted_requests(env.logs, before, until)
        bad = source.pick_each(requests=wanted.choice(requests.COLUMNS), undated=wanted.undated())
        tell_read(page.report, source, bad, of="requests: ")
        tell_undated(page.report, source, of="requests: ")
        use, unusable = requests.read_use(source, since, until), requests.count_unusable(source)
        if use is None:
            why = f"no request line in the last {days} days tells a status and a duration"
            page.not_measured(
                "requests",
                why,
                "the application logs each request with method, path, status and duration_ms: docs/routine.md",
            )
            return None
        found = Traffic(
            since,
            until,
            use,
            requests.read_use(source, before, since),
            (begins_at(files[0], stamp) or until) <= since,
            unusable,
            requests.by_path(source, since),
            requests.by_day(source, since),
            requests.by_status(source, since),
            requests.by_user(source, since),
            requests.unusual_use(source, since),
        )
    if unusable:
        page.report.warn(
            "access lines without a status or a duration",
            "they are in none of the numbers: correct the application's log",
            value=f"{unusable:,}",
        )
    if not found.reaches:
        hint = "the numbers are of what there is; keep rotated logs longer (§6.2: rotate 30)"
        page.log_begins(f"all of {days} days", begins_at(files[0], stamp), hint)
    return found
