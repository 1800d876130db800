"""The weekly check (§7.3)."""

from __future__ import annotations

from prefect import flow

from blocks.environment import Environment
from runbook.report import Report
from runbook.run import runbook


@flow(name="weekly-check", flow_run_name="weekly-check {environment}")
def weekly_check(environment: str) -> Report:
    """週次保守チェック (§7.3)

    The manual's five.

    Args:
        environment: 対象の環境
    """
    env = Environment.find(environment)
    with runbook("Weekly check", env) as report:
        pass
    return report
