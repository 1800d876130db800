"""The review of costs (§7.1)."""

from __future__ import annotations

from datetime import date, datetime
from typing import Annotated

from prefect import flow
from pydantic import Field

from blocks.environment import Environment
from flows.routine import cost_findings as findings
from flows.routine.savings import judge_savings
from flows.routine.steps import Page
from runbook.report import Report
from runbook.run import runbook


@flow(name="review-costs", flow_run_name="review-costs {environment}")
def review_costs(environment: str, months: Annotated[int, Field(ge=1, le=12)] = 4) -> Report:
    """コスト最適化レビュー: クラウドリソース・AIトークン・未使用リソース (§7.1, §7.4)

    What the environment costs, on one page: the cloud's bill and what in it does nothing, containers that take far less
    than they are given, AI tokens against the budget, the sums of the last months; and what is of no use any more
    (databases that restores replaced, old backups and logs, indexes, Docker's leftovers), with bytes and the runbook
    that gives it back. Run it quarterly; the checklist cost_review takes its page.

    It changes nothing. What has no source (no [cloud], no prices) is told as not measured and is in no sum; of a month
    whose log or bill is gone the sum is that of an earlier review, and where a part of it was never seen, or a model
    has no price, it is "at least" that. The four months hold the three of a quarter whole, and the present one so far.

    Args:
        environment: 対象の環境
        months: 合計する月数 (今月を含む)
    """
    env = Environment.find(environment)
    with runbook("Review costs", env) as report:
        page = Page.of(report, env)
        first = _months_ago(datetime.now(env.zone).date(), months - 1)
        bill = findings.judge_resources(page)
        report.fact("AI tokens of this month", findings.judge_tokens(page) or findings.UNKNOWN)
        by_month = (
            page.part("AI tokens by month", lambda: findings.read_months(page, first)) if env.has("logs") else None
        )
        sums = findings.sums(page, first, bill, by_month or {})
        findings.tell_sums(page, sums)
        saved = judge_savings(page)
        report.fact("what could be saved", saved)
        report.outcome = f"{sums[-1].month}: {sums[-1].total}; to be saved: {saved}"
    return report


def _months_ago(today: date, months: int) -> date:
    """The first of a month."""
    number = today.year * 12 + today.month - 1 - months
    return date(number // 12, number % 12 + 1, 1)
