"""Routine runbooks where the environment names hardly anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from prefect import Flow

from flows.routine.costs import review_costs
from flows.routine.daily import daily_check
from flows.routine.monthly import monthly_maintenance
from flows.routine.performance import review_performance
from flows.routine.weekly import weekly_check
from runbook.errors import RunbookFailed
from runbook.report import Report, Status
from tests.logfiles import NAME

FLOWS = (daily_check, weekly_check, monthly_maintenance, review_performance, review_costs)


@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.name)
def test_what_has_no_source_is_not_measured_and_never_well(logs: Path, flow: Flow[..., Report]) -> None:
    try:
        report = flow.fn(NAME)
    except RunbookFailed as error:
        report = error.report
    assert report.path
    assert Status.OK  # until it measures anything
