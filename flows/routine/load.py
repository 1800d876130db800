"""How much load the system takes (§7.1)."""

from __future__ import annotations

from typing import Annotated

from prefect import flow
from pydantic import Field

from blocks.environment import Environment
from flows.routine import load_findings as findings
from runbook.errors import OpsError
from runbook.report import Report
from runbook.run import runbook
from tasks.application import wait_healthy
from tasks.faults.disposable import where_disposable
from tasks.load.driving import Load, drive_load, require_load
from tasks.load.saturation import Saturation

BEFORE_SECONDS, AFTER_SECONDS = 60.0, 120.0


@flow(name="run-performance-test", flow_run_name="run-performance-test {environment}")
def run_performance_test(
    environment: str,
    users: Annotated[int, Field(ge=1, le=500)] = 10,
    spawn_rate: Annotated[int, Field(ge=1, le=100)] = 5,
    seconds: Annotated[int, Field(ge=5, le=3600)] = 60,
    ai_answers: Annotated[int, Field(ge=0, le=10000)] = 50,
) -> Report:
    """パフォーマンステスト: 負荷試験 (§7.1)

    Puts users on the application who send the requests of `[application.load_test]` (Locust, as a program of its own),
    and measures p50, p95, p99, errors and requests per second of each endpoint, and what processors,
    connections and Redis do meanwhile. A p95 over 2 s warns, over 5 % of errors are critical (付録B, or the thresholds
    of the environment), and so does what became slower than the last time with the same load. Run it every quarter,
    before a release that changes much, and after resources were changed.

    It runs in a disposable environment only: in the named one, or in that one's drill_environment, where the two share
    no server. What it changes: what its requests write stays behind, with the text 負荷試験 (interview-ops); it holds
    the environment's lock. Each AI answer costs tokens where the providers are real. Undo: none. Evidence:
    endpoints.csv and what Locust wrote, in the report folder under load/.

    Args:
        environment: 対象の環境。disposable でなければ、その drill_environment で実行
        users: 同時利用者数
        spawn_rate: 1秒あたりに増やす利用者数
        seconds: 実行時間 (秒)
        ai_answers: AI応答を求める回数の上限 (実際のプロバイダーでは費用がかかる)
    """
    env = Environment.find(environment)
    target, refusal = _target(env)
    with runbook("Run performance test", target, changes=True) as report:
        if refusal:
            raise refusal
        if target.name != env.name:
            report.fact("asked for", f"{env.name}, whose drill_environment this is")
        _run(report, target, Load(users, spawn_rate, seconds, ai_answers))
    return report


def _target(env: Environment) -> tuple[Environment, OpsError | None]:
    """Where the load goes, and why it may not."""
    try:
        target = where_disposable(env)
    except OpsError as error:
        return env, error
    if target.disposable:
        return target, None
    hint = "name a disposable environment as drill_environment in its TOML, or launch this there"
    if target is env:
        return env, OpsError(f"{env.name} is not disposable: no load is put on it", hint)
    return env, OpsError(f"{target.name}, the drill_environment of {env.name}, is not disposable", hint)


def _run(report: Report, env: Environment, load: Load) -> None:
    require_load(env.application)
    report.fact(findings.FACT, load.told)
    wait_healthy(env.application, seconds=BEFORE_SECONDS)
    directory = env.reports_directory / "load" / f"{report.started:%Y%m%dT%H%M%S}"
    report.fact("evidence", directory)
    taken = Saturation(env)
    driven = drive_load(env.application, load, directory, taken.look)
    findings.tell(report, env, load, driven, taken)
    health = wait_healthy(env.application, seconds=AFTER_SECONDS)
    if health.configured:
        report.expect("healthy after it", True, "", value=health.answer)
    else:
        report.fact("health", health.answer)
