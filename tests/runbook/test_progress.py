"""Long work says how far it is: a line in the log, a bar on the run's page; and never disturbs the work."""

from __future__ import annotations

import logging
import re
import threading
import uuid

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.context import FlowRunContext

from runbook import progress as module
from runbook.current import use_report
from runbook.errors import OpsError, Unreachable
from runbook.kinds import action, probe
from runbook.progress import WorkDone, progress
from runbook.report import Report
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


GO = threading.Event()


@probe
def prepare() -> None:
    """It begins the step that `fill` ends."""


@action
def fill() -> None:
    with progress(lambda: WorkDone("half of it", 0.5)):
        assert GO.wait(120)


@action
def check() -> None:
    assert GO.wait(120)


@action
def swap(fails: bool = False) -> None:
    if fails:
        raise OpsError("no space", "free some")


def test_the_log_follows_the_plan(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="ops")
    report = Report("Restore", "t")
    report.plan("restore", "into a copy", size=55_000_000, seconds=1.2, by=[prepare, fill])
    report.plan("check", "every row", by=[check])
    for number, name in enumerate(("app", "audit")):
        report.plan("swap", name, seconds=0.2, by=[swap], shared=number > 0)
    with use_report(report):
        swap()  # judged, not carried out
        assert caplog.messages == ["swap: done in 0.0 s"]
        report.permitted = True
        caplog.clear()
        prepare()
        together = [fill.submit(), check.submit()]
        for line in ("Step 1/4: restore: half of it", "Step 2/4: check: 0.1 s so far"):
            until(lambda: line in caplog.messages, what=line, seconds=120)  # noqa: B023 (called at once)
        GO.set()
        for one in together:
            one.result()
        with pytest.raises(OpsError):
            swap(fails=True)
        swap()
        swap()
    said = [
        re.sub(r"\d+\.\d s$", "_ s", line) for line in caplog.messages if "half" not in line and "so far" not in line
    ]
    parallel = {*said[2:5]}
    assert said[:2] == ["Step 1/4: restore: into a copy, 55.0 MB, about 1 s", "prepare: done in _ s"]
    assert parallel == {
        "Step 1/4: restore: done in _ s",
        "Step 2/4: check: every row",
        "Step 2/4: check: done in _ s",
    }
    assert said[5:] == [
        "Step 3/4: swap: app, less than 1 s",
        "Step 4/4: swap: audit, less than 1 s",
        "Step 3/4: swap: failed after _ s",
        "Step 3/4: swap: done in _ s",
        "Step 4/4: swap: done in _ s",
        "swap: done in _ s",
    ]
