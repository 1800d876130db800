"""Automations of runs that failed or do not begin, in a real Prefect server: what they start, and what they do not."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.events.schemas.automations import AutomationCore
from prefect.states import Completed, Crashed, Failed, Pending, Running, Scheduled

from deployments import automations, register
from deployments.triggers import deaths, failures
from flows.monitoring.acknowledgement import acknowledge_incident
from flows.monitoring.escalation import escalate
from lab.processes import exclusive
from lab.state.base import base_directory
from runbook.report import Status
from runbook.wait import until
from tests.fixtures.receivers import http_receiver, smtp_receiver
from tests.monitoring.duty import PAGER, SLACK, Duty, prepare

SECONDS = 180.0
NAMED = {"other": "{}-health"}  # as prefect.yaml names a second entry of a flow


@flow(name="failing")
def failing(environment: str) -> None:
    """A runbook of this test's own."""


@flow(name="other")
def other(environment: str) -> None:
    """Another."""


class Scene:
    """An environment of a name that no other test has, with deployments that no worker runs."""

    def __init__(self, client: SyncPrefectClient, duty: Duty) -> None:
        self.client, self.duty, self.name = client, duty, duty.name
        self.deployments = {
            found.name: client.create_deployment(
                client.create_flow(found),
                NAMED.get(found.name, "{}").format(duty.name),
                entrypoint=f"{found.fn.__module__}.{found.fn.__name__}",
                tags=["database", "DBA"],
                parameters={"environment": duty.name},
            )
            for found in (failing, other, escalate, acknowledge_incident)
        }

    def run(self, name: str = "failing", **state: Any) -> FlowRun:
        return self.client.create_flow_run_from_deployment(self.deployments[name], **state)

    def ends(self, state: Any, name: str = "failing") -> FlowRun:
        """A run that began and ended so."""
        run = self.run(name)
        for one in (Pending(), Running(), state):
            self.client.set_flow_run_state(run.id, one, force=True)
        return run

    def escalations(self) -> list[dict[str, Any]]:
        """What escalate was launched with by automations."""
        wanted = DeploymentFilter(id=DeploymentFilterId(any_=[self.deployments["escalate"]]))
        found = self.client.read_flow_runs(deployment_filter=wanted)
        return [run.parameters for run in found if run.parameters.get("what")]

    def escalated(self, number: int) -> list[dict[str, Any]]:
        return (
            until(lambda: len(found := self.escalations()) >= number and found, what="an escalation", seconds=SECONDS)
            or []
        )

    def make(self, *automations: AutomationCore) -> list[UUID]:
        return [self.client.create_automation(one) for one in automations]


@pytest.fixture
def scene(prefect_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    with http_receiver() as web, smtp_receiver() as mail, get_client(sync_client=True) as client:
        duty = prepare(tmp_path, web, mail, monkeypatch, named=f"t{uuid.uuid4().hex[:12]}")
        duty.describe(channels=("slack", "email"))
        with exclusive(base_directory() / ".deploy.lock"):
            register.register(duty.name)
        found = Scene(client, duty)
        yield found
        for name in ("escalate-failures", "escalate-late", "escalation-silent", "escalation-failed"):
            for one in client.read_automations_by_name(f"{name}-{duty.name}"):
                client.delete_automation(one.id)


def test_a_run_that_fails_is_escalated_and_what_is_no_failure_is_not(scene: Scene) -> None:
    scene.make(failures.failed(scene.client, scene.name))
    scene.ends(Failed(message="Flow run encountered an exception: NotConfirmed: confirm is “x”"))
    scene.ends(Failed(message="no channel"), "escalate")
    scene.ends(Completed())
    crashed = scene.ends(Crashed(message="killed"))
    scene.escalated(1)  # Prefect looks at two events at a time: the next failure might overtake this one
    scene.ends(Failed(message="Flow run encountered an exception: RunbookFailed: …"))  # it is told of within 10 minutes
    another = scene.ends(Failed(message="Flow run encountered an exception: RunbookFailed: …"), "other")
    found = sorted(scene.escalated(2), key=lambda one: one["key"])
    assert found == [
        {
            "environment": scene.name,
            "what": f"{name} ({deployment}): {state}",
            "run": str(run.id),
            "key": f"{name}/{deployment}",
        }
        for name, deployment, state, run in (
            ("failing", scene.name, "Crashed", crashed),
            ("other", f"{scene.name}-health", "Failed", another),
        )
    ]


def test_a_run_that_does_not_begin_is_escalated_and_a_silent_escalation_is_told_by_the_server(scene: Scene) -> None:
    ten = timedelta(seconds=10)
    scene.make(
        failures.late(scene.client, scene.name, patience=ten),
        *failures.server_tells(scene.client, scene.name, silence=ten),
    )
    past = Scheduled(scheduled_time=datetime.now(UTC) - timedelta(minutes=1))
    run = scene.run(state=past)
    (found,) = scene.escalated(1)
    assert (found["run"], found["key"]) == (str(run.id), f"late/{scene.name}")
    assert found["what"] == "failing does not start: check the worker"
    # Nobody runs that escalation either: the server tells.
    told = until(lambda: scene.duty.web.got[SLACK], what="the server's own message", seconds=SECONDS)
    assert "escalate does not start: check the worker" in told[0]["text"]
    assert "Late" in told[0]["text"]


def test_an_escalation_that_fails_is_told_by_the_server(scene: Scene) -> None:
    scene.make(*failures.server_tells(scene.client, scene.name))
    scene.ends(Failed(message="no channel accepted the message"), "escalate")
    told = until(lambda: scene.duty.web.got[SLACK], what="the server's own message", seconds=SECONDS)
    assert "escalate failed: phone the number in its report" in told[0]["text"]


def trigger_ids(scene: Scene, automations: Sequence[AutomationCore]) -> dict[str, str]:
    """By which Prefect knows what it has counted."""
    body = {
        "automations": {"name": {"any_": [one.name for one in (*automations, *deaths.automations(scene.client, ""))]}}
    }
    answer = scene.client.request("POST", "/automations/filter", json=body)
    return {one["name"]: one["trigger"]["id"] for one in answer.json()}


def test_all_of_them_and_no_secret_in_a_listing(scene: Scene) -> None:
    found = failures.automations(scene.client, scene.name)
    assert [one.name for one in found] == [
        f"{name}-{scene.name}"
        for name in ("escalate-failures", "escalate-late", "escalation-silent", "escalation-failed")
    ]
    shown = json.dumps(
        [one.model_dump() for one in scene.client.read_block_documents(include_secrets=False, limit=200)], default=str
    )
    assert f"alerts-{scene.name}" in shown
    assert PAGER in shown
    assert "geheim" not in shown
    both = [failures.automations, deaths.automations]
    automations.register(scene.name, causes=both)
    before = trigger_ids(scene, found)
    automations.register(scene.name, causes=both)
    assert trigger_ids(scene, found) == before, "none is made anew: it would forget for whom it waits"
    scene.duty.describe(channels=("email",))
    path = scene.duty.base / "trial.toml"
    path.write_text(path.read_text().partition("[alerts]")[0])
    assert failures.automations(scene.client, scene.name) == [], "there is nobody to tell"


def test_what_people_are_told_of_a_run_and_when_the_next_level_is(scene: Scene) -> None:
    failed = scene.ends(Failed(message="Flow run encountered an exception: RunbookFailed: no backup is verified"))
    for _ in range(2):
        report = escalate(scene.name, run=str(failed.id), key="k")
    assert report.status is Status.OK
    assert scene.duty.mail.letters == [], "a channel that took it is enough"
    assert [one["text"].count("sent to: DBA") for one in scene.duty.web.got[SLACK]] == [0, 1], "its tags name the owner"
    text = scene.duty.web.got[SLACK][0]["text"]
    assert f"{failed.name}: Failed" in text
    assert "no backup is verified" in text
    assert f"/v2/runs/flow-run/{failed.id}" in text
    incident = scene.duty.incidents()[0]
    form = f"/deployments/deployment/{scene.deployments['acknowledge-incident']}/run?parameters="
    assert form in text
    assert incident.id in text.partition(form)[2]
    wanted = DeploymentFilter(id=DeploymentFilterId(any_=[scene.deployments["escalate"]]))
    (following,) = scene.client.read_flow_runs(deployment_filter=wanted)
    assert following.state
    assert following.state.state_details.scheduled_time == incident.since + timedelta(minutes=15)
    acknowledge_incident(scene.name, by="佐藤")
    assert "佐藤 handles it" in scene.duty.web.got[SLACK][-1]["text"]
    assert scene.duty.incidents()[0].acknowledged_by == "佐藤"
