"""Escalation (付録C): whoever is on call is told at once, then one level after the other until somebody takes it."""

from __future__ import annotations

import argparse
import sys
from typing import Literal

from prefect import flow

from blocks.environment import Environment
from flows.launch import launch
from flows.monitoring import wording
from flows.monitoring.incident import due_next, go_on, incidents, open_incident, prune, required
from runbook.drivers import exit_code
from runbook.report import Report
from runbook.run import runbook
from tasks.alerts.follow_up import schedule_next
from tasks.alerts.incident import Incident


@flow(name="escalate", flow_run_name="escalate {environment}")
def escalate(
    environment: str,
    severity: Literal["severe", "normal"] = "normal",
    what: str = "",
    owner: str = "",
    run: str = "",
    key: str = "",
) -> Report:
    """エスカレーション (付録C)

    Tells whoever is on call (and the owner's own contacts) at once, the team lead after 15 minutes, the manager after
    30, the executives when it is severe: until somebody acknowledges, and nobody after that. Minutes, people and
    channels are the environment's [alerts]. A channel that fails falls to the next; where none takes the message, the
    report is CRITICAL and says whom to phone. Automations launch it for alerts and failed runs; launch it by hand to
    call for help.

    Without what and run it opens nothing and goes on with what is open: that is its schedule. What is known of an
    incident is a file beside the reports, so it survives the end of this run, of the worker and of Prefect. Killed
    anywhere, the next run goes on: nobody is missed, and at most the person of that moment is told twice.

    It changes nothing else. Acknowledge by acknowledge-incident (the message has the link), or without Prefect by
    python -m flows.monitoring.acknowledgement.

    Args:
        environment: 対象の環境
        severity: 重大度。severe は経営層まで
        what: 何が起きたか (一文)。what と run が空なら、未確認のインシデントの続きだけを行う
        owner: 担当 (SRE, DBA, DevOps, セキュリティ, 開発者, マネージャー など)。空なら run のタグから
        run: 原因となった flow run の ID。空なら what に従う
        key: 同じ key は、解決されるまで一つのインシデントとして扱う。空なら毎回新しいインシデント
    """
    env = Environment.find(environment)
    with runbook("Escalate", env, often=True) as report:
        required(env)
        for error in incidents(env).damaged():
            report.fail("a file of an incident", error.hint, value=error.message)
        new = (
            open_incident(report, env, what=what, severity=severity, owner=owner, run=run, key=key)
            if what or run
            else None
        )
        known = [one for one in incidents(env).open() if not new or one.id != new.id]
        found = [go_on(report, env, one) for one in known] + ([new] if new else [])
        for one in found:
            _follow_up(report, env, one)
        prune(report, env)
        _show(report, env, found)
    return report


def _follow_up(report: Report, env: Environment, found: Incident) -> None:
    """The run that tells the next level, at its minute. Without it the schedule does, up to 5 minutes late."""
    due = due_next(env, found)
    if due and not schedule_next(env.name, found.id, due):
        report.warn(
            "the next level's run",
            "its schedule goes on, every 5 minutes: look that it is active",
            value="not scheduled by itself",
        )
    if found.waiting and not due:
        report.warn(
            f"{found.id} is acknowledged", "everybody was told: phone them, numbers are in [alerts]", value=found.what
        )


def _show(report: Report, env: Environment, found: list[Incident]) -> None:
    rows = [
        (
            one.id,
            wording.SEVERITIES[one.severity],
            one.what,
            wording.moment(env, one.since),
            one.owner,
            one.acknowledged_by or "nobody",
            wording.told(env, one),
        )
        for one in found
    ]
    report.table("Open incidents", ("incident", "severity", "what", "since", "owner", "acknowledged by", "told"), rows)
    report.outcome = f"{len(found)} open, {sum(one.waiting for one in found)} of them not acknowledged"


def main() -> int:
    """`python -m flows.monitoring.escalation --environment NAME …`: also where Prefect died, from cron or by hand."""
    parser = argparse.ArgumentParser(prog="python -m flows.monitoring.escalation")
    parser.add_argument("--environment", required=True)
    parser.add_argument("--severity", choices=["severe", "normal"], default="normal")
    for name in ("what", "owner", "run", "key"):
        parser.add_argument(f"--{name}", default="")
    return launch(escalate, vars(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(exit_code(main))
