"""`with runbook(...)`: how every flow begins and ends."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Literal

from prefect.artifacts import create_markdown_artifact
from prefect.context import FlowRunContext
from prefect.exceptions import TerminationSignal

from runbook import clock
from runbook.current import artifact_key, current_report, use_report
from runbook.drivers import described
from runbook.errors import Locked, LockLost, NotConfirmed, OpsError, RunbookFailed
from runbook.files import chain, durable, journal, repeats
from runbook.guard import alone, approval, carried_out, containment, pins
from runbook.guard.brief import asked_briefly
from runbook.guard.cancellation import cancelled_by
from runbook.guard.holder import Rank, in_file
from runbook.guard.lock import EnvironmentLock, hold
from runbook.guard.permit import PlanOnly, is_scheduled, is_unattended, is_without_person, launched_by
from runbook.kinds import permitting_nothing
from runbook.language.say import label, say, use_language
from runbook.log import logger
from runbook.masking import without_logins
from runbook.page import render
from runbook.page.address import ui_address
from runbook.page.form import Forms, dumps, form_address, may_name_runbook, read_forms
from runbook.page.markdown import escaped
from runbook.page.width import fit
from runbook.report import Finding, Report, Status
from runbook.target import Target

LEVEL = {
    Status.PLANNED: logging.INFO,
    Status.OK: logging.INFO,
    Status.WARN: logging.WARNING,
    Status.CRITICAL: logging.ERROR,
}
WithoutConfirm = Literal["reads", "stages", "changes"]
"""What a run with an empty `confirm` does. `reads`: it takes no lock. `stages`: its plan writes scratch copies under
fixed names, so it holds the lock, and makes way for every other run. `changes`: it changes something without one."""
MOST_DEAD = 3
PATIENCE_SECONDS = 3600.0
"""For so long a run that a schedule launched waits for the environment's lock: nobody is there to run it again."""


@contextlib.contextmanager
def runbook(
    title: str,
    target: Target,
    confirm: str | None = None,
    plan: str = "",
    *,
    changes: bool = False,
    without_confirm: WithoutConfirm = "reads",
    rank: Rank = "maintenance",
    often: bool = False,
    name: str = "",
) -> Iterator[Report]:
    """Everything around a procedure: the environment's lock, the report, its artifact and JSON file, the end state.

    `changes` takes the environment's lock before anything is judged (a scheduled run waits for it, and for the
    locks of what it changes); maintenance with a `confirm` is refused while the environment is contained. A plan takes
    no lock; `without_confirm` names the flows whose plan needs it. `confirm` is None where the flow has none. A run
    with an empty `confirm` that reaches `carrying_out(...)` leaves the block there, PLANNED; so does one that
    waits for a second person's approval, which then suspends. `often`, of a check that runs every few minutes: what
    it found before already is counted, not filed. `name` is the flow's, where the title differs: [approval] names
    flows. `plan` is the fingerprint of the plan that is confirmed: one that no longer fits, or that was carried
    out, is refused.

    Raises:
        RunbookFailed: the report is CRITICAL.
        NotConfirmed, Locked: as they are.
    """
    report = Report(title, target.name, confirm or "", target.limits, language=target.language)
    locks = ("changes" if confirm is None else without_confirm) if changes else None
    with (
        clock.use_zone(target.zone),
        use_language(target.language),
        _recorded(report, target, plan, locks, rank, often, name),
    ):
        yield report


@contextlib.contextmanager
def _recorded(
    report: Report, target: Target, plan: str, changes: WithoutConfirm | None, rank: Rank, often: bool, name: str
) -> Iterator[None]:
    """The run's lock, permit and end: whatever happens, its report is written. `changes`: None where it changes
    nothing, even if it is confirmed."""
    within, ending, key, done = current_report(), _Ending(report), name or render.key(report), False
    if within is None:
        _judge_launcher(report, target)
    records = carried_out.Records(target.reports_directory, target.name)
    report.pinned = planned = pins.Pinned(records, key, plan, inner=within is not None)
    try:
        with use_report(report), permitting_nothing(), report.closing as stack:
            if within is None and rank == "maintenance" and report.confirm == target.name:
                alone.require_prefect(target.name)
            if changes == "reads" and not report.may_change:
                _plan_without_lock(report, target, rank, within)
            elif changes:
                plans = changes == "stages" and not report.may_change
                _lock(stack, report, target, rank, within, "plan" if plans else None)
            planned.refuse_second_use()
            report.gate = approval.gate(report, target, key, within)
            yield
            done = not report.is_stopped
            if not report.is_stopped and (report.permitted or (changes and report.may_change)):
                planned.record(report)  # before the lock is free
            if done and report.permitted:
                report.settle()
    except BaseException as error:
        if (raised := ending.of(error)) is error:
            raise
        if raised:
            raise raised from None
    finally:
        _finish(report, target, often)
        _end_journals(report, within, done)
    if report.permitted and not report.is_stopped:
        planned.link(report)
    if ending.pending:  # the lock is free, and the plan is filed
        approval.suspend(ending.pending)
    if report.status is Status.CRITICAL:
        raise RunbookFailed(report) from None


def _judge_launcher(report: Report, target: Target) -> None:
    """Whether a person launched the run; otherwise only the TOML's `unattended` lets it change something."""
    by = launched_by()
    if by:
        report.fact("launched by", f"the automation {by}")
    if is_unattended(target):
        report.unattended = True
        report.fact("unattended", f"{'this automation' if by else 'its schedule'} may: the environment's TOML says so")
    elif is_without_person(report.confirm):
        report.refused = f"{'an automation' if by else 'a schedule'} filled in confirm, and unattended does not name it"


def _plan_without_lock(report: Report, target: Target, rank: Rank, within: Report | None) -> None:
    """A plan only reads: it makes no other run wait, and waits for none."""
    if within is not None:
        return
    if holder := in_file(target.name, target.reports_directory):
        report.fact("lock", f"a plan takes none. It is held by “{holder.runbook}”, since {holder.since}")
    _respect_containment(report, target, rank)


def _lock(
    stack: contextlib.ExitStack,
    report: Report,
    target: Target,
    rank: Rank,
    within: Report | None,
    as_rank: Rank | None,
) -> None:
    """Take the environment's lock for as long as `stack` is open. A runbook inside another one that holds it may do
    what that one may."""
    # Without a confirm it ends nobody's work.
    allowed = as_rank or (rank if report.confirm == target.name else "maintenance")
    patience = PATIENCE_SECONDS if within is None and is_scheduled() else 0.0
    lock = stack.enter_context(
        hold(target.name, target.reports_directory, report.runbook, allowed, patience, excluding=target.exclusion)
    )
    report.lock = lock
    is_outermost = within is None or within.lock is None
    if is_outermost:
        report.at_end(partial(_report_silence, report, lock))
        _begin_journal(report, target)
    elif within:
        report.journal = within.journal
    report.fact("lock", f"keeps out {lock.keeps_out}")
    if is_outermost:
        _respect_containment(report, target, rank)
    if is_outermost and report.may_change:  # before anything is judged: another environment may be changing it
        lock.exclude()


def _begin_journal(report: Report, target: Target) -> None:
    """Note on disk how far this run comes, and report the runs that could not report it themselves."""
    run = carried_out.current_run()
    directory = target.reports_directory
    report.dead_runs = tuple(journal.find_dead(directory, target.name))
    report.journal = journal.Journal.begin(directory, target.name, report.runbook, str(run.id) if run else "")
    for number, dead in enumerate(report.dead_runs[:MOST_DEAD]):
        report.fact(f"an earlier run died{f' ({number + 1})' if number else ''}", dead.text)


def _end_journals(report: Report, within: Report | None, done: bool) -> None:
    """This run's report is written. What earlier runs left is reported until the same runbook, or another one with a
    permit, is `done` after them; a run that left nothing is reported once."""
    if within is None or within.lock is None:
        report.journal.close()
    for dead in report.dead_runs:
        standing, succeeded = dead.journal.standing(), done and (report.permitted or dead.runbook == report.runbook)
        if succeeded or not (standing.is_live or standing.left):
            dead.journal.close()


@dataclass
class _Ending:
    """What ends a run, as its report states it. `pending`: a second person has to approve the plan."""

    report: Report
    pending: approval.ApprovalPending | None = None

    def of(self, error: BaseException) -> BaseException | None:
        """Record why the block ended. Returns the error to raise, or None where the report says all."""
        report = self.report
        match error:
            case PlanOnly():
                report.form = _form(report)
            case approval.ApprovalPending():
                self.pending, report.planned = error, True
                report.form = "a second person resumes this run with a one-time code (its page, menu Resume)"
            case RunbookFailed() if error.report is report:
                _tell_state(report)
            case LockLost() | NotConfirmed() | Locked():
                self._refused(error)
                return error
            case OpsError():  # also a runbook inside this one that failed
                _failed(report, error)
            case _:
                return self._unknown(error)
        return None

    def _refused(self, error: LockLost | NotConfirmed | Locked) -> None:
        report = self.report
        if isinstance(error, LockLost) and not report.state:
            done = ", ".join(report.permitted_steps) or "none"
            report.state_is(f"irreversible steps done before: {done}", error.hint)
        if isinstance(error, pins.PlanChanged):
            report.planned, report.form = True, _form(report)
        _failed(report, error)

    def _unknown(self, error: BaseException) -> BaseException:
        report = self.report
        if refused := described(error):
            logger().debug("a driver's error that no step has put into words", exc_info=error)
            _failed(report, refused)
            return RunbookFailed(report)
        if isinstance(error, TerminationSignal):
            self._cancelled()
            return error
        seen = without_logins(f"{type(error).__name__}: {error}")[:300]
        hint = "" if report.state else "run it again: it starts over and succeeds, or reports the next step"
        report.findings.append(Finding("the run ended early", Status.CRITICAL, seen, "", hint))
        _tell_state(report)
        return error

    def _cancelled(self) -> None:
        """Who cancelled it, what changed, what is left. A run that changed nothing live is no incident."""
        report, standing = self.report, self.report.journal.standing()
        worst = Status.CRITICAL if standing.is_live else Status.WARN
        report.findings.append(Finding("cancelled", worst, cancelled_by()))
        report.findings.append(Finding("state of the system", worst, standing.changed, "", standing.next_step))
        if standing.left:
            hint = "; ".join(dict.fromkeys(standing.left.values()))
            report.findings.append(Finding("left behind", worst, "; ".join(standing.left), "", hint))
        else:
            report.passed("left behind", value="nothing")


def _respect_containment(report: Report, target: Target, rank: Rank) -> None:
    """Recoveries go on. Maintenance changes nothing: what needs no `confirm` only adds (backups), and is told of it."""
    try:
        found = containment.read(target.name, target.reports_directory)
    except OpsError as error:
        if rank != "recovery":
            raise
        report.warn("containment", error.hint, value=error.message)
        return
    if found:
        report.contained = found.text
        report.fact("contained", found.text)
    if rank == "recovery":
        return
    if found and report.confirm:
        raise found.refusal(target.name)
    if found:
        report.warn(
            "the environment is contained",
            "what deletes or changes is refused until release-containment",
            value=found.text,
        )
    if isinstance(report.lock, EnvironmentLock):
        report.lock = _Uncontained(report.lock, target)


@dataclass(frozen=True)
class _Uncontained:
    """The lock of maintenance: asked before every irreversible act, it also tells whether somebody contained the
    environment since."""

    lock: EnvironmentLock
    target: Target

    def exclude(self) -> str:
        return self.lock.exclude()

    def require(self) -> None:
        self.lock.require()
        if found := containment.read(self.target.name, self.target.reports_directory, asks=not self.lock.is_silent):
            raise found.refusal(self.target.name)


def _report_silence(report: Report, lock: EnvironmentLock) -> None:
    if silence := lock.silence:
        report.warn(
            "Prefect did not answer",
            "check the Prefect server: states, logs and artifacts of this run may be "
            "missing there; this report is complete",
            value=silence,
        )


def _failed(report: Report, error: OpsError) -> None:
    inner = error.report if isinstance(error, RunbookFailed) else None
    what = f"{inner.runbook}: {inner.sentence()}" if inner else error.message
    report.findings.append(Finding(what, Status.CRITICAL, "", "", error.hint))
    _tell_state(report)


def _tell_state(report: Report) -> None:
    if report.state:
        report.findings.append(report.state)


def _finish(report: Report, target: Target, often: bool) -> None:
    report.finished = datetime.now(UTC)
    add_contacts(report, target)
    forms = read_forms([target.name]) if may_name_runbook(render.markdown(report)) else Forms()
    page = _write(report, target.reports_directory, often, forms)
    said, report.headline = _printable(report.sentence()), _printable(report.sentence(say, label))
    # Outside a flow run the command line prints the headline itself. A drill provokes what its controls find.
    is_news = FlowRunContext.get() and not artifact_key("")
    logger().log(LEVEL[report.status] if is_news else logging.INFO, "%s", said)
    logger().info("report: %s", report.path)
    if FlowRunContext.get():
        try:
            with asked_briefly(retries=2):
                shown = create_markdown_artifact(
                    markdown=_shown(page, report.hash),
                    key=artifact_key(render.key(report)),
                    description=escaped(report.headline[:200]),
                )
            if address := ui_address(f"artifacts/artifact/{shown}"):
                logger().info("report in Prefect: %s", address)
        except Exception as error:  # the report is on disk: a dead Prefect must not fail a good recovery
            logger().warning("the report could not be shown in Prefect: %s", error)


def _shown(page: str, head: str) -> str:
    """The page as the UI shows it. The chain's head is in it in one piece as well, in the tab Raw: to be copied."""
    return f"{fit(page)}\n<!-- chain: {head} -->\n"


def _printable(text: str) -> str:
    """A file's name, which may be no text, is in it."""
    return text.encode(errors="backslashreplace").decode()


def _write(report: Report, directory: Path, often: bool, forms: Forms) -> str:
    """Both files; returns the page. A full disk must not hide what the run did: that becomes a finding."""
    file = partial(_file, report, directory, forms)
    try:
        if often:
            repeats.file_or_count(directory, render.key(report), report, file)
        else:
            file()
    except OSError as error:
        what = f"the report could not be written to {directory}: {error.strerror}"
        _failed(
            report,
            OpsError(what, "free disk space there, or correct its owner; what was done is in the log and the UI"),
        )
    return render.markdown(report, forms)


def _file(report: Report, directory: Path, forms: Forms) -> None:
    report.path, content = chain.append(directory, render.key(report), report.as_json())
    report.previous, report.hash = content["previous"], content["hash"]
    for one in report.evidence:
        if one.csv:
            durable.write(one.csv_path(report.path), one.csv, errors="backslashreplace", mode=durable.PRIVATE)
    page = render.markdown(report, forms)
    durable.write(report.path.with_suffix(".md"), page, errors="backslashreplace", mode=durable.PRIVATE)


def _form(report: Report) -> str:
    """A link to this run's own form, filled in but for `confirm`, and with what was planned."""
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    if run and run.deployment_id:
        filled = {name: value for name, value in (run.parameters | report.pins).items() if name != "confirm"}
        if address := form_address(run.deployment_id, filled):
            return address
    pinned = "".join(f", {name}={dumps(value)}" for name, value in report.pins.items())
    return f"run it again with confirm=“{report.environment}”{pinned}"


TABLE = "whom to call"


def add_contacts(report: Report, target: Target) -> None:
    """Where it is CRITICAL: the owner's own contacts first (a run has its deployment's tags), then everybody, then
    vendors with their support plans."""
    if report.status is not Status.CRITICAL:
        return
    context = FlowRunContext.get()
    tags = context.flow_run.tags if context and context.flow_run else []
    try:  # a report without numbers is a report
        columns, *rows = target.whom_to_call(tags) or [()]
    except Exception as error:
        logger().warning("whom to call is not in the report: %s", type(error).__name__)
        return
    if rows:
        report.table(TABLE, columns, rows)
