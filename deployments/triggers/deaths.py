"""Runs whose worker died with them."""

from __future__ import annotations

from datetime import timedelta

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

from runbook.flow import NAMES

HEARTBEAT = "prefect.flow-run.heartbeat"
# A run that waits for people (Suspended, Paused) has no process, and no heartbeats until somebody answers.
ENDED = {
    f"prefect.flow-run.{state}" for state in (*NAMES.values(), "Failed", "Cancelled", "Crashed", "Suspended", "Paused")
}
# Flows send a heartbeat every 30 s (PREFECT_FLOWS_HEARTBEAT_FREQUENCY). A server that is away for longer than this
# makes live runs look dead, and a run that is dead stays Running for as long: three heartbeats.
ZOMBIE_SECONDS = 90


def automations(client: SyncPrefectClient, environment: str) -> list[AutomationCore]:
    """One, for the runs of all environments: such a run stays Running for ever; this marks it Crashed."""
    return [
        AutomationCore(
            name="zombie-runs",
            description="a run without a heartbeat is marked Crashed",
            trigger=EventTrigger(
                after={HEARTBEAT},
                expect={HEARTBEAT, *ENDED},
                match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
                for_each={"prefect.resource.id"},
                posture=Posture.Proactive,
                threshold=1,
                within=timedelta(seconds=ZOMBIE_SECONDS),
            ),
            actions=[
                ChangeFlowRunState(
                    name="Crashed",
                    state=StateType.CRASHED,
                    force=False,
                    message="no heartbeat: the process or its host died (automation zombie-runs)",
                )
            ],
        )
    ]
