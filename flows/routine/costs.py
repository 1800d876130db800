"""The review of costs (§7.1)."""

from __future__ import annotations

from typing import Annotated

from prefect import flow
from pydantic import Field

from blocks.environment import Environment
from runbook.report import Report
from runbook.run import runbook


@flow(name="review-costs", flow_run_name="review-costs {environment}")
def review_costs(environment: str, months: Annotated[int, Field(ge=1, le=12)] = 3) -> Report:
    """コスト最適化レビュー (§7.1, §7.4)

    What is paid for.

    Args:
        environment: 対象の環境
        months: 合計する月数 (今月を含む)
    """
    env = Environment.find(environment)
    with runbook("Review costs", env) as report:
        pass
    return report
