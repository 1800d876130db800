"""Requests of the last days, read once from the application's log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from flows.logs.findings import report_files_read, report_undated
from flows.routine.page import Page
from tasks.logs.figures import requests
from tasks.logs.figures.requests import RequestUse, Unusual, UserRequests
from tasks.logs.reading.files import find_logs
from tasks.logs.reading.samples import begins_at
from tasks.logs.reading.source import reading


@dataclass(frozen=True)
class Traffic:
    """Requests of a span, and of the span before it (None: no data). `reaches`: the log covers the whole span;
    `unusable`: access lines without a status or a duration."""

    since: datetime
    until: datetime
    use: RequestUse
    before: RequestUse | None
    reaches: bool
    unusable: int
    paths: Sequence[tuple[str, RequestUse]]
    days: Sequence[tuple[date, RequestUse]]
    statuses: Sequence[tuple[int, int, str]]
    users: Sequence[UserRequests]
    unusual: Sequence[Unusual]

    @property
    def told(self) -> str:
        """The number of requests, in words."""
        return f"{self.use.count:,} requests since {self.since:%Y-%m-%d}"


def read_traffic(page: Page, days: int) -> Traffic | None:
    """The requests of the last days; None, and a finding, if none can be counted."""
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
        report_files_read(page.report, source, bad, of="requests: ")
        report_undated(page.report, source, of="requests: ")
        use, unusable = requests.read_use(source, since, until), requests.count_unusable(source)
        if use is None:
            why = f"no request line in the last {days} days has a status and a duration"
            page.not_measured(
                "requests",
                why,
                "log each request with method, path, status and duration_ms: docs/routine.md",
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
            "correct the application's log: these lines are not counted",
            value=f"{unusable:,}",
        )
    if not found.reaches:
        hint = "keep rotated logs longer (§6.2: rotate 30): these numbers cover a part of the span"
        page.log_begins(f"all of {days} days", begins_at(files[0], stamp), hint)
    return found
