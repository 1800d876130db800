"""Whether the logs are what everything else relies on (§6.1, §6.2, §6.4)."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

from prefect import flow
from pydantic import Field

from blocks.environment import Environment
from flows.logs import check_findings as findings
from flows.logs.steps import Log, path_of, tell_read
from runbook.errors import OpsError
from runbook.report import Report
from runbook.run import runbook
from tasks.logs.files import LogFile, find_logs
from tasks.logs.form import APP, AUDIT, read_form
from tasks.logs.source import reading

REQUIRED = {"app": APP, "audit": AUDIT}


@flow(name="check-logging", flow_run_name="check-logging {environment}")
def check_logging(environment: str, days: Annotated[int, Field(ge=1, le=366)] = 7) -> Report:
    """構造化ログ・ログローテーションの確認 (§6.1, §6.2)

    Looks at both logs: whether their lines are JSON with the manual's fields, times have a zone and the clock is right,
    token counts reach the log, secrets or personal data stand in it; how they are rotated (logrotate asked with -d,
    which changes nothing), whether the application writes to the new file after that, and how long the disk lasts. Run
    it weekly, and after a change of the application's logging.

    It changes nothing. Where logrotate is not installed it says so and goes on.

    Departs from the manual: its formatter reads record.extra, which never exists, so that token counts do not reach the
    log; its RotatingFileHandler and logrotate both rotate the same file. Both are found here.

    Args:
        environment: 対象の環境
        days: 最近この日数に書かれたファイルを調べる
    """
    env = Environment.find(environment)
    with runbook("Check logging", env) as report:
        for log in ("app", "audit"):
            try:
                files = find_logs(Path(path_of(env, log)))
            except OpsError as error:
                report.expect(f"{log}: the log", False, error.hint, value=error.message)
                continue
            _check(report, env, log, files, datetime.now(UTC) - timedelta(days=days))
        findings.judge_handlers(report, env)
        findings.judge_disk(report, env)
    return report


def _check(report: Report, env: Environment, log: Log, files: tuple[LogFile, ...], since: datetime) -> None:
    """One of them."""
    with reading(files, env.zone, since=since, names=env.logs.fields) as source:
        form = read_form(source, REQUIRED[log], env.logs.ai_message)
        tell_read(report, source, form.bad, of=f"{log}: ")
    findings.judge_form(report, env, log, form)
    findings.judge_leaks(report, log, files)
    findings.judge_rotation(report, env, log, files)
