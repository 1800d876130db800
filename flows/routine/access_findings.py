"""Findings about access: refusals, log-ins and unusual use of the API (§7.4, セキュリティ)."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from flows.logs.audit import judge_logins
from flows.logs.findings import report_files_read, report_undated
from flows.routine.page import Page
from flows.routine.sources.traffic import Traffic
from runbook import metrics
from runbook.report import Status
from tasks.logs.figures import logins
from tasks.logs.reading.conditions import Conditions
from tasks.logs.reading.files import find_logs
from tasks.logs.reading.source import reading

FAILURES, MINUTES = 10, 10  # the defaults of search-audit-log
SHOWN = 20


def judge_access(page: Page, found: Traffic) -> str:
    """Answers by status. Very many refusals may be an attack."""
    use = found.use
    page.report.table("Answers by status", ("status", "requests", "most of them"), found.statuses)
    page.judge(
        metrics.API_REFUSED,
        use.refused / use.count,
        f"{page.launch('search-logs')} with fields=status>=400 shows who requests what they must not access",
        of=f"{use.refused:,} of {use.count:,} answered 4xx",
        worst=Status.WARN,
    )
    return f"{use.count:,} requests: {use.errors:,} failed (5xx), {use.refused:,} refused (4xx)"


def judge_log_ins(page: Page, days: int) -> str | None:
    """Log-ins of the last days, compared with all earlier ones in the audit log."""
    if not page.names("logs"):
        return None
    env, since = page.env, datetime.now(UTC) - timedelta(days=days)
    wanted = Conditions(logins.FIELDS).holds(logins.LOGIN, "login")
    with reading(
        find_logs(Path(env.logs.need("audit"))), env.zone, fields=logins.FIELDS, names=env.logs.fields
    ) as source:
        bad = source.pick_each(logins=wanted.choice(logins.COLUMNS), undated=wanted.undated())
        report_files_read(page.report, source, bad, of="audit: ")
        report_undated(page.report, source, of="audit: ")
        query = "SELECT count(*), count(*) FILTER (NOT success) FROM logins WHERE time >= $since"
        count, failed = source.rows(query, {"since": since.replace(tzinfo=None)})[0]
        if not count:
            page.not_measured(
                "log-ins",
                f"the audit log has no log-in in the last {days} days",
                "check that log-ins are written to the audit log (§6.4)",
            )
            return None
        judge_logins(page.report, env, source, since, FAILURES, MINUTES)
    return f"{count:,} log-ins in {days} days, {failed:,} failed"


def judge_api_use(page: Page, found: Traffic) -> str:
    """Users by requests, and days on which a user sent far more than usual."""
    report, total = page.report, found.use.count
    report.table(
        f"Users by requests (the first {len(found.users)})",
        ("user", "requests", "share", "days", "5xx", "4xx"),
        [
            (
                one.who or "(nobody logged in)",
                f"{one.count:,}",
                f"{one.count / total:.1%}",
                one.days,
                one.errors,
                one.refused,
            )
            for one in found.users
        ],
    )
    report.table(
        "Unusual days of users",
        ("day", "user", "requests", "usual", "why"),
        [(one.day, one.who, f"{one.count:,}", f"{one.usual:,.0f}", one.why) for one in found.unusual[:SHOWN]],
    )
    known = [one for one in found.users if one.who]
    if not known:
        page.not_measured(
            "API use by user", "no request line has a user_id", "add user_id to the access lines: docs/routine.md"
        )
        return "no user is known"
    told = "; ".join(f"{one.who} on {one.day}: {one.count:,}, {one.why}" for one in found.unusual[:3])
    report.prefer(
        "unusual use of the API",
        not found.unusual,
        "ask these users; run search-audit-log for the addresses: it may be a script, or a stolen login",
        value=told or "none",
    )
    return f"{len(found.unusual)} unusual days of users; most: {known[0].who} with {known[0].count / total:.0%}"
