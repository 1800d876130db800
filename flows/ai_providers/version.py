"""The API version that the application uses (§5.1): tried, compared, switched, and switched back."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated

from prefect import flow
from pydantic import Field

from blocks.environment import Environment
from flows.ai_providers import version_steps as steps
from flows.ai_providers.provider_findings import judge_dates, judge_retirement
from flows.ai_providers.steps import told
from runbook import record
from runbook.errors import OpsError
from runbook.permit import Act
from runbook.report import Report
from runbook.run import runbook
from tasks.ai.lifecycle import Dates, read_dates
from tasks.env_file import SET, read_variable

_VERSION = re.compile(r"20\d\d-\d\d-\d\d(-preview)?|v1")


@flow(name="update-ai-api-version", flow_run_name="update-ai-api-version {environment} {version}")
def update_ai_api_version(
    environment: str,
    version: str = "",
    staging: str = "",
    health_seconds: Annotated[float, Field(ge=5, le=600)] = 120,
    plan: str = "",
    confirm: str = "",
) -> Report:
    """APIバージョン更新: Azure OpenAI (§5.1)

    Asks every Azure deployment the same canary on the API version in use and on the new one, compares the shapes of the
    answers, and shows the checklist of breaking changes, the new version's retirement date, and the SDKs of the
    application that are behind. With a permit it then writes the new version into the application's env_file, restarts
    the backend, and lets it answer an interview's question. For production it asks the staging environment's providers.

    What stops it: a deployment that does not answer on the new version, or answers without a field that the application
    reads. Undo: launch it with the old version, which the report names. Where the application is not healthy with the
    new one, the old one is put back at once. Killed in between, launch it again: it goes on. Evidence: the differences,
    the checklist.

    Departs from the manual: the version is written in config.py there; here in the env_file that it reads.

    Args:
        environment: 対象の環境
        version: 新しいAPIバージョン (必須。例 2024-10-21、v1)
        staging: カナリアを実行するステージング環境。本番環境では必須
        health_seconds: 切替後、アプリケーションが正常になるまで待つ秒数
        plan: 計画の指紋。計画レポートのリンクが入力する。空なら計画と照合せずに実行
        confirm: 環境名を入力すると実行。空なら計画だけを表示
    """
    env = Environment.find(environment)
    with runbook("Update AI API version", env, confirm, plan, changes=True) as report:
        if not _VERSION.fullmatch(version):
            raise OpsError(f"“{version[:40]}” is no API version", "write it like 2024-10-21, 2025-04-01-preview or v1")
        env.services.name_of(steps.BACKEND)
        tried = steps.tried_in(env, staging)
        variable, path = env.ai_providers.azure_version_variable, env.reports_directory / steps.FILE
        before = read_variable(env.application, variable, steps.KEY)
        left = record.read(path, steps.HalfDone, "look which version the env_file has, then remove the file")
        if left:
            report.warn("a switch that had not ended", "nothing to do: it is brought to its end",
                        value=f"{left.before} → {left.after}, since {left.since}")  # fmt: skip
        report.fact("API version", f"{before} → {version}, in {env.application.env_file}")
        steps.compare(report, tried.ai_providers, before, version)
        _judge_dates(report, tried, version)
        steps.judge_sdks(report, env)
        steps.judge_variable(report, env, variable)
        if before == version and not left:
            report.outcome = f"{version} is in use already: nothing is switched"
            return report
        old = left.before if left else before
        report.plan(SET, f"{variable}: {before} → {version}", seconds=1)
        report.plan(steps.RESTART, steps.BACKEND, seconds=10)
        report.pin_state(variable, before)
        permit = report.permit(Act(SET, f"{variable} in {env.application.env_file}"), Act(steps.RESTART, steps.BACKEND))
        steps.switch(report, permit, env, old, version, path, health_seconds)
        if old != version:
            report.fact("undo", f"launch it with version={old}")
        report.outcome = f"the application uses {version} (before: {old})"
    return report


def _judge_dates(report: Report, env: Environment, version: str) -> None:
    today, dates = datetime.now(env.zone).date(), dict[str, Dates]()
    with told(report, "the table of retirement dates"):
        dates = read_dates(env.ai_providers)
    judge_retirement(report, f"azure API version {version}", [version], dates.get("azure-api"), None, today)
    judge_dates(report, dates, ["azure-api"], today)
