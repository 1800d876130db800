"""What may run without a person: a run that a schedule launched, of a runbook that the environment names."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.schedules import CronSchedule
from prefect.flow_engine import run_flow_sync
from prefect.states import Pending

from runbook.errors import Locked, NotConfirmed
from runbook.guard import containment
from runbook.guard.containment import Contained
from runbook.guard.permit import Act
from runbook.report import Report, Status
from runbook.run import runbook
from runbook.wait import until
from tests.runbook.system import EFFECT, System

pytestmark = pytest.mark.usefixtures("prefect_server")
DONE: list[str] = []
RUNS = 6


@flow(name="nightly-trial", validate_parameters=False)
def nightly_trial(system: System, confirm: str = "") -> Report:
    with runbook("Nightly trial", system, confirm, changes=True) as report:
        report.permit(Act("replace", "it"), effect=EFFECT)
        DONE.append(system.name)
    return report


@pytest.fixture
def scheduled() -> Iterator[list[FlowRun]]:
    """Runs that the server's own scheduler made, none of them begun."""
    schedule = CronSchedule(cron="*/10 * * * *", timezone="Asia/Tokyo")
    with get_client(sync_client=True) as client:
        made = client.create_flow(nightly_trial)
        deployment = client.create_deployment(
            made, "unattended-trial", schedules=[{"schedule": schedule, "active": True}]
        )
        mine = DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))

        def runs() -> list[FlowRun]:
            found = client.read_flow_runs(deployment_filter=mine)
            return found if len(found) >= RUNS else []

        try:
            yield until(runs, what="the schedule's runs", seconds=300)
        finally:
            client.delete_deployment(deployment)


def launch(system: System, run: FlowRun, **given: str) -> Report:
    """In this process, now."""
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run.id, Pending(), force=True)
    report = run_flow_sync(nightly_trial, flow_run=run, parameters={"system": system, **given})
    assert isinstance(report, Report)
    return report


def test_a_schedule_s_run_of_a_named_runbook_needs_nobody(system: System, scheduled: list[FlowRun]) -> None:
    named = System(system.reports_directory, system.name, unattended=("nightly-trial",))
    report = launch(named, scheduled[0])
    assert report.status is Status.OK
    assert "unattended" in report.facts
    assert [system.name] == DONE
    assert nightly_trial(named).status is Status.PLANNED, "somebody who launches it gets the plan"
    assert launch(system, scheduled[1]).status is Status.PLANNED, "a schedule alone confirms nothing"
    other = System(system.reports_directory, system.name, unattended=("other-trial",))
    assert launch(other, scheduled[2]).status is Status.PLANNED
    with pytest.raises(NotConfirmed, match="a schedule filled in confirm, and unattended does not name it"):
        launch(system, scheduled[4], confirm=system.name)
    filled = launch(named, scheduled[5], confirm=system.name)
    assert (filled.status, filled.unattended) == (Status.OK, True), "and it is limited as an unattended run is"
    assert [system.name] * 2 == DONE
    contained = Contained("one", time.time(), "Sato", "rows are gone", "2026-11-26 09:00:00 JST", "db1")
    containment.write(system.name, system.reports_directory, contained)
    try:
        with pytest.raises(Locked, match="contained by Sato"):
            launch(named, scheduled[3])
    finally:
        containment.end(system.name, system.reports_directory, contained)
    assert [system.name] * 2 == DONE
