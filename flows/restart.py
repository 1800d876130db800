"""Start again the services that a failed or cancelled run had stopped, and report which of them run."""

from __future__ import annotations

from collections.abc import Sequence

from blocks.services.service import Services
from runbook.report import Report
from tasks.host import services as host

NAME = "services started again"


def start_again(report: Report, services: Services, roles: Sequence[str]) -> bool:
    """Start them, in order. A failure here becomes a finding: it must not hide the error that ended the run. Returns
    whether all of them run."""
    if not roles:
        return True
    found = host.start_again(services, roles)
    commands = "; ".join(services.start_command(role) for role in found.problems)
    why = "; ".join(f"{role}: {problem}" for role, problem in found.problems.items())
    return report.require(
        NAME,
        not found.problems,
        f"start by hand what is stopped: {commands}",
        value=f"running: {', '.join(found.running) or 'none'}" + (f"; stopped: {why}" if why else ""),
        expected=f"running: {', '.join(roles)}",
    )
