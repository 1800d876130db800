"""Every flow run of this process has its tasks in the server that is set when it runs."""

from __future__ import annotations

import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.events import emit_event
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES

from runbook.wait import until
from tests.fixtures.prefect_client import connected_to, other_server
from tests.fixtures.servers import free_port


@task
def step() -> None:
    """Nothing."""


@flow
def trial() -> str:
    """One task."""
    step()
    return str(flow_run.id)


def tasks_of(run: str) -> int:
    with get_client(sync_client=True) as client:
        return len(client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [run]})))  # type: ignore[arg-type]


@pytest.mark.usefixtures("prefect_server")
def test_tasks_are_in_the_server_that_is_set_though_another_was_set_meanwhile() -> None:
    """A file that points this process at its own server, which is gone afterwards, takes no other file's events, and
    gets none of theirs."""
    ours, gone = PREFECT_API_URL.value(), f"http://127.0.0.1:{free_port()}/api"
    first = trial()
    with other_server({PREFECT_API_URL: gone, PREFECT_CLIENT_MAX_RETRIES: 0}):
        emit_event("trial", {"prefect.resource.id": "trial"})
        assert until(connected_to, what="a connection", seconds=20) == {gone}
    second = trial()
    assert until(lambda: tasks_of(first) and tasks_of(second), what="a task of both runs", seconds=60)
    assert connected_to() == {ours}
