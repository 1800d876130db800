"""Negative controls: the runbook that a drill has just trusted is given a sabotaged copy, and must refuse it.

Before the sabotage it must accept the very same copy: a refusal for another reason would prove nothing.
"""

from __future__ import annotations

from typing import Any

from prefect import Flow

from blocks.environment import Environment
from flows.recovery.drills.scenario import Refusal
from runbook.errors import OpsError, RunbookFailed
from runbook.report import Report


def require_accepted(derived: Environment, flow: Flow[..., Report], **parameters: Any) -> None:
    """The copy as it is, before the sabotage: the runbook plans with it.

    Raises:
        OpsError: it refuses it, so that the control would show nothing.
    """
    if told := _refusal(derived, flow, **parameters):
        raise OpsError(
            f"{flow.name} refuses the copy before it is sabotaged: {told}",
            "the negative control shows nothing: look at what it says",
        )


def try_sabotaged(derived: Environment, flow: Flow[..., Report], sabotage: str, **parameters: Any) -> Refusal:
    """What the runbook makes of it. Called as a function: a refusal is no failed run that calls somebody at night."""
    return Refusal(sabotage, flow.name, _refusal(derived, flow, **parameters))


def _refusal(derived: Environment, flow: Flow[..., Report], **parameters: Any) -> str:
    """Empty where it accepts."""
    with derived.stands_in():
        try:
            flow.fn(derived.name, **parameters)
        except RunbookFailed as error:
            return error.message if error.report.is_stopped else ""  # else it is CRITICAL, and went live
        except OpsError as error:
            return error.message
    return ""


def report_results(report: Report, controls: list[Refusal]) -> None:
    """Each of them; one that was accepted makes the drill CRITICAL, and none at all too."""
    report.table(
        "Negative controls",
        ("sabotage", "runbook", "refused"),
        [(one.sabotage, one.runbook, one.refused or "NO: accepted") for one in controls],
    )
    accepted = [f"{one.runbook}: {one.sabotage}" for one in controls if not one.refused]
    report.require(
        "negative controls",
        bool(controls) and not accepted,
        "the runbook would accept a bad copy: nothing that it says is proof, correct it before anything else"
        if controls
        else "they were not reached: launch the drill again",
        value="; ".join(accepted) or f"{len(controls)} of {len(controls)} sabotaged copies were refused",
        expected="every sabotaged copy is refused",
    )
