"""Overdue runs, on a real Prefect server: what takes too long and what does not begin is escalated; what ends is not."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Completed, Pending, Running, Suspended

from deployments import automations
from deployments.maintenance import MaintenanceRow, MaintenanceTable
from deployments.triggers import overdue
from lab.processes import exclusive
from lab.state.base import base_directory
from runbook.wait import until

SECONDS = 24  # Prefect waits for 10 at least; a busy server is behind with its events
TABLE = MaintenanceTable(
    row=(MaintenanceRow("日次", "試験", "DBA", "1分", "高", ("overdue-trial", "overdue-trial/other")),),
    cron=(),
    also=(),
)


@flow(name="overdue-trial")
def trial(environment: str) -> None:
    """Run by nobody: its states are set."""


@flow(name="escalate")
def escalate(environment: str, what: str = "", owner: str = "", run: str = "", key: str = "") -> None:
    """Launched by the automation, and run by nobody."""


@pytest.fixture
def name(prefect_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An environment with a table of its own, whose durations are seconds."""
    chosen = f"t{uuid.uuid4().hex[:12]}"
    monkeypatch.setitem(overdue.seconds_of.__globals__["UNITS"], "分", SECONDS // overdue.TIMES)
    causes = [partial(overdue.automations, table=TABLE, stuck_seconds=SECONDS)]
    with exclusive(base_directory() / ".deploy.lock"), get_client(sync_client=True) as client:
        flow_id = client.create_flow(trial)
        made = [client.create_deployment(flow_id, name) for name in (chosen, f"{chosen}-other")]
        made.append(client.create_deployment(client.create_flow(escalate), chosen))
        automations.register(chosen, causes=causes)
    yield chosen
    automations.remove(chosen)
    with get_client(sync_client=True) as client:
        for deployment in made:
            client.delete_deployment(deployment)


def begun(client: SyncPrefectClient, deployment: str, *states: Callable[[], State[Any]]) -> FlowRun:
    """A run of a deployment, and the states that it goes through: at once, else another one."""

    def one() -> FlowRun | None:
        started = time.monotonic()
        run = client.create_flow_run_from_deployment(client.read_deployment_by_name(deployment).id)
        for state in states:
            client.set_flow_run_state(run.id, state(), force=True)
        return run if time.monotonic() - started < SECONDS / 4 else None

    found = until(one, what="a server that answers", seconds=300)
    assert found
    return found


def test_what_takes_too_long_or_does_not_begin_is_escalated_once_and_what_ends_is_not(name: str) -> None:
    def suspended() -> State[Any]:
        return Suspended(timeout_seconds=3600)

    with get_client(sync_client=True) as client:
        plain = f"overdue-trial/{name}"
        slow = begun(client, f"{plain}-other", Running)
        stuck = begun(client, plain, Pending)
        ended = begun(client, plain, Pending, Running, Completed)
        waits = begun(client, plain, Running, suspended)
        # Begun after those that end and wait: when its time is over, theirs is too.
        last = begun(client, plain, Running)
        target = DeploymentFilter(id=DeploymentFilterId(any_=[client.read_deployment_by_name(f"escalate/{name}").id]))

        def escalated() -> dict[str, dict[str, Any]]:
            found = client.read_flow_runs(deployment_filter=target)
            return {str(run.parameters["run"]): run.parameters for run in found}

        expected = {str(slow.id), str(stuck.id), str(last.id)}
        until(lambda: expected <= set(escalated()), what="all escalations", seconds=300)
        found = escalated()
        assert found[str(slow.id)] == {
            "environment": name,
            "owner": "DBA",
            "run": str(slow.id),
            "key": f"overdue-{slow.id}",
            "what": f"{slow.name} (試験, 1分) has not ended after twice that time",
        }
        assert found[str(stuck.id)]["key"] == f"stuck-{stuck.id}"
        assert found[str(stuck.id)]["what"].startswith(f"{stuck.name} was sent to a worker")
        assert not {str(ended.id), str(waits.id)} & set(escalated())
        keys = [run.parameters["key"] for run in client.read_flow_runs(deployment_filter=target)]
        assert [keys.count(key) for key in (f"overdue-{slow.id}", f"stuck-{stuck.id}", f"overdue-{last.id}")] == [
            1,
            1,
            1,
        ]
