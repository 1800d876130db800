"""Automations, by name and idempotent."""

from __future__ import annotations

from datetime import timedelta

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

HEARTBEAT = "prefect.flow-run.heartbeat"
ENDED = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
# Flows send a heartbeat every 30 s (PREFECT_FLOWS_HEARTBEAT_FREQUENCY). A server that is away for longer than this
# makes live runs look dead, and a run that is dead stays Running for as long: three heartbeats.
ZOMBIE_SECONDS = 90


def zombies() -> AutomationCore:
    """A run whose worker died with it stays Running for ever; this marks it Crashed."""
    return AutomationCore(
        name="zombie-runs",
        description="実行プロセスが消えた run を Crashed にする (a run without a heartbeat is marked Crashed)",
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


def register() -> list[str]:
    """Create or update every automation; returns their names."""
    with get_client(sync_client=True) as client:
        for wanted in (zombies(),):
            existing = client.read_automations_by_name(wanted.name)
            if existing:
                client.update_automation(existing[0].id, wanted)
            else:
                client.create_automation(wanted)
    return [zombies().name]
