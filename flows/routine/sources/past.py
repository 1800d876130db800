"""The last results of other runbooks, which a review shows instead of repeating them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta

from flows.routine.page import Page
from runbook import clock
from runbook.report import Status
from runbook.units import duration
from tasks.reports.past import FiledReport, filed

WEEKLY, MONTHLY = timedelta(days=8), timedelta(days=35)
CLOCKS = timedelta(minutes=5)
"""The tolerated difference between the clocks of two hosts."""
AHEAD = "correct the clock of this host, or of the host that wrote it: until then its age is unknown"


def done(page: Page, runbook: str) -> Iterator[FiledReport]:
    """The reports of a runbook, newest first, without plans."""
    return (
        one for one in filed(page.env.reports_directory, page.env.name, runbook) if one.status != Status.PLANNED.value
    )


def told(one: FiledReport) -> str:
    """A report's time, status and outcome in one line."""
    bad = next((found for found in one.findings if found["status"] == Status.CRITICAL.value), None)
    outcome = f"{bad['name']}: {bad['value']}".rstrip(": ") if bad else str(one.content.get("outcome", ""))
    return f"{clock.text(one.started, 'minutes')} {one.status}" + (f" — {outcome[:200]}" if outcome else "")


def is_ahead(moment: datetime) -> bool:
    """Whether a time is in the future: a clock is wrong, and the age is unknown."""
    return moment > clock.now() + CLOCKS


def judge_last(
    page: Page, name: str, runbook: str, within: timedelta, *, grave: bool = False, next_hint: str = "", **form: object
) -> FiledReport | None:
    """A finding about the last run of a runbook: its age against `within`, and its status. A CRITICAL run is a WARN
    here, unless it is `grave`. Returns the report; None: there is none."""
    launch = page.launch(runbook, **form)
    found = next(done(page, runbook), None)
    if found is None:
        page.not_measured(name, f"{runbook} was never launched here", f"{launch} measures it")
        return None
    link(page, runbook, found)
    age = clock.now() - found.started
    expected = f"within {within.days} days"
    if is_ahead(found.started):
        page.report.warn(name, AHEAD, value=f"in the future: {told(found)}", expected=expected)
    elif age > within:
        page.report.warn(
            name,
            f"{launch}, and check its schedule",
            expected=expected,
            value=f"last {duration(age.total_seconds())} ago: {told(found)}",
        )
    elif found.status == Status.OK.value:
        page.report.passed(name, value=told(found), expected=expected)
    else:
        critical = grave and found.status == Status.CRITICAL.value
        page.report.fail(
            name,
            next_hint or f"fix the findings of its report, {found.path.stem}; then {launch}",
            value=told(found),
            expected=expected,
            worst=Status.CRITICAL if critical else Status.WARN,
        )
    return found


def link(page: Page, what: str, found: FiledReport) -> None:
    """Name the report in the page's head."""
    page.report.fact(f"last {what}", f"{clock.text(found.started, 'minutes')} {found.status}: {found.path}")
