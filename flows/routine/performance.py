"""The performance review (§7.1)."""

from __future__ import annotations

from typing import Annotated

from prefect import flow
from pydantic import Field

from blocks.environment import Environment
from runbook.report import Report
from runbook.run import runbook


@flow(name="review-performance", flow_run_name="review-performance {environment}")
def review_performance(environment: str, days: Annotated[int, Field(ge=1, le=366)] = 30) -> Report:
    """パフォーマンスレビュー (§7.1)

    Response times, errors, slow queries.

    Args:
        environment: 対象の環境
        days: 対象の日数
    """
    env = Environment.find(environment)
    with runbook("Review performance", env) as report:
        pass
    return report
