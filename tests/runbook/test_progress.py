"""Long work says how far it is: a line in the log, a bar on the run's page; and never disturbs the work."""

from __future__ import annotations

import logging
import uuid

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.context import FlowRunContext

from runbook import progress as module
from runbook.errors import Unreachable
from runbook.kinds import action
from runbook.progress import WorkDone, progress
from runbook.wait import until


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY_SECONDS", 0.05)


def bars(flow_run_id: uuid.UUID) -> list[tuple[float, str]]:
    wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=wanted)
    return [(float(str(one.data)), one.description or "") for one in found if one.type == "progress"]


@pytest.mark.usefixtures("prefect_server")
def test_a_bar_of_the_step_is_drawn_and_filled() -> None:
    ids: list[uuid.UUID] = []

    @action
    def copy() -> str:
        with progress(lambda: WorkDone("3 of 4 copied", 0.75)):
            assert until(lambda: bars(ids[0]), what="the bar", seconds=120) == [(75.0, "3 of 4 copied")]
        return "done"

    @flow(name="bar")
    def run() -> str:
        context = FlowRunContext.get()
        assert context
        assert context.flow_run
        ids.append(context.flow_run.id)
        return copy()

    assert run() == "done"
    assert [percent for percent, _ in bars(ids[0])] == [100.0]


def test_outside_of_a_run_there_is_the_log_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="ops")
    with progress(lambda: WorkDone("half of it", 0.5)):
        until(lambda: "half of it" in caplog.text, what="the line", seconds=120)


def test_what_cannot_be_told_disturbs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    asked = []

    def tell() -> str:
        asked.append(1)
        raise Unreachable("the server is away")

    with progress(tell):
        until(lambda: len(asked) > 2, what="being asked again", seconds=120)
    assert "away" not in caplog.text
