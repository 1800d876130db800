"""The steady state before and after a drill (§8.4, preparation): a drill starts only in a healthy system."""

from __future__ import annotations

from pathlib import Path

from blocks.environment import Environment
from flows.recovery.drills import detection
from flows.recovery.drills.scenario import Drill, Scenario
from flows.store import store_for
from runbook.errors import OpsError
from runbook.next import Next
from runbook.report import Report
from runbook.wait import until
from tasks.backups.catalogue import open_all

SETTLE_SECONDS = 120.0


def judge(report: Report, env: Environment, scenario: Scenario, evidence: Path) -> dict[str, str]:
    """Healthy, streaming, with verified backups: findings, CRITICAL where it is not. Returns the boxes of the checklist
    that are done."""
    for name, problem in detection.ask_all(env, evidence).items():
        report.require(
            f"steady state: {name}",
            not problem,
            "fix this first: a drill starts only in a healthy system",
            value=problem or "healthy",
            expected="healthy",
        )
    verified = [_judge_backup(report, env, kind) for kind in scenario.backups]
    scenario.judge(report, env)
    done = {"environment": f"{env.name} is disposable, healthy and streaming"}
    return done | ({"backups": ", ".join(verified)} if verified else {})


def _judge_backup(report: Report, env: Environment, kind: str) -> str:
    """Returns the name of the newest verified backup, "" if there is none."""
    found, problem = "", ""
    try:
        backups, _ = open_all(store_for(env, kind), kind)  # type: ignore[arg-type]
        own = [one for one in backups if one.manifest.environment == env.name and one.verified and not one.failed]
        found = max(own, key=lambda one: one.manifest.taken).name if own else ""
    except OpsError as error:
        problem = error.message
    flow = {"cluster": "backup-cluster", "redis": "backup-redis", "files": "backup-files"}.get(kind, "backup-database")
    report.require(
        f"verified backup: {kind}",
        bool(found),
        f"run {flow}, then verify-backup with kind={kind}",
        value=found or problem or "none",
        expected="one that a restore has proven",
        follow=[Next(flow, "take a backup"), Next("verify-backup", "restore it", {"kind": kind})],
    )
    return found


def wait_settled(drill: Drill, env: Environment) -> None:
    """At the end: no sensor reports a problem.

    Raises:
        Unreachable: one still does.
    """
    last = dict[str, str]()

    def silent() -> bool:
        last.update(detection.quick(env))
        return not any(last.values())

    until(silent, what="a healthy system", seconds=SETTLE_SECONDS, every_seconds=0.5)
    problems = [text for text in detection.ask_all(env, drill.directory / "evidence").values() if text]
    drill.report.require(
        "healthy at the end",
        not problems,
        "fix this before anybody uses the environment",
        value="; ".join(problems) or "no sensor reports a problem",
        expected="no sensor reports a problem",
    )
