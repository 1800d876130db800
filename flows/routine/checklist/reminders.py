"""Waiting checklists (§7.1, §8.4): reported every day, escalated when overdue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime

from blocks.environment import Environment
from flows.routine.checklist.history import RUNBOOK, last_time
from flows.routine.checklist.texts import DEFAULT, NAMES, Checklist, checklist
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from tasks.prefect.suspended_runs import WaitingRun, find_waiting, launch_escalation
from tasks.reports.setting_records import Record, read_all

SOON_DAYS = 1


@dataclass(frozen=True)
class _Due:
    """A waiting run and its due date."""

    run: WaitingRun
    checklist: Checklist
    due: date

    def late(self, today: date) -> int:
        """Days late; below 0: days left."""
        return (today - self.due).days

    @property
    def told(self) -> str:
        return f"{self.checklist.en} ({self.run.name}) was due on {self.due}"


@flow(name="remind-checklists", flow_run_name=RunName("remind-checklists {environment}"))
def remind_checklists(environment: str) -> Report:
    """チェックリストの督促 (§7.1)

    Lists the runs of run-checklist that wait for an answer: phase, waiting time, due date and link. A checklist due
    today or tomorrow is WARN. An overdue one is WARN, and is escalated to its owner once a day as one incident. The
    report also lists the boxes left undone in the last answers to each checklist. An expired temporary setting
    (appendix A: `max_connections = 300`, `maxmemory 2gb`) that is still set is reported and escalated in the same way.
    Run it daily.

    It changes nothing, and launches escalate. If escalate is not deployed, the report is CRITICAL.

    Args:
        environment: Environment (lab, staging, production …)
    """
    env = Environment.find(environment)
    with runbook("Remind checklists", env) as report:
        today = datetime.now(env.zone).date()
        found = list(filter(None, (_due(report, env, run) for run in find_waiting(env.name, RUNBOOK))))
        rows = [_row(env, one, today) for one in found]
        columns = ("checklist", "owner", "phase", "waits since", "due", "days late", "form")
        report.table("Waiting checklists", columns, rows)
        for one in found:
            _judge(report, env, one, today)
        _tell_undone(report, env)
        remind_overrides(report, env, today)
        late = sum(one.late(today) > 0 for one in found)
        report.outcome = f"{len(found)} checklists wait, {late} of them are overdue"
    return report


def _due(report: Report, env: Environment, run: WaitingRun) -> _Due | None:
    """The due date, by the rule of its form. A run of another version may have other parameters."""
    given = run.parameters
    launched = run.began.astimezone(env.zone).date()
    try:
        chosen = checklist(given.get("checklist", DEFAULT))
        return _Due(run, chosen, chosen.due(launched, str(given.get("due", "")), str(given.get("drill_date", ""))))
    except OpsError as error:
        report.warn(run.name, f"answer it, or cancel it: {run.link}", value=f"its due date is unknown: {error.message}")
        return None


def _judge(report: Report, env: Environment, one: _Due, today: date) -> None:
    late = one.late(today)
    hint = f"answer its form: {one.run.link}, Resume"
    value = f"{late} days late" if late > 0 else f"due in {-late} days"
    report.prefer(one.run.name, late < -SOON_DAYS, hint, value=value, expected=f"answered by {one.due}")
    if late > 0:
        _escalate(report, env, one, today)


def _escalate(report: Report, env: Environment, one: _Due, today: date) -> None:
    what = f"{one.told}, and waits for its answer: {one.run.link}"
    tell_owner(report, env, one.run.name, what, one.checklist.owner, f"checklist-{one.run.id}", today, run=one.run.id)


def _row(env: Environment, one: _Due, today: date) -> Sequence[object]:
    """A row of the table. A form's key is its phase's id and the number of the attempt."""
    name = one.run.key.rpartition("-")[0]
    phase = next((phase.en for phase in one.checklist.phases if phase.id == name), one.run.key)
    since = f"{one.run.since.astimezone(env.zone):%Y-%m-%d %H:%M}"
    return one.checklist.en, one.checklist.owner, phase, since, one.due, max(one.late(today), 0), one.run.link


def _tell_undone(report: Report, env: Environment) -> None:
    """The boxes left undone in the last answers."""
    rows = list[tuple[str, ...]]()
    for name in NAMES:
        if past := last_time(env, checklist(name)):
            rows += [(checklist(name).en, past.day, row[0], row[1], row[3], row[5]) for row in past.undone()]
    report.table("Left undone the last time", ("checklist", "answered", "phase", "box", "who", "note"), rows)


OWNER = "SRE"


def remind_overrides(report: Report, env: Environment, today: date) -> None:
    """Report and escalate expired temporary settings that are still set."""
    for record in read_all(env.reports_directory):
        if record.is_open and record.is_expired:
            _remind(report, env, record, today)


def _remind(report: Report, env: Environment, record: Record, today: date) -> None:
    """Names only: a message must not contain values."""
    kind = "redis" if record.server.startswith("redis ") else "postgres"
    name = f"temporary setting {', '.join(change.name for change in record.changes)} of {kind}"
    expired = f"expired at {record.until}"
    if record.reason:
        expired = f"expired at {record.until}, set because of “{record.reason}”"
    hint = f"run undo-{kind}-settings with record={record.name}, or check-{kind}-settings if it was undone by hand"
    report.warn(name, hint, value=expired, expected="undone when it expires")
    what = f"{name}: {expired}. {hint}"
    tell_owner(report, env, name, what, OWNER, f"override-{record.name}", today)


def tell_owner(
    report: Report, env: Environment, name: str, what: str, owner: str, key: str, today: date, *, run: str = ""
) -> None:
    """Escalate once a day, as one incident; CRITICAL if that fails. Without [alerts] only the report has the
    finding."""
    if not env.has("alerts"):
        report.leave_out("alerts")
        return
    try:
        launched = launch_escalation(env.name, what=what, owner=owner, run=run, key=key, once=f"{key}-{today}")
    except OpsError as error:
        report.fail(f"{name}: escalated", error.hint, value=error.message)
    else:
        report.passed(f"{name}: escalated", value=f"to {owner}, run {launched}")
