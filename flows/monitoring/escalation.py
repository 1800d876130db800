"""Escalation (付録C): the on-call engineer at once, then level by level until somebody acknowledges."""

from __future__ import annotations

import argparse
import sys
from typing import Literal

from blocks.environment import Environment
from flows.launch import launch
from flows.monitoring import wording
from flows.monitoring.incident import due_next, go_on, incidents, open_incident, prune, required
from runbook.drivers import exit_code
from runbook.files.journal import find_dead
from runbook.flow import flow
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from tasks.alerts.follow_up import schedule_next
from tasks.alerts.incident import Incident


@flow(name="escalate", flow_run_name=RunName("escalate {environment} {key}"))
def escalate(
    environment: str,
    severity: Literal["severe", "normal"] = "normal",
    what: str = "",
    owner: str = "",
    run: str = "",
    key: str = "",
) -> Report:
    """エスカレーション (付録C)

    Notifies the on-call engineer and the owner's own contacts at once, the team lead after 15 minutes, the manager
    after 30, and the executives if it is severe. It stops when somebody acknowledges. [alerts] of the environment has
    the minutes, people and channels. If a channel fails, the next one is tried. If all fail, the report is CRITICAL and
    names the person to phone. Automations launch it for alerts and failed runs; launch it by hand to call for help.

    Without what and run it opens no incident and continues the open ones: its schedule does that. An incident is a file
    in the report folder, which survives the end of this run, of the worker and of Prefect. If a run is killed, the next
    one continues: nobody is left out, and at most one person is notified twice.

    It changes nothing else. Acknowledge with acknowledge-incident (the message has the link). Without Prefect:
    python -m flows.monitoring.acknowledgement.

    Args:
        environment: Environment (lab, staging, production …)
        severity: Severity. severe: escalates up to the management
        what: What happened, in one sentence. If what and run are empty, only unacknowledged incidents are continued
        owner: Owner: a role of [alerts], such as SRE, DBA or DevOps. Empty: from the run's tags
        run: ID of the flow run that caused it. Empty: use what
        key: The same key means the same incident until it is resolved. Empty: always a new incident
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
        if dead := next((one for one in find_dead(env.reports_directory, env.name) if run and one.run == run), None):
            report.fact("how far the dead run came", dead.text)
        known = [one for one in incidents(env).open() if not new or one.id != new.id]
        found = [go_on(report, env, one) for one in known] + ([new] if new else [])
        for one in found:
            _follow_up(report, env, one)
        prune(report, env)
        _show(report, env, found)
    return report


def _follow_up(report: Report, env: Environment, found: Incident) -> None:
    """Schedule the run that notifies the next level. Without it the schedule does, up to 5 minutes late."""
    due = due_next(env, found)
    if due and not schedule_next(env.name, found.id, due):
        report.warn(
            "the next level's run",
            "check that escalate's schedule is active: it continues the escalation every 5 minutes",
            value="not scheduled",
        )
    if found.waiting and not due:
        report.warn(
            f"{found.id} is acknowledged",
            "phone the contacts in [alerts]: everybody was notified, nobody acknowledged",
            value=found.what,
        )


def _show(report: Report, env: Environment, found: list[Incident]) -> None:
    rows = [
        (
            one.id,
            one.severity,
            one.what,
            wording.moment(env, one.since),
            one.owner,
            one.acknowledged_by or "nobody",
            wording.notified(env, one),
        )
        for one in found
    ]
    report.table(
        "Open incidents", ("incident", "severity", "what", "since", "owner", "acknowledged by", "notified"), rows
    )
    report.outcome = f"{len(found)} open, {sum(one.waiting for one in found)} of them not acknowledged"


def main() -> int:
    """`python -m flows.monitoring.escalation --environment NAME …`: works without Prefect, from cron or by hand."""
    parser = argparse.ArgumentParser(prog="python -m flows.monitoring.escalation")
    parser.add_argument("--environment", required=True)
    parser.add_argument("--severity", choices=["severe", "normal"], default="normal")
    for name in ("what", "owner", "run", "key"):
        parser.add_argument(f"--{name}", default="")
    return launch(escalate, vars(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(exit_code(main))
