"""The performance review (§7.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

from pydantic import Field

from blocks.environment import Environment
from flows.routine.page import Page
from flows.routine.sources.figures import read_figures
from flows.routine.sources.traffic import Traffic, read_traffic
from flows.routine.sources.trends import judge_trends, show_durations
from runbook import metrics
from runbook.flow import flow
from runbook.page.plots import Bar, bars
from runbook.report import Evidence, Report
from runbook.run import runbook
from runbook.run_name import RunName
from tasks.logs.figures.requests import RequestUse
from tasks.postgres.sessions.statements import Statement, Statements, Waits, read_statements, sample_waits


@flow(name="review-performance", flow_run_name=RunName("review-performance {environment} {days}d"))
def review_performance(environment: str, days: Annotated[int, Field(ge=1, le=366)] = 30) -> Report:
    """パフォーマンスレビュー: レスポンスタイム・エラーレート・スロークエリ・ボトルネックの分析 (§7.1, §7.4)

    Reads the access lines of the last days, also in rotated logs. Shows p50, p95 and p99 of all requests, by path and
    by day, against the alarm's limit and the days before; failed requests; the slowest statements (pg_stat_statements);
    what busy sessions wait for; and trends over past reviews: requests, database, Redis, disks, durations of backups.
    Run it monthly, and before and after a release that may be slower.

    It changes nothing. A value without a source (no access lines, no pg_stat_statements) is WARN, with the way to get
    one. Evidence: tables, CSV files and charts.

    Args:
        environment: Environment (lab, staging, production …)
        days: Days to review. They are compared with as many days before
    """
    env = Environment.find(environment)
    with runbook("Review performance", env) as report:
        page = Page.of(report, env)
        has = page.names("postgres")
        waiting = sample_waits.submit(env.postgres) if has else None
        asked = read_statements.submit(env.postgres) if has else None
        traffic = read_traffic(page, days)
        if traffic:
            report.outcome = judge_response(page, traffic)
            report.fact("failed", judge_error_rate(page, traffic))
            show_paths(page, traffic)
            show_days(page, traffic)
        statements: Statements | None = page.part("slow statements", asked.result) if asked else None
        waits: Waits | None = page.part("waits", waiting.result) if waiting else None
        if statements:
            judge_statements(page, statements)
        if waits:
            report.fact("database", describe_waits(waits))
        report.fact("bottlenecks", judge_bottlenecks(page, traffic, statements, waits))
        judge_trends(page, read_figures(page, traffic))
        show_durations(page)
    return report


SLOWER_TIMES, LEAST_REQUESTS = 1.5, 20
SLOW_STATEMENT_MS, LOCKED_SHARE, LEAST_BUSY = 1000.0, 0.2, 0.5
SHOWN, MOST_DAYS = 30, 62
COLUMNS = ("path", "requests", "p50 ms", "p95 ms", "p99 ms", "longest ms", "share of time", "errors (5xx)", "4xx")


def judge_response(page: Page, found: Traffic) -> str:
    """p95 of all requests against the alarm's limit, slow paths, and the days before."""
    report = page.report
    of = f"the p95 of {found.told}; p50 {found.use.p50:,.0f} ms, p99 {found.use.p99:,.0f} ms"
    page.judge(metrics.API_RESPONSE, found.use.p95 / 1000, "see the slow paths in the table", of=of)
    limit = report.limit(metrics.API_RESPONSE)[0] * 1000
    slow = [(name, use) for name, use in found.paths if use.p95 > limit]
    told = "; ".join(f"{name}: p95 {use.p95 / 1000:.1f} s of {use.count:,}" for name, use in slow[:5])
    report.prefer(
        "slow paths",
        not slow,
        "check their statements in the tables; ask the developers for an index or a cache",
        value=told or "none",
        expected=f"p95 of each at most {limit / 1000:g} s",
    )
    if found.before is None:
        page.report.fact("compared with the days before", "not measured: the log does not reach back far enough")
    else:
        slower = found.use.p95 > SLOWER_TIMES * found.before.p95
        report.prefer(
            "slower than the days before",
            not slower,
            "find the day in the chart, and check what was deployed then",
            value=f"p95 {found.use.p95:,.0f} ms after {found.before.p95:,.0f} ms",
            expected=f"at most {SLOWER_TIMES:g} times",
        )
    return f"p50 {found.use.p50:,.0f} ms, p95 {found.use.p95:,.0f} ms, p99 {found.use.p99:,.0f} ms, {found.told}"


def judge_error_rate(page: Page, found: Traffic) -> str:
    """The share of 5xx answers, and paths with many of them."""
    use = found.use
    hint = page.launch("summarise-errors")
    page.judge(
        metrics.API_ERRORS, use.error_ratio, f"{hint} shows what fails", of=f"{use.errors:,} of {use.count:,} requests"
    )
    limit = page.report.limit(metrics.API_ERRORS)[1]
    bad = [(name, one) for name, one in found.paths if one.count >= LEAST_REQUESTS and one.error_ratio > limit]
    told = "; ".join(f"{name}: {one.error_ratio:.0%} of {one.count:,}" for name, one in bad[:5])
    page.report.prefer(
        "paths that fail",
        not bad,
        f"{hint}; search-logs with fields=path=…",
        value=told or "none",
        expected=f"each at most {limit:.0%}",
    )
    return f"{use.error_ratio:.2%} of {use.count:,} requests failed"


def show_paths(page: Page, found: Traffic) -> None:
    """Requests by path, ordered by total time."""
    import pandas as pd

    total = found.use.total_seconds or 1
    rows = [
        (
            name,
            f"{one.count:,}",
            f"{one.p50:,.0f}",
            f"{one.p95:,.0f}",
            f"{one.p99:,.0f}",
            f"{one.longest:,.0f}",
            f"{one.total_seconds / total:.1%}",
            one.errors,
            one.refused,
        )
        for name, one in found.paths[:SHOWN]
    ]
    whole = pd.DataFrame([{"path": name, **vars(one)} for name, one in found.paths])
    name = f"Paths (the first {len(rows)} by time of {len(found.paths)})"
    page.report.table(name, COLUMNS, rows, csv=whole.to_csv(index=False))


def show_days(page: Page, found: Traffic) -> None:
    """Charts by day."""

    def drawn(
        name: str, value: Callable[[RequestUse], float], text: Callable[[RequestUse], str], unit: str = ""
    ) -> None:
        lines = [Bar(str(day), (value(use),), text(use)) for day, use in found.days[-MOST_DAYS:]]
        page.report.attach(Evidence(f"{name} by day ({page.env.zone.key})", svg=bars(lines, unit)))

    drawn("Response time, p95", lambda use: use.p95, lambda use: f"{use.p95:,.0f} ms", "ms")
    drawn("Requests", lambda use: use.count, lambda use: f"{use.count:,}")
    drawn("Failed requests (5xx)", lambda use: use.errors, lambda use: f"{use.errors:,} ({use.error_ratio:.1%})")


def judge_statements(page: Page, found: Statements) -> str:
    """Slow statements, and the statements with the most total time."""
    import pandas as pd

    report, since = page.report, f"since {found.since} UTC"
    slow = [one for one in found.found if one.mean_ms > SLOW_STATEMENT_MS]
    told = "; ".join(f"{one.mean_ms / 1000:.1f} s × {one.calls:,}: {one.text[:60]}" for one in slow[:3])
    report.prefer(
        "slow statements",
        not slow,
        "run EXPLAIN (ANALYZE, BUFFERS) on them, check-indexes, and check-autovacuum for old statistics",
        value=told or f"none {since}",
        expected=f"mean at most {SLOW_STATEMENT_MS / 1000:g} s",
    )
    if found.hidden:
        page.not_measured(
            "texts of statements",
            f"{found.hidden} are hidden from {page.env.postgres.admin_user}",
            "make it a member of pg_read_all_stats",
        )
    if found.dropped:
        report.fact(
            "statements forgotten", f"{found.dropped:,} times the rarest ones, because pg_stat_statements.max is small"
        )
    report.table(
        f"Statements by time, {since}",
        ("share", "calls", "mean ms", "longest ms", "rows", "blocks read", "temporary blocks", "statement"),
        [_statement(one) for one in found.found[:SHOWN]],
        csv=pd.DataFrame([vars(one) for one in found.found]).to_csv(index=False),
    )
    first = found.found[0] if found.found else None
    return f"{len(slow)} slow; {first.share:.0%} of the time: {first.text[:60]}" if first else f"none {since}"


def _statement(one: Statement) -> tuple[object, ...]:
    return (
        f"{one.share:.1%}",
        f"{one.calls:,}",
        f"{one.mean_ms:,.1f}",
        f"{one.longest_ms:,.1f}",
        f"{one.rows:,}",
        f"{one.read_blocks:,}",
        f"{one.temporary_blocks:,}",
        one.text,
    )


def judge_bottlenecks(page: Page, traffic: Traffic | None, statements: Statements | None, waits: Waits | None) -> str:
    """The paths, statements and waits with the most time."""
    rows = [*_path_rows(traffic), *_statement_rows(statements), *_wait_rows(waits)]
    page.report.table("Where the time goes", ("of", "share", "what", "check"), rows)
    if waits:
        locked = sum(share for event, share in waits.shares if event.startswith("Lock:"))
        page.report.prefer(
            "waiting for locks",
            waits.busy < LEAST_BUSY or locked < LOCKED_SHARE,
            f"{page.launch('check-connections')} shows who blocks whom",
            value=f"{locked:.0%} of {waits.busy:.1f} busy sessions",
            expected=f"under {LOCKED_SHARE:.0%}",
        )
    needed = (("requests", "logs", traffic), ("statements", "postgres", statements), ("waits", "postgres", waits))
    missing = [what for what, part, found in needed if not found and page.names(part)]
    if missing:
        page.not_measured(
            "all places where time goes", f"{', '.join(missing)} could not be read", "fix the findings about them"
        )
    return "; ".join(f"{of}: {what} ({share})" for of, share, what, _ in _firsts(rows)) or "nothing takes any time"


def _firsts(rows: Sequence[tuple[str, str, str, str]]) -> list[tuple[str, str, str, str]]:
    return list({row[0]: row for row in reversed(rows)}.values())[::-1]


def _path_rows(found: Traffic | None) -> list[tuple[str, str, str, str]]:
    total = found.use.total_seconds if found else 0
    paths = found.paths[:5] if found and total else ()
    return [
        (
            "requests",
            f"{use.total_seconds / total:.0%}",
            f"{name}: {use.count:,} × {use.total_seconds * 1000 / use.count:,.0f} ms",
            "p95 against p50: a few slow calls, or all of them",
        )
        for name, use in paths
    ]


def _statement_rows(found: Statements | None) -> list[tuple[str, str, str, str]]:
    return [
        (
            "statements",
            f"{one.share:.0%}",
            f"{one.calls:,} × {one.mean_ms:,.1f} ms: {one.text[:100]}",
            "EXPLAIN (ANALYZE, BUFFERS); blocks read and temporary blocks above",
        )
        for one in (found.found[:5] if found else ())
    ]


_LOOK_AT = {
    "Lock": "check-connections",
    "IO": "the disk, shared_buffers, missing indexes",
    "CPU": "the statements above",
    "Client": "time of the application between statements",
    "LWLock": "many sessions at once",
}


def _wait_rows(found: Waits | None) -> list[tuple[str, str, str, str]]:
    """A row for each wait event."""
    return [
        ("waits", f"{share:.0%}", event, _LOOK_AT.get(event.partition(":")[0], "PostgreSQL's list of wait events"))
        for event, share in (found.shares[:5] if found else ())
    ]


def describe_waits(found: Waits) -> str:
    """The waits in one line."""
    return f"{found.busy:.1f} busy sessions on average of {found.samples} samples"
