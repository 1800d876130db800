"""What the monthly checklist says of packages, patches and the database, called with the open page (§7.4)."""

from __future__ import annotations

from datetime import UTC, datetime

from flows.database.autovacuum import judge_tables
from flows.database.index_findings import judge_bloat, judge_duplicates, judge_invalid, judge_unused
from flows.routine.past import MONTHLY, done, is_ahead, judge_last, link, told
from flows.routine.steps import Page
from flows.routine.weekly_findings import LOUD, SCAN, can_scan, judge_alerts
from runbook.render import size
from runbook.report import Status
from tasks.postgres.autovacuum import read_autovacuum
from tasks.postgres.indexes import read_indexes, read_statistics
from tasks.reports import Filed

UPDATE, PATCH = "update-dependencies", "patch-vulnerability"
TESTED_BY = (UPDATE, PATCH, "deploy-application")
STATISTICS_DAYS = 30


def backend_packages(page: Page) -> str | None:
    """pip's, by the last update."""
    return _updated(page, "Backend依存関係更新", "backend") if page.names("application.repository") else None


def frontend_packages(page: Page) -> str | None:
    """pnpm's, by the last update."""
    if not page.names("application.repository", "application.web_directory"):
        return None
    return _updated(page, "Frontend依存関係更新", "web")


def _updated(page: Page, name: str, part: str) -> str | None:
    found = judge_last(page, name, UPDATE, MONTHLY)
    if found is None:
        return None
    rows = [row for row in found.rows("Updated") if row and row[-1] == part]
    return f"{len(rows)} packages updated, on {found.facts.get('branch', 'no branch')}; {found.started:%Y-%m-%d}"


def scan(page: Page) -> str | None:
    """The last one, and what it found."""
    return judge_alerts(page, MONTHLY)


def tests(page: Page) -> str | None:
    """Those of the last update, patch or deployment that ran any."""
    if not page.names("application.repository"):
        return None
    runs = [found[0] for runbook in TESTED_BY if (found := _tested(page, runbook))]
    if not runs:
        hint = f"{page.launch(UPDATE)} runs them, as do {PATCH} and deploy-application"
        page.not_measured("テスト実行", f"no run of the last {MONTHLY.days} days ran the application's tests", hint)
        return None
    newest = max(runs, key=lambda run: run.started)
    link(page, newest.runbook, newest)
    for one in _suites(newest):
        status = Status(one["status"])
        page.report.expect(f"{newest.runbook}: {one['name']}", status is Status.OK, one["hint"] or "see its report",
                           value=one["value"], otherwise=status)  # fmt: skip
    return f"{newest.runbook} of {newest.started:%Y-%m-%d}"


def _tested(page: Page, runbook: str) -> list[Filed]:
    since = datetime.now(UTC) - MONTHLY
    return [one for one in done(page, runbook) if one.started >= since and _suites(one)]


def _suites(one: Filed) -> list[dict[str, str]]:
    return [found for found in one.findings if found["name"].endswith(" tests")]


def patches(page: Page) -> str | None:
    """Nothing high or critical is left by the last scan; or what was patched since."""
    name = "セキュリティパッチ適用"
    if not can_scan(page):
        return None
    scanned, patched = next(done(page, SCAN), None), next(done(page, PATCH), None)
    if scanned is None:
        page.not_measured(name, "nobody knows what is vulnerable", f"{page.launch(SCAN)} finds it")
        return None
    if is_ahead(scanned.started) or datetime.now(UTC) - scanned.started > MONTHLY:
        why = f"the last scan is of {scanned.started:%Y-%m-%d}; nobody knows what was found vulnerable since"
        page.not_measured(name, why, f"{page.launch(SCAN)} finds it")
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
    hint = f"{page.launch(SCAN)} again" if newer else f"{page.launch(PATCH)} for each, and deploy what it makes"
    page.report.expect(name, not loud, hint, value=value, expected="none",
                       otherwise=Status.WARN if newer else Status.CRITICAL)  # fmt: skip
    return value


def vacuum(page: Page) -> str | None:
    """By hand, and whether autovacuum keeps up."""
    if not page.names("postgres"):
        return None
    judge_last(page, "VACUUM実行", "vacuum-database", MONTHLY)
    found = read_autovacuum(page.env.postgres)
    judge_tables(page.report, found)
    behind = sum(table.is_behind for table in found.tables)
    return f"autovacuum keeps up with {len(found.tables) - behind} of {len(found.tables)} tables"


def indexes(page: Page) -> str | None:
    """Invalid, doubled, never scanned, mostly air."""
    if not page.names("postgres"):
        return None
    found = read_indexes(page.env.postgres)
    judge_invalid(page.report, found)
    judge_duplicates(page.report, found)
    judge_unused(page.report, found, read_statistics(page.env.postgres), STATISTICS_DAYS)
    judge_bloat(page.report, found)
    return f"{len(found)} indexes, {size(sum(one.bytes for one in found))}"


def statistics(page: Page) -> str | None:
    """Of every table that has rows: analyzed, and not long before much of it changed."""
    name = "統計情報更新"
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
    page.report.expect(name, not never and not stale, launch, expected="analyzed, and few changes since",
                       value="; ".join([*(f"{one}: never analyzed" for one in never[:5]), *stale[:5]])
                       or f"{len(filled)} tables with rows", otherwise=Status.WARN)  # fmt: skip
    return f"{len(filled)} tables with rows, {len(never)} never analyzed, {len(stale)} stale"
