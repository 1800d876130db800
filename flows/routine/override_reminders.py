"""Temporary settings whose time is over (appendix A): somebody must hear that they are to be undone."""

from __future__ import annotations

from datetime import date

from blocks.environment import Environment
from runbook.errors import OpsError
from runbook.report import Report
from tasks.setting_records import Record, read_all
from tasks.waiting import launch_escalation

OWNER = "SRE"


def remind_overrides(report: Report, env: Environment, today: date) -> None:
    """Those that nobody has undone: told, and escalated once a day."""
    for record in read_all(env.reports_directory):
        if record.is_open and record.is_expired:
            _remind(report, env, record, today)


def _remind(report: Report, env: Environment, record: Record, today: date) -> None:
    """By names: a value is nobody's to read in a message."""
    kind = "redis" if record.server.startswith("redis ") else "postgres"
    name = f"temporary setting {', '.join(change.name for change in record.changes)} of {kind}"
    why = f" ({record.reason})" if record.reason else ""
    hint = f"undo-{kind}-settings with record={record.name}; check-{kind}-settings, where somebody has done so by hand"
    report.warn(name, hint, value=f"was to end at {record.until}{why}", expected="removed when its time is over")
    what = f"{name} was to end at {record.until}{why}: {hint}"
    tell_owner(report, env, name, what, OWNER, f"override-{record.name}", today)


def tell_owner(
    report: Report, env: Environment, name: str, what: str, owner: str, key: str, today: date, *, run: str = ""
) -> None:
    """Escalated, once a day and as one incident; where nobody can be told, that is critical. Without [alerts] nobody is
    to be told: the report's own finding is all."""
    if not env.has("alerts"):
        report.leave_out("alerts")
        return
    try:
        launched = launch_escalation(env.name, what=what, owner=owner, run=run, key=key, once=f"{key}-{today}")
    except OpsError as error:
        report.expect(f"{name}: escalated", False, error.hint, value=error.message)
    else:
        report.expect(f"{name}: escalated", True, "", value=f"to {owner}, run {launched}")
