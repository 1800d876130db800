"""Negative controls: the drill's runbook gets a sabotaged copy, and must refuse it.

Before the sabotage it must accept the same copy: a refusal for another reason would prove nothing.
"""

from __future__ import annotations

from typing import Any

from prefect import Flow

from blocks.environment import Environment
from flows.recovery.drills.scenario import Refusal
from runbook.current import published_under
from runbook.errors import OpsError, RunbookFailed
from runbook.report import Report

PREFIX = "drill-control-"
"""Of the artifacts of a control's reports."""


def require_accepted(derived: Environment, flow: Flow[..., Report], **parameters: Any) -> None:
    """The runbook plans with the intact copy.

    Raises:
        OpsError: it refuses the copy, so the control would prove nothing.
    """
    if refused := _refusal(derived, flow, **parameters):
        raise OpsError(
            f"{flow.name} refuses the intact copy, so the negative control proves nothing: {refused}",
            "fix the cause of this refusal, then run the drill again",
        )


def try_sabotaged(derived: Environment, flow: Flow[..., Report], sabotage: str, **parameters: Any) -> Refusal:
    """The runbook's answer. It is called as a function: a refusal must not be a failed run that pages somebody."""
    return Refusal(sabotage, flow.name, _refusal(derived, flow, **parameters))


def _refusal(derived: Environment, flow: Flow[..., Report], **parameters: Any) -> str:
    """The reason of a refusal, "" if it accepts."""
    with derived.stands_in(), published_under(PREFIX):
        try:
            flow.fn(derived.name, **parameters)
        except RunbookFailed as error:
            return error.message if error.report.is_stopped else ""  # CRITICAL, but the copy is live
        except OpsError as error:
            return error.message
    return ""


def report_results(report: Report, controls: list[Refusal]) -> None:
    """All of them. One that was accepted makes the drill CRITICAL, and none at all too."""
    report.table(
        "Negative controls",
        ("sabotage", "runbook", "refused"),
        [(one.sabotage, one.runbook, one.refused or "NO: accepted") for one in controls],
    )
    accepted = [f"{one.runbook}: {one.sabotage}" for one in controls if not one.refused]
    report.require(
        "negative controls",
        bool(controls) and not accepted,
        "fix the runbook before you use it: it accepts a bad copy, so its checks prove nothing"
        if controls
        else "run the drill again: it did not reach them",
        value="; ".join(accepted) or f"{len(controls)} of {len(controls)} sabotaged copies refused",
        expected="every sabotaged copy refused",
    )
