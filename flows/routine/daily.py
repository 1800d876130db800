"""The daily check (§7.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from prefect import flow

from blocks.environment import Environment
from flows.recovery.objectives import serves_elsewhere
from flows.routine.backup_findings import judge_backups
from flows.routine.daily_findings import (
    ask_connections,
    ask_health,
    ask_load,
    ask_redis,
    ask_wraparound,
    judge_disks,
    judge_errors,
)
from flows.routine.steps import Page
from runbook.report import Report
from runbook.run import runbook

Part = Literal["all", "health", "backup", "resources"]
Judge = Callable[[], object]
PARTS: Mapping[str, Sequence[Callable[[Page], Judge]]] = {
    "health": (ask_health, lambda page: lambda: judge_errors(page)),
    "backup": (lambda page: lambda: judge_backups(page),),
    "resources": (ask_connections, ask_wraparound, ask_redis, ask_load, lambda page: lambda: judge_disks(page)),
}


@flow(name="daily-check", flow_run_name="daily-check {environment} {part}")
def daily_check(environment: str, part: Part = "all") -> Report:
    """日次保守チェック: ヘルスチェック・エラーログ・バックアップ・リソース使用量の確認 (§7.2)

    The manual's six on one page, asked at the same time: health of backend and frontend; errors of exactly the last 24
    hours; the newest backups, their age against the RPO, and when one was last proven by a restore; every disk that
    data, logs or backups are on; connections of the database with those reserved, and how far its transaction ids are
    from wraparound; Redis' memory against its limit. Each row of the maintenance table launches its `part`. Run it
    every morning.

    It changes nothing. What does not answer is one finding with the runbook to launch next, and the others go on. Parts
    that the environment does not have are left out, and named once.

    Departs from the manual: `jq … | wc -l` counts lines of pretty-printed objects, of the whole file and no rotated
    one; the newest file of a directory says nothing of whether it restores; used memory means nothing without a limit.

    Args:
        environment: 対象の環境
        part: 確認する範囲 (health: ヘルスチェックとエラーログ、backup: バックアップ、resources: リソース)
    """
    env = Environment.find(environment)
    with runbook("Daily check", env) as report:
        if elsewhere := serves_elsewhere(env):
            report.outcome = f"this region does not serve (users are sent to {elsewhere}): nothing to judge"
            return report
        page = Page.of(report, env)
        wanted = [ask for name, asks in PARTS.items() if part in ("all", name) for ask in asks]
        for judge in [ask(page) for ask in wanted]:  # all are asked before the first is waited for
            judge()
        bad = sum(finding.hint != "" for finding in report.findings)
        report.outcome = f"{len(report.findings)} checks, {bad} to look at" if bad else "all is well"
    return report
