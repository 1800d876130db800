"""The performance review (§7.1)."""

from __future__ import annotations

from typing import Annotated

from prefect import flow
from pydantic import Field

from blocks.environment import Environment
from flows.routine import performance_findings as findings
from flows.routine.figures import read_figures
from flows.routine.steps import Page
from flows.routine.traffic import read_traffic
from flows.routine.trends import judge_trends
from runbook.report import Report
from runbook.run import runbook
from tasks.postgres.statements import Statements, Waits, read_statements, sample_waits


@flow(name="review-performance", flow_run_name="review-performance {environment}")
def review_performance(environment: str, days: Annotated[int, Field(ge=1, le=366)] = 30) -> Report:
    """パフォーマンスレビュー: レスポンスタイム・エラーレート・スロークエリ・ボトルネックの分析 (§7.1, §7.4)

    Reads the access lines of the last days (rotated logs too): p50, p95 and p99 of all requests and of each path, by
    day, against the alarm and against as many days before; failed ones of all and by path; statements by the time that
    they took (pg_stat_statements) and what busy sessions wait for; where the time goes; and figures over the past
    reviews: requests, database, Redis, disks. Run it monthly, and before and after a release that may be slower.

    It changes nothing. What has no source (no access lines, no pg_stat_statements) is told with how to get one, and is
    never well. Evidence: tables and pictures.

    Args:
        environment: 対象の環境
        days: 対象の日数。直前の同じ日数と比較する
    """
    env = Environment.find(environment)
    with runbook("Review performance", env) as report:
        page = Page.of(report, env)
        has = page.names("postgres")
        waiting = sample_waits.submit(env.postgres) if has else None
        asked = read_statements.submit(env.postgres) if has else None
        traffic = read_traffic(page, days)
        if traffic:
            report.outcome = findings.judge_response(page, traffic)
            report.fact("failed", findings.judge_error_rate(page, traffic))
            findings.tell_paths(page, traffic)
            findings.tell_days(page, traffic)
        statements: Statements | None = page.part("slow statements", asked.result) if asked else None
        waits: Waits | None = page.part("waits", waiting.result) if waiting else None
        if statements:
            findings.judge_statements(page, statements)
        if waits:
            report.fact("database", findings.told_waits(waits))
        report.fact("bottlenecks", findings.judge_bottlenecks(page, traffic, statements, waits))
        judge_trends(page, read_figures(page, traffic))
    return report
