"""Four eyes: a run whose runbook is listed in [approval] continues only with a second person's code for its very plan.

A deployment's run suspends with a form, without the environment's lock. When somebody answers, it starts again from the
top, judges again, and compares its plan with the approved one. Where no run can suspend (the command line), the caller
plans first, asks, and gives the approval along (`approved_here`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import uuid
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, FlowRunInput
from prefect.context import FlowRunContext
from prefect.input import RunInput

from runbook import clock
from runbook.errors import NotConfirmed, OpsError
from runbook.failpoint import failpoint
from runbook.guard import suspended
from runbook.guard.approval_form import approval_form, describe_request
from runbook.guard.brief import answered
from runbook.guard.codes import CodeRefused, CodeUse, accept, share_use
from runbook.guard.permit import Pin, launched_by
from runbook.guard.pins import PARAMETER, PlanChanged
from runbook.report import Report
from runbook.target import Approvals, Target

MOST_ATTEMPTS = 10
LEAST_REASON = 10
PERSON = "USER"
Pager = Callable[[str, str, str, str], object]
_PROCESS = str(uuid.uuid4())
_COUNTS = re.compile(r"\d[\d,.]*(?= ?(?:live |of )?(?:rows|keys|days|B|kB|MB|GB|TB|s|min|h|%)(?!\w))")
_pagers: list[Pager] = []


@dataclass(frozen=True)
class Approved:
    """Who approved which plan when; or the reason why somebody went on without."""

    plan: str
    by: str
    at: datetime
    override: str = ""
    launcher: str = ""


class ApprovedPlanChanged(PlanChanged):
    """The plan is no longer the approved one."""


class ApprovalPending(Exception):
    """The run ends here with its plan, and suspends. Never seen outside `runbook(...)`."""

    def __init__(self, key: str, form: type[RunInput], seconds: int) -> None:
        self.key, self.form, self.seconds = key, form, seconds
        super().__init__(key)


_here: ContextVar[Approved | None] = ContextVar("approved", default=None)


def page_by(pager: Pager) -> None:
    """Who is called for an emergency override: (environment, what, run, key). This layer knows no alerts."""
    _pagers[:] = [pager]


@contextlib.contextmanager
def approved_here(approved: Approved) -> Iterator[None]:
    """Runs inside have this approval: of the command line, which asked for it."""
    token = _here.set(approved)
    try:
        yield
    finally:
        _here.reset(token)


def plan_id(report: Report) -> str:
    """The fingerprint of a plan that a person approves: its acts, pinned parameters, states and steps, then the numbers
    that may differ within their tolerance (`3f2a9c1b77aa-12000`). Other row counts, sizes, seconds and positions in a
    log are left out, as they change from minute to minute."""
    context = FlowRunContext.get()
    left_out = ("confirm", PARAMETER)
    given = {name: value for name, value in ((context and context.parameters) or {}).items() if name not in left_out}
    pins = {name: value for name, value in report.pins.items() if name != PARAMETER}
    states = {name: "" if pin.tolerance else pin.value for name, pin in report.states.items()}
    steps = [(one.step, _COUNTS.sub("#", one.detail)) for one in report.plan_steps]
    content = [report.runbook, report.environment, [str(act) for act in report.acts], pins, states, given, steps]
    text = json.dumps(content, ensure_ascii=False, sort_keys=True, default=str)
    numbers = "".join(f"-{pin.value}" for pin in _tolerant(report))
    return hashlib.sha256(text.encode()).hexdigest()[:12] + numbers


def _tolerant(report: Report) -> list[Pin]:
    """The numbers of a plan that may differ, in one order."""
    pins = (pin for _, pin in sorted(report.states.items()))
    return [pin for pin in pins if pin.tolerance and pin.value.isdecimal()]


def is_approved(report: Report, approved: str) -> bool:
    """Whether a plan is the approved one: its numbers are within their tolerance of those that the approver saw."""
    (own, *_), (seen, *numbers) = plan_id(report).split("-"), approved.split("-")
    pins = _tolerant(report)
    return (own, len(pins)) == (seen, len(numbers)) and all(
        pin.tolerance and number.isdecimal() and abs(int(pin.value) - int(number)) <= pin.tolerance.around(int(number))
        for pin, number in zip(pins, numbers, strict=True)
    )


@dataclass(frozen=True)
class ApprovalGate:
    """Before a report mints a permit."""

    target: Target
    runbook: str
    approvals: Approvals
    within: Report | None

    def describe(self, report: Report) -> None:
        """A plan names its fingerprint."""
        report.fact("plan", plan_id(report))

    def require(self, report: Report) -> None:
        """Raises where nobody approved this plan.

        Raises:
            ApprovalPending: the run must wait for a person.
            NotConfirmed: nobody approved it, and it cannot wait.
        """
        if report.approved:
            return
        if self.within:
            if not self.within.approved:
                raise NotConfirmed(
                    f"{self.runbook} needs a second person's approval, and {self.within.runbook} was not approved",
                    "run it directly, or add the calling runbook to [approval] required",
                )
            report.approved = self.within.approved
            return
        plan = plan_id(report)
        report.fact("plan", plan)
        found = _here.get()
        if found and not is_approved(report, found.plan):
            raise ApprovedPlanChanged(
                f"the plan is {plan}, and {found.plan} was approved", "check the new plan and approve it"
            )
        self._accept(report, found or self._answered(report, plan))

    def _accept(self, report: Report, found: Approved) -> None:
        report.approved = found.by or "override"
        if found.launcher:
            report.facts.setdefault("launched by", found.launcher)
        if not found.override:
            report.fact("approved by", f"{found.by}, {clock.text(found.at)}, plan {found.plan}")
            return
        report.warn(
            "emergency override",
            "a second person reviews this run afterwards",
            value=f"nobody approved plan {found.plan}: {found.override}",
        )
        page_override(report, self.target.name, self.runbook, found.override)

    def _answered(self, report: Report, plan: str) -> Approved:
        run = _own_run()
        if run is None:
            raise NotConfirmed(
                f"{self.runbook} needs a second person's approval, and this run cannot wait for it",
                f"run it in the Prefect UI, or by python -m flows.launch {self.runbook}",
            )
        answers, asked = _answers(run)
        why = ""
        if answers:
            try:
                found = self._judge(run, answers[-1], len(answers))
                if is_approved(report, found.plan):
                    return found
                why = f"the plan changed after {found.by or 'the override'}: this is the new one"
            except CodeRefused as error:
                why = f"{error.message}: {error.hint}"
        now = datetime.now(UTC)
        left = self.approvals.minutes * 60 - (now - (asked or now)).total_seconds()
        if left < 1 or len(answers) >= MOST_ATTEMPTS:
            raise NotConfirmed(f"nobody approved it ({why})", "run it again")
        text = describe_request(report, plan, why, left)
        pages = self.target.has("alerts")
        raise ApprovalPending(f"approval-{len(answers) + 1}", approval_form(plan, text, pages=pages), int(left))

    def _judge(self, run: FlowRun, answer: ApprovalAnswer, attempt: int) -> Approved:
        launcher = _launcher(run) or answer.launched_by
        if answer.override:
            return Approved(answer.plan, "", answer.at, checked_reason(answer.override), launcher)
        use = CodeUse(self.target.name, answer.plan, f"{run.id}/{attempt}/{_PROCESS}")
        code = accept(self.approvals, answer.code, answer.at, use, launcher)
        share_use(code, use)
        failpoint("approval: code used")
        return Approved(answer.plan, code.name, answer.at, launcher=launcher)


def checked_reason(text: str) -> str:
    """Why somebody overrides.

    Raises:
        Refused: it says too little.
    """
    reason = " ".join(text.split())[:300]
    if len(reason) < LEAST_REASON:
        raise CodeRefused(
            "the override has no reason", f"write at least {LEAST_REASON} characters: what cannot wait, and why"
        )
    return reason


def gate(report: Report, target: Target, runbook: str, within: Report | None) -> ApprovalGate | None:
    """None: nobody needs to approve this runbook."""
    found = target.approval_of(runbook)
    return ApprovalGate(target, runbook, found, within) if found else None


def suspend(pending: ApprovalPending) -> None:
    """The run leaves here; Prefect fails it when its time is over."""
    try:
        suspended.suspend(pending.form, pending.key, pending.seconds)
    except RuntimeError as error:
        raise OpsError(f"this run cannot wait for its approval: {error}", "launch its deployment again") from None


def page_override(report: Report, environment: str, runbook: str, reason: str) -> None:
    """People learn of it at once. What fails here stops no recovery; the report has it."""
    context = FlowRunContext.get()
    run = str(context.flow_run.id) if context and context.flow_run else ""
    what = f"{runbook} on {environment}: emergency override of the approval: {reason}"
    try:
        if not _pagers:
            raise OpsError("no alerts are loaded")
        _pagers[0](environment, what, run, f"override-{runbook}-{environment}-{run or report.started_at}")
        report.passed("people were paged about the override")
    except OpsError as error:
        report.warn("people were paged about the override", "phone the on-call person yourself", value=error.message)


@dataclass(frozen=True)
class ApprovalAnswer:
    """What somebody sent with the form, and when."""

    plan: str
    code: str
    launched_by: str
    override: str
    at: datetime


def _own_run() -> FlowRun | None:
    """The run that this code works for, where it can suspend."""
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    return run if run and run.deployment_id and not run.parent_task_run_id else None


def _answers(run: FlowRun) -> tuple[list[ApprovalAnswer], datetime | None]:
    """All answers, in the order of their keys; and when the run asked first."""

    def read_inputs() -> list[FlowRunInput]:
        with get_client(sync_client=True) as client:
            return client.filter_flow_run_input(run.id, key_prefix="suspended-approval-", limit=200, exclude_keys=set())

    inputs = answered(read_inputs, "the approval")
    kept = {one.key: one for one in inputs}
    found = list[ApprovalAnswer]()
    while sent := kept.get(f"suspended-approval-{len(found) + 1}-response"):
        given, at = json.loads(sent.value), sent.created or datetime.now(UTC)
        plan, code, by, override = (str(given.get(name) or "") for name in ("plan", "code", "launched_by", "override"))
        found.append(ApprovalAnswer(plan, code, by, override, at))
    first = kept.get("suspended-approval-1-schema")
    return found, first.created if first else None


def _launcher(run: FlowRun) -> str:
    """The person who launched it, where Prefect knows: its open-source server has no accounts."""
    by = run.created_by
    return str(by.display_value) if by and by.type == PERSON and not launched_by() else ""
