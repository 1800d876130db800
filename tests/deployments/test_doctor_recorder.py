"""The doctor finds flow runs whose tasks Prefect does not record."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta

import pytest
from prefect import flow
from prefect.client.orchestration import get_client

from deployments.doctor import recorder
from deployments.doctor.recorder import look_at_recorder
from runbook.wait import until


@flow
def trial() -> None:
    """No task."""


def tell(run: str, ago: timedelta) -> None:
    """An event as a client's task sends it, which the recorder leaves alone (it has no `prefect.orchestration`)."""
    resource, related = f"prefect.task-run.{uuid.uuid4()}", f"prefect.flow-run.{run}"
    with get_client(sync_client=True) as client:
        event = {
            "id": str(uuid.uuid4()),
            "occurred": (datetime.now(UTC) - ago).isoformat(),
            "payload": {},
            "event": "prefect.task-run.Completed",
            "resource": {"prefect.resource.id": resource},
            "related": [{"prefect.resource.id": related, "prefect.resource.role": "flow-run"}],
        }
        client.request("POST", "/events", json=[event])


@pytest.mark.usefixtures("prefect_server")
def test_runs_that_are_not_there_and_runs_without_their_tasks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with get_client(sync_client=True) as client:
        known = str(client.create_flow_run(trial).id)
    # Days ago there is no other test's run.
    monkeypatch.setattr(recorder, "SINCE", timedelta(days=4))
    monkeypatch.setattr(recorder, "PATIENCE", timedelta(days=3))
    lost, old, young = (str(uuid.uuid4()) for _ in range(3))
    for run, days in ((old, 5), (young, 2), *((known, 3.5) for _ in range(60)), (lost, 3.6)):
        tell(run, timedelta(days=days))

    def told() -> tuple[str, str] | None:
        strangers, empty = look_at_recorder()
        return (str(strangers), str(empty)) if lost in strangers.what and known in empty.what else None

    strangers, empty = until(told, what="both", seconds=60) or ("", "")
    assert "WARN" in strangers
    assert "of 2 flow runs with tasks in the last hour 1 are not in" in strangers
    assert "before it ends" in strangers
    assert "WARN" in empty
    assert "FLUSH_INTERVAL=1" in empty
    assert not any(run in strangers + empty for run in (old, young))
    assert known not in strangers
    assert lost not in empty
