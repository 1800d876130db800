"""Approval by a second person on the command line: print the plan, read that person's code, run the same plan.

The code comes from standard input or from OPS_APPROVAL_CODE. It is never an argument: everybody on the host can read
those. The environment is not locked meanwhile, so the confirmed run judges again.
"""

from __future__ import annotations

import getpass
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from prefect import Flow

from blocks.environment import Environment
from blocks.people.approval import Approval
from runbook.errors import NotConfirmed
from runbook.failpoint import failpoint
from runbook.guard import approval
from runbook.guard.approval import Approved, ApprovedPlanChanged
from runbook.guard.approval_form import described
from runbook.guard.codes import CodeRefused, CodeUse, accept, share_use
from runbook.language.say import say, use_language
from runbook.report import Report, Status

CODE, OVERRIDE = "OPS_APPROVAL_CODE", "OPS_APPROVAL_OVERRIDE"
MOST_PLANS, MOST_CODES = 5, 5
PREFIX = "override:"


def call_approved(name: str, call: Callable[..., Report], given: Mapping[str, Any]) -> Report:
    """Call a runbook. One that needs an approval is planned first.

    Raises:
        NotConfirmed: nobody approved its plan.
    """
    if not given.get("confirm"):
        return call(**given)
    env = Environment.find(given["environment"])
    approvals = env.approval_of(name)
    if approvals is None or given["confirm"] != env.name:
        return call(**given)
    for _ in range(MOST_PLANS):
        planned = call(**{**given, "confirm": ""})
        if planned.status is not Status.PLANNED:
            return planned
        with approval.approved_here(_request_approval(env, approvals, planned, shared=isinstance(call, Flow))):
            try:
                return call(**given)
            except ApprovedPlanChanged as error:
                print(error, file=sys.stderr)
    raise NotConfirmed(f"the plan changed {MOST_PLANS} times before it could run", "run it again under less load")


def _request_approval(env: Environment, approvals: Approval, planned: Report, *, shared: bool) -> Approved:
    """`shared`: Prefect answers, and keeps the code's use for other hosts."""
    plan, launcher = planned.facts["plan"], os.environ.get("SUDO_USER") or getpass.getuser()
    ends = datetime.now(UTC) + timedelta(minutes=approvals.minutes)
    override = f"In an emergency: {PREFIX} and the reason; this pages people." if env.has("alerts") else ""
    asked = (
        f"Plan {plan} of {planned.runbook} on {env.name} needs the code of a second person "
        f"({', '.join(approvals.approvers)}) within {approvals.minutes:g} minutes."
    )
    with use_language(planned.language):
        print(described(planned), " ".join(filter(None, (say(asked), say(override)))), sep="\n")
    why = "no code was given"
    for text in _texts():
        now = datetime.now(UTC)
        if now > ends:
            why = f"{approvals.minutes:g} minutes have passed"
            break
        try:
            if text.startswith(PREFIX) and override:
                return Approved(plan, "", now, approval.checked_reason(text.removeprefix(PREFIX)), launcher)
            use = CodeUse(env.name, plan, str(uuid.uuid4()))
            code = accept(approvals, text, now, use, launcher)
            if shared:
                share_use(code, use)
            failpoint("approval: code used")
            return Approved(plan, code.name, now, launcher=launcher)
        except CodeRefused as error:
            why = str(error)
            print(why, file=sys.stderr)
    raise NotConfirmed(f"nobody approved plan {plan}: {why}", "run it again with the second person present")


def _texts() -> Iterator[str]:
    """The codes to try: one from a variable, or up to MOST_CODES typed ones."""
    if override := os.environ.get(OVERRIDE):
        yield PREFIX + override
    elif code := os.environ.get(CODE):
        yield code
    else:
        for _ in range(MOST_CODES):
            print("code: ", end="", flush=True)
            if not (line := sys.stdin.readline()):
                return
            yield line.strip()
