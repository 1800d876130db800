"""A plan that is confirmed as it stands: with the values of its own form, a moment later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from runbook.errors import RunbookFailed
from runbook.guard.pins import Pinned
from runbook.report import Report, Status

Runbook = Callable[..., Report]


class Permitted(BaseException):
    """The run got its permit. No part of a runbook handles it."""


def planned(runbook: Runbook, name: str, **parameters: Any) -> Report:
    """The dry run's report, whatever it is."""
    try:
        return runbook(name, **parameters)
    except RunbookFailed as error:
        return error.report


def refusal_of(runbook: Runbook, name: str, plan: Report, **parameters: Any) -> str:
    """Confirm a plan with its form's values, and stop at the permit, before anything changes. Returns why it is refused,
    "" where it is accepted."""

    def stop(_: Pinned, report: Report) -> None:
        raise Permitted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pinned, "begin", stop)  # the last thing that a report does before it issues the permit
        try:
            done = planned(runbook, name, **{**parameters, **plan.pins, "confirm": name})
        except Permitted:
            return ""
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return done.sentence()


def require_accepted(runbook: Runbook, name: str, **parameters: Any) -> Report:
    """A green plan, which its own form confirms."""
    plan = planned(runbook, name, **parameters)
    assert plan.status is Status.PLANNED, plan.sentence()
    refused = refusal_of(runbook, name, plan, **parameters)
    assert not refused, refused
    return plan
