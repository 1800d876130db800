"""The first page in an incident: symptom → runbook, what failed, what can be recovered, what runs (appendix A)."""

from __future__ import annotations

from datetime import timedelta
from itertools import islice

from prefect.context import FlowRunContext

from blocks.environment import Environment
from flows.recovery.objectives import board_page
from flows.troubleshooting import symptoms
from runbook import clock
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.guard import holder
from runbook.guard.holder import LockHolder
from runbook.next import Next
from runbook.page.form import Forms, form_address, read_forms
from runbook.page.markdown import code, escaped, link
from runbook.report import Evidence, Report, Status
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import duration
from tasks.prefect.recent_runs import Activity, RecentRun, read_activity
from tasks.recovery_points import standing
from tasks.recovery_points.standing import Recoverable, RecoveryStanding
from tasks.reports.past import filed

DAYS, MOST, MOST_CHARACTERS = 7, 10, 300
CHECK = Next("check-recovery-objectives", "measure it now")


@flow(name="start-here", flow_run_name=RunName("start-here {environment}"))
def start_here(environment: str) -> Report:
    """ここから始める: 症状から手順へ (付録A, §8)

    Find the symptom in the table and open the form of its runbook. Run this page for a report with the current state:
    the last failed runs with their reports, what can be recovered now, what runs, and who holds the lock.

    It works while the database and Redis are down. It changes nothing and takes no lock. Failed runs and resources
    that are not recoverable are WARN, never CRITICAL: their own runs have escalated them.

    Args:
        environment: Environment (lab, staging, production …)
    """
    env = Environment.find(environment)
    with runbook("Start here", env) as report:
        report.attach(Evidence("Symptom and runbook", text=_table(env, read_forms([env.name]))))
        recoverable = _tell_recoverable(report, env)
        try:
            activity = read_activity(env.name, clock.now() - timedelta(days=DAYS), MOST, _own_run())
        except OpsError as error:
            _tell_without_prefect(report, env, error)
            held = _tell_holder(report, holder.in_file(env.name, env.reports_directory), " on this host")
            report.outcome = f"{recoverable}; Prefect does not answer; {held}"
            return report
        _tell_failed(report, activity)
        lines = [_line(one) for one in activity.unfinished]
        report.attach(Evidence("Running or waiting now", text="\n".join(lines) or "nothing"))
        held = _tell_holder(report, holder.in_file(env.name, env.reports_directory) or activity.holder)
        report.outcome = f"{recoverable}; {len(lines)} runs go on; {held}"
    return report


def _own_run() -> str:
    context = FlowRunContext.get()
    return str(context.flow_run.id) if context and context.flow_run else ""


def _table(env: Environment, forms: Forms) -> str:
    """With links to the forms; with commands where Prefect does not answer."""

    def opened(one: Next) -> str:
        given = {"environment": env.name, **one.parameters}
        if not forms.deployments:
            return code(one.command(env.name))
        deployment = forms.deployments.get((one.flow, env.name))
        return link(one.flow, form_address(deployment, given)) if deployment else ""

    return symptoms.table(opened, env.language)


def _tell_recoverable(report: Report, env: Environment) -> str:
    """The environment's rows of the recovery board; returns them in a few words."""
    found = standing.read(env.reports_directory)
    if found is None:
        report.warn("recoverable now", "it was never checked here", value="not known", follow=[CHECK])
        return "recoverability not known"
    checked = board_page.moment(found, found.checked)
    lines = [_recoverable(found, one) for one in board_page.by_state(found)]
    text = "\n".join([*lines, f"\nChecked {checked}. The recovery board has all environments."])
    report.attach(Evidence("Recoverable now", text=text))
    if board_page.is_stale(found, clock.now()):
        report.warn("recoverable now", "its last check is too old", value=f"checked {checked}", follow=[CHECK])
    for one in found.resources:
        follow = [Next(one.runbook, f"recover {one.resource}"), Next("check-recovery-objectives", "see why")]
        name = f"{one.resource} recoverable now"
        report.prefer(name, one.state != "red", "", value=one.why or f"yes, by {one.option}", follow=follow)
    red = [one.resource for one in found.resources if one.state == "red"]
    return f"not recoverable within the objectives: {', '.join(red)}" if red else "everything is recoverable"


def _recoverable(found: RecoveryStanding, one: Recoverable) -> str:
    """`- ✓ database: recovered up to 2026-11-29 01:14:51 +09:00, in 16.0 s, by standby; LOSS: postgres-failover`."""
    mark, why = board_page.MARK[one.state], escaped(one.why)
    if one.at is None or one.loss_seconds is None:
        return f"- {mark} {one.resource}: {why}"
    point = board_page.moment(found, one.at)
    takes = duration(one.seconds) if one.seconds is not None else "a time never measured"
    how = f"recovered up to {point}, in {takes}, by {escaped(one.option)}; {escaped(one.lost)}"
    return f"- {mark} {one.resource}: {how}: {one.runbook}" + (f" ({why})" if why else "")


def _tell_failed(report: Report, activity: Activity) -> None:
    lines = [_line(one, link("report", one.report_address) if one.report_address else "") for one in activity.failed]
    name = f"Last failed runs ({DAYS} days, {MOST} at most)"
    report.attach(Evidence(name, text="\n".join(lines) or "none"))
    name = f"failed runs of the last {DAYS} days"
    if not activity.failed:
        report.passed(name, value="none", expected="none")
        return
    newest, count = activity.failed[0], len(activity.failed)
    many = f"{count} or more" if count == MOST else str(count)
    where = newest.report_address or newest.page_address
    hint = f"read {link('its report', where)}" if where else f"read the report of run {newest.id}"
    report.warn(name, hint, value=f"{many}, the newest is {newest.name}", expected="none")


def _tell_holder(report: Report, found: LockHolder | None, where: str = "") -> str:
    """Who holds the environment's lock, in a few words. `where`: what else was not asked."""
    if found is None:
        report.fact("lock held by", f"nobody holds it{where}")
        return f"the lock is free{where}"
    report.fact("lock held by", f"{found.runbook}, process {found.pid} on {found.host}, since {found.since}")
    return f"the lock is held by {found.runbook}"


def _line(one: RecentRun, report: str = "") -> str:
    message = one.message if len(one.message) <= MOST_CHARACTERS else one.message[:MOST_CHARACTERS] + "…"
    began = clock.text(one.started) if one.started else "not started"
    page = link(one.name, one.page_address) if one.page_address else code(one.name)
    where = f"{page} ({report})" if report else page
    return f"- {where}: {escaped(one.state)}, {began}. {escaped(message)}".rstrip()


def _tell_without_prefect(report: Report, env: Environment, error: OpsError) -> None:
    """The reports on disk name what failed."""
    report.warn("Prefect", "check the Prefect server; runbooks also start from the command line", value=error.message)
    since = clock.now() - timedelta(days=DAYS)
    bad = (one for one in filed(env.reports_directory, env.name, since=since) if one.status == Status.CRITICAL)
    lines = [f"- {escaped(one.runbook)}, {clock.text(one.started)}: {code(str(one.path))}" for one in islice(bad, MOST)]
    report.attach(Evidence(f"Last CRITICAL reports ({DAYS} days)", text="\n".join(lines) or "none"))
