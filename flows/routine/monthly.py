"""The monthly maintenance (§7.4)."""

from __future__ import annotations

from prefect import flow

from blocks.environment import Environment
from runbook.report import Report
from runbook.run import runbook


@flow(name="monthly-maintenance", flow_run_name="monthly-maintenance {environment}")
def monthly_maintenance(environment: str) -> Report:
    """月次保守チェックリスト (§7.4)

    All 20 boxes.

    Args:
        environment: 対象の環境
    """
    env = Environment.find(environment)
    with runbook("Monthly maintenance", env) as report:
        pass
    return report
