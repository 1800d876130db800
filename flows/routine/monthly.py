"""The monthly maintenance (§7.4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Annotated

from pydantic import Field

from blocks.environment import Environment
from flows.database.upkeep.indexes import judge_bloat, judge_duplicates, judge_invalid, judge_unused
from flows.database.upkeep.vacuum import judge_tables
from flows.routine import access_findings as access
from flows.routine import costs, performance
from flows.routine.checklist.forms import DONE, NOT_APPLICABLE, result_of
from flows.routine.checklist.texts import checklist
from flows.routine.page import NOT_MEASURED, Page
from flows.routine.savings import judge_savings
from flows.routine.sources.figures import read_figures
from flows.routine.sources.past import MONTHLY, done, is_ahead, judge_last, link, told
from flows.routine.sources.traffic import Traffic, read_traffic
from flows.routine.sources.trends import judge_trends, show_durations
from flows.routine.weekly import LOUD, SCAN, can_scan, judge_alerts
from runbook.flow import flow
from runbook.page.render import MARK
from runbook.report import NOT_CONFIGURED, Report, Status
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import size
from tasks.postgres.sessions.statements import Statements, read_statements, sample_waits
from tasks.postgres.upkeep.autovacuum import read_autovacuum
from tasks.postgres.upkeep.indexes import read_indexes, read_statistics
from tasks.reports.past import FiledReport

CHECKLIST = "run-checklist"
JAPANESE = {box.en: box.ja for _, box in checklist("cost_review").boxes}
"""Older reports have Japanese texts."""
QUARTER_DAYS = 100


@flow(name="monthly-maintenance", flow_run_name=RunName("monthly-maintenance {environment} {days}d"))
def monthly_maintenance(environment: str, days: Annotated[int, Field(ge=1, le=366)] = 31) -> Report:
    """月次保守チェックリスト: 依存パッケージ・セキュリティ・データベース・パフォーマンス・コスト (§7.4)

    The manual's 20 boxes in five groups. Each has a current measurement, the last report of its runbook (with date,
    status and path), or a person's answer to the checklist. Tables and charts with the past months follow. Run it
    monthly, after update-dependencies, scan-vulnerabilities, vacuum-database and review-resources.

    It changes nothing: each box names the runbook to launch next. A value without a source is "not measured", never OK.

    Args:
        environment: Environment (lab, staging, production …)
        days: Days of access and audit logs to include
    """
    env = Environment.find(environment)
    with runbook("Monthly maintenance", env) as report:
        page = Page.of(report, env)
        sheet, works = Sheet(page), works_of(page, days)
        for group, boxes in GROUPS.items():
            for box in boxes:
                sheet.fill(group, box, works[box])
        show_durations(page)
        sheet.attach()
        report.outcome = sheet.told
    return report


@dataclass
class Seen:
    """Values that several boxes use."""

    traffic: Traffic | None
    statements: Statements | None = None

    def slow(self, page: Page) -> str | None:
        """Slow statements."""
        if not page.names("postgres"):
            return None
        self.statements = read_statements(page.env.postgres)
        return performance.judge_statements(page, self.statements)

    def bottlenecks(self, page: Page) -> str:
        """Where the time goes."""
        has = page.env.has("postgres")
        waits = page.part("waits", lambda: sample_waits(page.env.postgres)) if has else None
        return performance.judge_bottlenecks(page, self.traffic, self.statements, waits)


def works_of(page: Page, days: int) -> Mapping[str, Work]:
    """The measurement of each box. Values that several boxes use are read once."""
    traffic = read_traffic(page, days)
    seen = Seen(traffic)
    return {
        "Backend dependency updates (pip update)": backend_packages,
        "Frontend dependency updates (pnpm update)": frontend_packages,
        "Vulnerability scan": scan,
        "Tests and functional checks": tests,
        "Security patches": patches,
        "Access log review": _of(traffic, access.judge_access),
        "Unusual log-in patterns": lambda page: access.judge_log_ins(page, days),
        "Unusual use of the API": _of(traffic, access.judge_api_use),
        "VACUUM and autovacuum": vacuum,
        "Index usage": indexes,
        "Slow queries": seen.slow,
        "Planner statistics": statistics,
        "Response time analysis": _of(traffic, _response),
        "Error rate check": _of(traffic, performance.judge_error_rate),
        "Resource usage trends": lambda page: judge_trends(page, read_figures(page, traffic)),
        "Bottleneck analysis": seen.bottlenecks,
        "Cloud resource usage": _resources,
        "AI token usage": costs.judge_tokens,
        "Removal of unused resources": judge_savings,
        "Cost measures carried out": partial(answered, box="Cost measures carried out"),
    }


def _of(traffic: Traffic | None, judge: Callable[[Page, Traffic], str]) -> Work:
    """The measurement of a box about requests; "not measured" if there are none."""

    def work(page: Page) -> str | None:
        if traffic is None:
            if not page.names("logs"):
                return None
            page.not_measured("requests", "no access line could be counted", "fix the findings about the log")
            return None
        return judge(page, traffic)

    return work


def _response(page: Page, traffic: Traffic) -> str:
    performance.show_paths(page, traffic)
    performance.show_days(page, traffic)
    return performance.judge_response(page, traffic)


def _resources(page: Page) -> str | None:
    bill = costs.judge_resources(page)
    return "; ".join(f"{month}: {amount:,.2f}" for month, amount in bill.items()) or None


def answered(page: Page, *, box: str) -> str | None:
    """The last answer of a person to a box of a checklist."""
    for found in done(page, CHECKLIST):
        row = next((row for row in found.rows("Checklist") if len(row) > 5 and row[1] in (box, JAPANESE[box])), None)
        if row is None:
            continue
        result = result_of(row[2])
        link(page, CHECKLIST, found)
        fresh = not is_ahead(found.finished) and (datetime.now(UTC) - found.finished).days <= QUARTER_DAYS
        page.report.prefer(
            box,
            result == DONE and fresh,
            page.launch(CHECKLIST, checklist="cost_review"),
            value="; ".join(filter(None, (f"{result}: {row[3]}, {row[4]}", row[5]))),
            expected=f"{DONE}, within {QUARTER_DAYS} days",
        )
        return f"{result}: {row[3]}"
    page.not_measured(
        box,
        "only a person can answer it, and nobody has",
        page.launch(CHECKLIST, checklist="cost_review") + " asks for it",
    )
    return None


GROUPS: Mapping[str, tuple[str, ...]] = {
    "Dependency updates": (
        "Backend dependency updates (pip update)",
        "Frontend dependency updates (pnpm update)",
        "Vulnerability scan",
        "Tests and functional checks",
    ),
    "Security review": (
        "Security patches",
        "Access log review",
        "Unusual log-in patterns",
        "Unusual use of the API",
    ),
    "Database upkeep": ("VACUUM and autovacuum", "Index usage", "Slow queries", "Planner statistics"),
    "Performance review": (
        "Response time analysis",
        "Error rate check",
        "Resource usage trends",
        "Bottleneck analysis",
    ),
    "Cost review": (
        "Cloud resource usage",
        "AI token usage",
        "Removal of unused resources",
        "Cost measures carried out",
    ),
}
TABLE = "Monthly checklist (§7.4)"
COLUMNS = ("", "group", "box", "result", "next step")
Work = Callable[[Page], str | None]


@dataclass
class Sheet:
    """The boxes of a month. A box has the worst status of its findings."""

    page: Page
    rows: list[tuple[str, str, str, str, str]] = field(default_factory=list)
    worst: list[Status] = field(default_factory=list)
    left_out: int = 0

    def fill(self, group: str, box: str, work: Work) -> None:
        """Fill in a box: `work` adds findings and returns its result in a sentence. Without either, the box is not
        measured. A box about a part that the environment lacks is not applicable."""
        report = self.page.report
        before, self.page.left_out[:] = len(report.findings), []
        told = self.page.part(box, lambda: work(self.page))
        if len(report.findings) == before and not told and self.page.left_out:
            parts = ", ".join(dict.fromkeys(self.page.left_out))
            self.left_out += 1
            self.rows.append((NOT_APPLICABLE, group, box, f"{NOT_CONFIGURED}: {parts}", ""))
            return
        if len(report.findings) == before and not told:
            self.page.not_measured(box, "it has no source here", "fix the report's other findings")
        if len(report.findings) == before:
            report.passed(box, value=told)
        found = report.findings[before:]
        bad = max(found, key=lambda one: list(Status).index(one.status))
        unmeasured = bad.status is not Status.OK and all(
            one.value.startswith(NOT_MEASURED) for one in found if one.status is bad.status
        )
        self.worst.append(bad.status)
        mark = f"{MARK[bad.status]} not measured" if unmeasured else MARK[bad.status]
        seen = told or "" if bad.status is Status.OK else f"{bad.name}: {bad.value}"
        said = "; ".join(dict.fromkeys(text for text in (seen, told or "") if text)) or bad.value
        self.rows.append((mark, group, box, said, bad.hint))

    def attach(self) -> None:
        """Put the table first on the page."""
        report = self.page.report
        report.table(TABLE, COLUMNS, self.rows)
        report.evidence.insert(0, report.evidence.pop())

    @property
    def told(self) -> str:
        """The number of boxes by result."""
        unmeasured = sum(row[0].endswith(NOT_MEASURED) for row in self.rows)
        passed = self.worst.count(Status.OK)
        critical = self.worst.count(Status.CRITICAL)
        rest = len(self.rows) - passed - critical - unmeasured - self.left_out
        return (
            f"{passed} passed, {rest} warnings, {critical} critical, {unmeasured} not measured, "
            f"{self.left_out} not applicable, of {len(self.rows)} boxes"
        )


UPDATE, PATCH = "update-dependencies", "patch-vulnerability"
TESTED_BY = (UPDATE, PATCH, "deploy-application")
STATISTICS_DAYS = 30


def backend_packages(page: Page) -> str | None:
    """Python packages, by the last update."""
    return (
        _updated(page, "Backend dependency updates (pip update)", "backend")
        if page.names("application.repository")
        else None
    )


def frontend_packages(page: Page) -> str | None:
    """Node packages, by the last update."""
    if not page.names("application.repository", "application.web_directory"):
        return None
    return _updated(page, "Frontend dependency updates (pnpm update)", "web")


def _updated(page: Page, name: str, part: str) -> str | None:
    found = judge_last(page, name, UPDATE, MONTHLY)
    if found is None:
        return None
    rows = [row for row in found.rows("Updated") if row and row[-1] == part]
    return f"{len(rows)} packages updated, on {found.facts.get('branch', 'no branch')}; {found.started:%Y-%m-%d}"


def scan(page: Page) -> str | None:
    """The last scan for vulnerabilities."""
    return judge_alerts(page, MONTHLY)


def tests(page: Page) -> str | None:
    """Tests of the last update, patch or deployment that ran any."""
    if not page.names("application.repository"):
        return None
    runs = [found[0] for runbook in TESTED_BY if (found := _tested(page, runbook))]
    if not runs:
        hint = f"{page.launch(UPDATE)} runs them, as do {PATCH} and deploy-application"
        page.not_measured(
            "Tests and functional checks", f"no run of the last {MONTHLY.days} days ran the application's tests", hint
        )
        return None
    newest = max(runs, key=lambda run: run.started)
    link(page, newest.runbook, newest)
    for one in _suites(newest):
        status = Status(one["status"])
        page.report.require(
            f"{newest.runbook}: {one['name']}",
            status is Status.OK,
            one["hint"] or "fix the findings of its report",
            value=one["value"],
            worst=status,
        )
    return f"{newest.runbook} of {newest.started:%Y-%m-%d}"


def _tested(page: Page, runbook: str) -> list[FiledReport]:
    since = datetime.now(UTC) - MONTHLY
    return [one for one in done(page, runbook) if one.started >= since and _suites(one)]


def _suites(one: FiledReport) -> list[dict[str, str]]:
    return [found for found in one.findings if found["name"].endswith(" tests")]


def patches(page: Page) -> str | None:
    """High and critical vulnerabilities of the last scan, and patches since."""
    name = "Security patches"
    if not can_scan(page):
        return None
    scanned, patched = next(done(page, SCAN), None), next(done(page, PATCH), None)
    if scanned is None:
        page.not_measured(name, "no scan was ever done", f"launch the scan: {page.launch(SCAN)}")
        return None
    if is_ahead(scanned.started) or datetime.now(UTC) - scanned.started > MONTHLY:
        why = f"the last scan is of {scanned.started:%Y-%m-%d} and too old"
        page.not_measured(name, why, f"launch the scan: {page.launch(SCAN)}")
        return None
    if patched:
        link(page, PATCH, patched)
    loud = [row for row in scanned.rows("Vulnerabilities") if row and row[0] in LOUD]
    silent = any(one["value"].startswith("not known") for one in scanned.findings)
    if silent and not loud:
        page.not_measured(name, "not every scanner answered", f"{page.launch(SCAN)} again")
        return None
    newer = patched is not None and patched.started > scanned.started
    value = f"{len(loud)} high or critical by the scan of {scanned.started:%Y-%m-%d}"
    value += f"; patched since: {told(patched)}" if newer and patched else ""
    hint = f"{page.launch(SCAN)} again" if newer else f"{page.launch(PATCH)} for each, then deploy the result"
    page.report.require(
        name, not loud, hint, value=value, expected="none", worst=Status.WARN if newer else Status.CRITICAL
    )
    return value


def vacuum(page: Page) -> str | None:
    """The last VACUUM by hand, and whether autovacuum keeps up."""
    if not page.names("postgres"):
        return None
    judge_last(page, "VACUUM and autovacuum", "vacuum-database", MONTHLY)
    found = read_autovacuum(page.env.postgres)
    judge_tables(page.report, found)
    behind = sum(table.is_behind for table in found.tables)
    return f"autovacuum keeps up with {len(found.tables) - behind} of {len(found.tables)} tables"


def indexes(page: Page) -> str | None:
    """Invalid, duplicate, unscanned and bloated indexes."""
    if not page.names("postgres"):
        return None
    found = read_indexes(page.env.postgres)
    judge_invalid(page.report, found)
    judge_duplicates(page.report, found)
    judge_unused(page.report, found, read_statistics(page.env.postgres), STATISTICS_DAYS)
    judge_bloat(page.report, found)
    return f"{len(found)} indexes, {size(sum(one.bytes for one in found))}"


def statistics(page: Page) -> str | None:
    """Planner statistics: every table with rows was analyzed, and has not changed much since."""
    name = "Planner statistics"
    if not page.names("postgres"):
        return None
    found = read_autovacuum(page.env.postgres)
    if not found.counted:
        page.not_measured(name, "track_counts is off", "ALTER SYSTEM SET track_counts = on; SELECT pg_reload_conf()")
        return None
    filled = [table for table in found.tables if table.live or table.rows > 0]
    never = [table.name for table in filled if table.last_times[2:] == ("never", "never")]
    stale = [f"{table.name}: {table.changed:,} rows changed" for table in filled if table.is_stale]
    launch = page.launch("vacuum-database", mode="analyze")
    page.report.prefer(
        name,
        not never and not stale,
        launch,
        expected="analyzed, and few changes since",
        value="; ".join([*(f"{one}: never analyzed" for one in never[:5]), *stale[:5]])
        or f"{len(filled)} tables with rows",
    )
    return f"{len(filled)} tables with rows, {len(never)} never analyzed, {len(stale)} stale"
