"""Acknowledging and resolving an incident (付録C)."""

from __future__ import annotations

import argparse
import sys
from typing import Literal

from blocks.environment import Environment
from flows.launch import launch
from flows.monitoring.incident import acknowledge, resolve
from runbook.drivers import exit_code
from runbook.flow import flow
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName


@flow(name="acknowledge-incident", flow_run_name=RunName("acknowledge-incident {environment} {action} {incident}"))
def acknowledge_incident(
    environment: str,
    by: str,
    incident: str = "",
    note: str = "",
    action: Literal["acknowledge", "resolve"] = "acknowledge",
) -> Report:
    """インシデントの確認・解決 (付録C)

    Records who handles an incident. This stops the escalation, and everybody who was notified learns who handles it.
    With resolve the incident is closed: the same alert then opens a new one. An alert's message links this form, filled
    in except for your name. The link works as long as the incident is open, also after restarts.

    It changes nothing else. The first acknowledgement counts. Undo: launch escalate with the same what.

    Without Prefect: python -m flows.monitoring.acknowledgement --environment NAME --incident ID --by NAME.

    Args:
        environment: Environment (lab, staging, production …)
        by: Name of the person who responds
        incident: ID or key of the incident. Empty: the only one that is open
        note: Note for the people who were notified. May be empty
        action: acknowledge: work has begun; resolve: it is solved
    """
    env = Environment.find(environment)
    with runbook("Acknowledge incident", env) as report:
        work = acknowledge if action == "acknowledge" else resolve
        found = work(report, env, incident.strip(), by, note.strip())
        report.outcome = f"{found.id} is {'acknowledged' if found.open else 'resolved'}: {found.what}"
    return report


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m flows.monitoring.acknowledgement")
    parser.add_argument("--environment", required=True)
    parser.add_argument("--incident", default="", help="its id or key; default: the only open incident")
    parser.add_argument("--by", required=True, help="your name")
    parser.add_argument("--note", default="")
    parser.add_argument("--action", choices=["acknowledge", "resolve"], default="acknowledge")
    return launch(acknowledge_incident, vars(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(exit_code(main))
