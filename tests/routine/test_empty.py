"""Routine runbooks where the environment names hardly anything, and one that does not serve."""

from __future__ import annotations

from pathlib import Path

import pytest
from prefect import Flow

from flows.routine.costs import review_costs
from flows.routine.daily import daily_check
from flows.routine.monthly import monthly_maintenance
from flows.routine.performance import review_performance
from flows.routine.weekly import weekly_check
from runbook.report import Report, Status
from tests.fixtures.application.broken import reported
from tests.fixtures.logfiles import NAME

FLOWS = (daily_check, weekly_check, monthly_maintenance, review_performance, review_costs)
OWN = "host."  # of the worker's own host


@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.name)
def test_what_has_no_source_is_not_measured_and_never_well(logs: Path, flow: Flow[..., Report]) -> None:
    report = reported(lambda: flow.fn(NAME))
    assert report.path
    assert report.path.with_suffix(".md").exists()
    assert report.status in (Status.WARN, Status.CRITICAL)
    well = [one.name for one in report.findings if one.status is Status.OK and not one.name.startswith(OWN)]
    assert well == []
    assert all(one.hint for one in report.findings if one.status is not Status.OK), "each says what to do"


def test_a_region_that_does_not_serve_has_nothing_to_judge(logs: Path) -> None:
    (logs.parent / "endpoint").write_text("https://other.example.com\n")
    toml = logs.parent / "trial.toml"
    toml.write_text(
        toml.read_text() + f'[endpoint]\nfile = "{logs.parent}/endpoint"\n[application]\nurl = "http://127.0.0.1:1"\n'
    )
    report = reported(lambda: daily_check.fn(NAME))
    assert (report.findings, report.status) == ([], Status.OK)
    assert "users are sent to https://other.example.com" in report.outcome
