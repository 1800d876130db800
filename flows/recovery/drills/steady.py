"""The steady state of §8.4's preparation: nothing is broken on purpose in a system that is broken already."""

from __future__ import annotations

from pathlib import Path

from blocks.environment import Environment
from flows.recovery.drills import detection
from flows.recovery.drills.scenario import Drill, Scenario
from flows.store import store_for
from runbook.errors import OpsError
from runbook.report import Report
from runbook.wait import until
from tasks.backups.catalogue import open_all

SETTLE_SECONDS = 120.0


def judge(report: Report, env: Environment, scenario: Scenario, evidence: Path) -> dict[str, str]:
    """Healthy, streaming, with verified backups; returns what of the checklist that is.

    Raises:
        RunbookFailed: it is not; nothing was touched.
    """
    for name, told in detection.ask_all(env, evidence).items():
        report.require(
            f"steady state: {name}",
            not told,
            "put that right first: a drill begins with a healthy system",
            value=told or "well",
            expected="well",
        )
    verified = [_judge_backup(report, env, kind) for kind in scenario.backups]
    scenario.judge(report, env)
    report.fail_if_critical()
    done = {"environment": f"{env.name} is disposable, healthy and streaming"}
    return done | ({"backups": ", ".join(verified)} if verified else {})


def _judge_backup(report: Report, env: Environment, kind: str) -> str:
    """The newest verified one; a backup that nobody has restored yet is none."""
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
        f"launch {flow}, then verify-backup with kind={kind}",
        value=found or problem or "none",
        expected="one whose restore was proven",
    )
    return found


def wait_settled(drill: Drill, env: Environment) -> None:
    """At the end: every sensor is silent again.

    Raises:
        Unreachable: one is not.
    """
    last = dict[str, str]()

    def silent() -> bool:
        last.update(detection.quick(env))
        return not any(last.values())

    until(silent, what="a healthy system", seconds=SETTLE_SECONDS, every_seconds=0.5)
    problems = {name: told for name, told in detection.ask_all(env, drill.directory / "evidence").items() if told}
    drill.report.require(
        "healthy at the end",
        not problems,
        "heal it before anybody uses it: what is said here first",
        value="; ".join(problems.values()) or "every sensor is silent",
        expected="every sensor is silent",
    )
