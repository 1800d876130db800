"""The daily check (§7.2)."""

from __future__ import annotations

from typing import Literal

from prefect import flow

from blocks.environment import Environment
from runbook.report import Report
from runbook.run import runbook

Part = Literal["all", "health", "backup", "resources"]


@flow(name="daily-check", flow_run_name="daily-check {environment} {part}")
def daily_check(environment: str, part: Part = "all") -> Report:
    """日次保守チェック (§7.2)

    One page for the morning.

    Args:
        environment: 対象の環境
        part: 確認する範囲 (all: すべて、health: ヘルスチェックとエラーログ、backup: バックアップ、resources: リソース)
    """
    env = Environment.find(environment)
    with runbook("Daily check", env) as report:
        pass
    return report
