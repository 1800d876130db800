"""Runs that failed, crashed or do not begin: `escalate` tells people. Where escalate does not, the server does."""

from __future__ import annotations

from datetime import timedelta

from prefect.client.orchestration import SyncPrefectClient
from prefect.events.actions import SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

from blocks.config import toml
from deployments.alerting import read_server_channel
from deployments.maintenance import name_in, read_table
from deployments.triggers.launch import launch
from flows.monitoring.wording import not_started
from runbook.flow import NAMES

ESCALATE, ACKNOWLEDGE = "escalate", "acknowledge-incident"
LATE = "prefect.flow-run.Late"
FAILED = {f"prefect.flow-run.{state}" for state in ("Failed", "Crashed", "TimedOut")}
BEGAN = {f"prefect.flow-run.{state}" for state in ("Pending", "Running", *NAMES.values(), "Cancelled", "Cancelling")}
# A check that fails every few minutes is one incident: launching escalate for each would only count.
THROTTLE = timedelta(minutes=10)
# Prefect says Late 15 s after the moment; a worker that is busy with others may need longer than that.
PATIENCE = timedelta(minutes=10)
SILENCE = timedelta(minutes=3)
EACH_RUN, EACH_DEPLOYMENT = "prefect.resource.id", "related:deployment:prefect.resource.id"
# A wrong confirm is answered where it was typed: whoever typed it is looking.
NOT_TYPED_WRONGLY = {"prefect.resource.id": "prefect.flow-run.*", "prefect.state-message": "!*NotConfirmed*"}
RUN = "{{ flow_run.id | string }}"


def automations(client: SyncPrefectClient, environment: str) -> list[AutomationCore]:
    """None where the environment names nobody to tell."""
    if not toml.environment(environment).has("alerts"):
        return []
    return [failed(client, environment), late(client, environment), *server_tells(client, environment)]


def failed(client: SyncPrefectClient, environment: str) -> AutomationCore:
    """One for the runs of all deployments but escalate's own (no loop); runs within runs have no deployment."""
    what = "{{ flow.name }} ({{ deployment.name }}): {{ event.resource['prefect.state-name'] }}"
    return AutomationCore(
        name=f"escalate-failures-{environment}",
        description="a run that failed or crashed is escalated",
        trigger=EventTrigger(
            expect=FAILED,
            match=ResourceSpecification.model_validate(NOT_TYPED_WRONGLY),
            match_related=_of(environment, f"!{ESCALATE}", f"!{ACKNOWLEDGE}"),
            for_each={EACH_DEPLOYMENT},
            posture=Posture.Reactive,
            threshold=1,
            within=THROTTLE,
        ),
        actions=[
            launch(
                client,
                environment,
                ESCALATE,
                {"what": what, "run": RUN, "key": "{{ flow.name }}/{{ deployment.name }}"},
            )
        ],
    )


def late(client: SyncPrefectClient, environment: str, patience: timedelta = PATIENCE) -> AutomationCore:
    """Runs that do not begin have one cause as a rule, a worker that is not there: they are one incident."""
    return AutomationCore(
        name=f"escalate-late-{environment}",
        description="a run that does not start on time is escalated",
        trigger=EventTrigger(
            after={LATE},
            expect=BEGAN | FAILED,
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            match_related=_of(environment, f"!{ESCALATE}", f"!{ACKNOWLEDGE}"),
            for_each={EACH_RUN},
            posture=Posture.Proactive,
            threshold=1,
            within=patience,
        ),
        actions=[
            launch(
                client,
                environment,
                ESCALATE,
                {"what": not_started("{{ flow.name }}"), "run": RUN, "key": f"late/{environment}"},
            )
        ],
    )


def server_tells(client: SyncPrefectClient, environment: str, silence: timedelta = SILENCE) -> list[AutomationCore]:
    """Escalate runs on a worker. Where that is dead, or escalate fails, Prefect's server posts to the first channel
    that is an address; none where there is no such channel."""
    block = read_server_channel(client, environment)
    if block is None:
        return []
    body = "run {{ flow_run.name }}: {{ event.resource['prefect.state-name'] }} {{ flow_run | ui_url }}"

    def telling(name: str, subject: str, trigger: EventTrigger) -> AutomationCore:
        action = SendNotification(block_document_id=block, subject=subject, body=body)
        return AutomationCore(name=f"{name}-{environment}", description=subject, trigger=trigger, actions=[action])

    own = _of(environment, ESCALATE)
    silent = EventTrigger(
        after={LATE},
        expect=BEGAN | FAILED,
        match_related=own,
        for_each={EACH_RUN},
        posture=Posture.Proactive,
        threshold=1,
        within=silence,
    )
    broken = EventTrigger(
        expect=FAILED,
        match_related=own,
        for_each={EACH_DEPLOYMENT},
        posture=Posture.Reactive,
        threshold=1,
        within=THROTTLE,
    )
    return [
        telling("escalation-silent", f"{environment}: escalate does not start: check the worker", silent),
        telling("escalation-failed", f"{environment}: escalate failed: phone the number in its report", broken),
    ]


def _of(environment: str, *names: str) -> list[ResourceSpecification | dict[str, str | list[str]]]:
    """Runs of an environment's deployments whose flows have these names, or have not (`!`)."""
    flows = [{"prefect.resource.role": "flow", "prefect.resource.name": name} for name in names]
    # By name, one by one: `production-*` would be those of the environment production-dr too.
    named = sorted({environment, *(name_in(environment, one).partition("/")[2] for one in read_table().durations())})
    deployment = {"prefect.resource.role": "deployment", "prefect.resource.name": named}
    return [ResourceSpecification.model_validate(one) for one in (deployment, *flows)]
